"""PDUs as values and as bytes (PS3.8 9.3 and annex D, PS3.7 annex D.3.3).

Decoding bounds every length by the bytes that are there, and every list by a number. What breaks a rule that decides
how the association is understood raises InvalidPdu with the reason an A-ABORT would carry; reserved fields are not
looked at, and items of a type the Standard does not know are passed over (PS3.8 9.3.1, PS3.7 D.3.3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from dicom_node.errors import NodeError

__all__ = [
    "APPLICATION_CONTEXT",
    "Abort",
    "AbortReason",
    "AnsweredContext",
    "AssociateAC",
    "AssociateRJ",
    "AssociateRQ",
    "AsynchronousWindow",
    "CommonExtendedNegotiation",
    "ExtendedNegotiation",
    "InvalidPdu",
    "Pdu",
    "ProposedContext",
    "ReleaseRP",
    "ReleaseRQ",
    "RoleSelection",
    "UserIdentity",
    "UserInformation",
    "decode_pdu",
    "encode_pdu",
]

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
MAX_CONTEXTS = 128  # PS3.8 table 9-13: odd ids 1 .. 255
MAX_KEPT, MAX_KEPT_BYTES = 128, 8192  # A-ASSOCIATE PDUs that are remembered with their meaning, and bytes of one
MAX_ITEMS = 4096  # transfer syntaxes, roles, extended negotiations, in one PDU


class AbortReason:
    """Reasons of an A-ABORT by the upper layer (PS3.8 table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNIZED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNIZED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class InvalidPdu(NodeError):
    """The peer sent what is no PDU. `abort_reason` as in PS3.8 table 9-26."""

    def __init__(self, message: str, abort_reason: int = AbortReason.INVALID_PARAMETER) -> None:
        super().__init__(message)
        self.abort_reason = abort_reason


# --- values ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposedContext:
    """PS3.8 9.3.2.2."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredContext:
    """PS3.8 9.3.3.2; `transfer_syntax` means something only when `result` is 0."""

    context_id: int
    result: int
    transfer_syntax: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AsynchronousWindow:
    """PS3.7 D.3.3.3; 0 = unlimited."""

    invoked: int
    performed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSelection:
    """PS3.7 D.3.3.4: which roles the *requestor* may have in contexts of this SOP class."""

    sop_class_uid: str
    scu: bool
    scp: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendedNegotiation:
    """PS3.7 D.3.3.5."""

    sop_class_uid: str
    application_information: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonExtendedNegotiation:
    """PS3.7 D.3.3.6."""

    sop_class_uid: str
    service_class_uid: str
    related_general_sop_class_uids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UserIdentity:
    """PS3.7 D.3.3.7.1; `kind`: 1 username, 2 username and passcode, 3 Kerberos, 4 SAML, 5 JWT. Never shown."""

    kind: int
    primary: bytes = field(repr=False)
    secondary: bytes = field(default=b"", repr=False)
    response_requested: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UserInformation:
    """PS3.8 9.3.2.3 with the sub-items of PS3.7 D.3.3. `maximum_length` of P-DATA-TF PDUs, 0 = unlimited."""

    maximum_length: int
    implementation_class_uid: str
    implementation_version_name: str = ""
    asynchronous_window: AsynchronousWindow | None = None
    roles: tuple[RoleSelection, ...] = ()
    extended: tuple[ExtendedNegotiation, ...] = ()
    common_extended: tuple[CommonExtendedNegotiation, ...] = ()
    identity: UserIdentity | None = None
    identity_response: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociateRQ:
    """A-ASSOCIATE-RQ (PS3.8 9.3.2). AE titles without their padding."""

    called_ae_title: str
    calling_ae_title: str
    contexts: tuple[ProposedContext, ...]
    user: UserInformation
    application_context: str = APPLICATION_CONTEXT
    protocol_version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociateAC:
    """A-ASSOCIATE-AC (PS3.8 9.3.3). The titles are those of the request, given back."""

    called_ae_title: str
    calling_ae_title: str
    contexts: tuple[AnsweredContext, ...]
    user: UserInformation
    application_context: str = APPLICATION_CONTEXT
    protocol_version: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociateRJ:
    """A-ASSOCIATE-RJ: result, source and reason as in PS3.8 table 9-21."""

    result: int
    source: int
    reason: int


@dataclass(frozen=True, slots=True)
class ReleaseRQ:
    """A-RELEASE-RQ (PS3.8 9.3.6)."""


@dataclass(frozen=True, slots=True)
class ReleaseRP:
    """A-RELEASE-RP (PS3.8 9.3.7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """A-ABORT (PS3.8 9.3.8): `source` 0 the service user, 2 the upper layer."""

    source: int
    reason: int = AbortReason.NOT_SPECIFIED


Pdu = AssociateRQ | AssociateAC | AssociateRJ | ReleaseRQ | ReleaseRP | Abort
"""Every PDU but P-DATA-TF, which is never held whole."""


# --- to bytes --------------------------------------------------------------------------------------------------------

_RQ, _AC, _RJ, P_DATA, _RELEASE_RQ, _RELEASE_RP, _ABORT = range(1, 8)
PDU_TYPES = range(1, 8)


def encode_pdu(pdu: Pdu) -> bytes:
    """The PDU as it goes out. Raises ValueError for what has no encoding: a title of 17 characters, a UID of 70000."""
    if isinstance(pdu, AssociateRQ):
        items = b"".join(_proposed(context) for context in pdu.contexts)
        return _pdu(_RQ, _association(pdu) + items + _user(pdu.user))
    if isinstance(pdu, AssociateAC):
        return _answer(pdu)
    if isinstance(pdu, AssociateRJ):
        return _pdu(_RJ, bytes((0, pdu.result, pdu.source, pdu.reason)))
    if isinstance(pdu, Abort):
        return _pdu(_ABORT, bytes((0, 0, pdu.source, pdu.reason)))
    return _pdu(_RELEASE_RQ if isinstance(pdu, ReleaseRQ) else _RELEASE_RP, bytes(4))


@lru_cache(maxsize=128)
def _answer(pdu: AssociateAC) -> bytes:
    items = b"".join(_answered(context) for context in pdu.contexts)
    return _pdu(_AC, _association(pdu) + items + _user(pdu.user))


def _pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxI", kind, len(body)) + body


def _item(kind: int, body: bytes) -> bytes:
    if len(body) > 0xFFFF:
        raise ValueError(f"item {kind:#04x} is {len(body)} bytes long, 65535 is the most")
    return struct.pack(">BxH", kind, len(body)) + body


def _counted(value: bytes) -> bytes:
    if len(value) > 0xFFFF:
        raise ValueError(f"a field is {len(value)} bytes long, 65535 is the most")
    return struct.pack(">H", len(value)) + value


def _title(text: str) -> bytes:
    encoded = text.encode("ascii", "replace")
    if len(encoded) > 16:
        raise ValueError(f"AE title {text!r} has {len(encoded)} characters, 16 is the most")
    return encoded.ljust(16)


def _uid(text: str) -> bytes:
    return text.encode("ascii", "replace")


def _association(pdu: AssociateRQ | AssociateAC) -> bytes:
    fixed = struct.pack(">Hxx", pdu.protocol_version) + _title(pdu.called_ae_title) + _title(pdu.calling_ae_title)
    return fixed + bytes(32) + _item(0x10, _uid(pdu.application_context))


def _proposed(context: ProposedContext) -> bytes:
    syntaxes = b"".join(_item(0x40, _uid(syntax)) for syntax in context.transfer_syntaxes)
    return _item(0x20, bytes((context.context_id, 0, 0, 0)) + _item(0x30, _uid(context.abstract_syntax)) + syntaxes)


def _answered(context: AnsweredContext) -> bytes:
    head = bytes((context.context_id, 0, context.result, 0))
    return _item(0x21, head + _item(0x40, _uid(context.transfer_syntax)))


def _user(user: UserInformation) -> bytes:
    parts = [_item(0x51, struct.pack(">I", user.maximum_length)), _item(0x52, _uid(user.implementation_class_uid))]
    if user.asynchronous_window is not None:
        window = user.asynchronous_window
        parts.append(_item(0x53, struct.pack(">HH", window.invoked, window.performed)))
    parts += (_item(0x54, _counted(_uid(r.sop_class_uid)) + bytes((r.scu, r.scp))) for r in user.roles)
    if user.implementation_version_name:
        parts.append(_item(0x55, user.implementation_version_name.encode("ascii", "replace")))
    parts += (_item(0x56, _counted(_uid(e.sop_class_uid)) + e.application_information) for e in user.extended)
    parts += (_common_extended(item) for item in user.common_extended)
    if user.identity is not None:
        identity = user.identity
        head = bytes((identity.kind, identity.response_requested))
        parts.append(_item(0x58, head + _counted(identity.primary) + _counted(identity.secondary)))
    if user.identity_response is not None:
        parts.append(_item(0x59, _counted(user.identity_response)))
    return _item(0x50, b"".join(parts))


def _common_extended(item: CommonExtendedNegotiation) -> bytes:
    related = b"".join(_counted(_uid(uid)) for uid in item.related_general_sop_class_uids)
    return _item(0x57, _counted(_uid(item.sop_class_uid)) + _counted(_uid(item.service_class_uid)) + _counted(related))


# --- from bytes ------------------------------------------------------------------------------------------------------


def decode_pdu(kind: int, body: bytes) -> Pdu:
    """The PDU of type `kind` (not P-DATA-TF) with these bytes after its length field. Raises InvalidPdu."""
    if kind in (_RQ, _AC):
        return _kept.get((kind, body)) or _association_kept(kind, body)
    if len(body) < 4:
        raise InvalidPdu(f"a PDU of type {kind} has {len(body)} bytes, 4 are needed")
    if kind == _RJ:
        return AssociateRJ(result=body[1], source=body[2], reason=body[3])
    if kind == _ABORT:
        return Abort(source=body[2], reason=body[3])
    if kind in (_RELEASE_RQ, _RELEASE_RP):
        return ReleaseRQ() if kind == _RELEASE_RQ else ReleaseRP()
    raise InvalidPdu(f"there is no PDU of type {kind}", AbortReason.UNRECOGNIZED_PDU)


_kept: dict[tuple[int, bytes], AssociateRQ | AssociateAC] = {}  # peers ask for the same again and again


def _association_kept(kind: int, body: bytes) -> AssociateRQ | AssociateAC:
    """It is kept unless it is large, or says with a passcode who the user is."""
    pdu = _association_from(kind, body)
    if len(body) <= MAX_KEPT_BYTES and pdu.user.identity is None and pdu.user.identity_response is None:
        if len(_kept) >= MAX_KEPT:
            _kept.clear()
        _kept[kind, body] = pdu
    return pdu


def _association_from(kind: int, body: bytes) -> AssociateRQ | AssociateAC:
    if len(body) < 68:
        raise InvalidPdu(f"an A-ASSOCIATE PDU has {len(body)} bytes, 68 are needed")
    (version,) = struct.unpack_from(">H", body)
    called, calling = _title_from(body[4:20]), _title_from(body[20:36])
    budget = _Budget()
    application_context: str | None = None
    user: UserInformation | None = None
    proposed: list[ProposedContext] = []
    answered: list[AnsweredContext] = []
    for item, content in _items(body, 68, budget):
        if item == 0x10 and application_context is None:
            application_context = _uid_from(content)
        elif item == 0x20 and kind == _RQ:
            proposed.append(_proposed_from(content, budget))
        elif item == 0x21 and kind == _AC:
            answered.append(_answered_from(content, budget))
        elif item == 0x50 and user is None:
            user = _user_from(content, budget)
        elif item in (0x10, 0x20, 0x21, 0x50):
            raise InvalidPdu(f"item {item:#04x} has no place here", AbortReason.UNEXPECTED_PARAMETER)
    contexts: Sequence[ProposedContext | AnsweredContext] = proposed or answered
    if len(contexts) > MAX_CONTEXTS:
        raise InvalidPdu(f"{len(contexts)} presentation contexts, {MAX_CONTEXTS} is the most")
    if application_context is None or user is None:
        raise InvalidPdu("an A-ASSOCIATE PDU without application context or user information")
    if kind == _RQ:
        return AssociateRQ(
            called_ae_title=called,
            calling_ae_title=calling,
            contexts=tuple(proposed),
            user=user,
            application_context=application_context,
            protocol_version=version,
        )
    return AssociateAC(
        called_ae_title=called,
        calling_ae_title=calling,
        contexts=tuple(answered),
        user=user,
        application_context=application_context,
        protocol_version=version,
    )


class _Budget:
    """Items one PDU may still have."""

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise InvalidPdu(f"more than {MAX_ITEMS} items in one PDU")


def _items(body: bytes, start: int, budget: _Budget) -> Iterator[tuple[int, bytes]]:
    """Type and content of each item from `start` to the end. Raises InvalidPdu where the lengths do not add up."""
    while start < len(body):
        if len(body) - start < 4:
            raise InvalidPdu("bytes are left over after the last item")
        kind, length = struct.unpack_from(">BxH", body, start)
        start += 4
        if length > len(body) - start:
            raise InvalidPdu(f"item {kind:#04x} says it has {length} bytes, {len(body) - start} are left")
        budget.spend()
        yield kind, body[start : start + length]
        start += length


def _title_from(raw: bytes) -> str:
    return raw.decode("latin-1").strip(" \0")


def _uid_from(raw: bytes) -> str:
    """UIDs come padded with NUL or blank though they must not be (PS3.8 annex F)."""
    return raw.decode("latin-1").strip(" \0")


def _proposed_from(content: bytes, budget: _Budget) -> ProposedContext:
    if len(content) < 4:
        raise InvalidPdu("a presentation context of fewer than 4 bytes")
    abstract: str | None = None
    syntaxes: list[str] = []
    for kind, value in _items(content, 4, budget):
        if kind == 0x30 and abstract is None:
            abstract = _uid_from(value)
        elif kind == 0x40:
            syntaxes.append(_uid_from(value))
        elif kind == 0x30:
            raise InvalidPdu("two abstract syntaxes in one context", AbortReason.UNEXPECTED_PARAMETER)
    if abstract is None or not syntaxes:
        raise InvalidPdu("a presentation context without abstract or transfer syntax")
    if content[0] % 2 == 0:
        raise InvalidPdu(f"presentation context id {content[0]} is even")
    return ProposedContext(context_id=content[0], abstract_syntax=abstract, transfer_syntaxes=tuple(syntaxes))


def _answered_from(content: bytes, budget: _Budget) -> AnsweredContext:
    if len(content) < 4:
        raise InvalidPdu("a presentation context of fewer than 4 bytes")
    found = [_uid_from(value) for kind, value in _items(content, 4, budget) if kind == 0x40]
    if content[2] == 0 and len(found) != 1:
        raise InvalidPdu(f"an accepted context with {len(found)} transfer syntaxes")
    return AnsweredContext(context_id=content[0], result=content[2], transfer_syntax=found[0] if found else "")


def _user_from(content: bytes, budget: _Budget) -> UserInformation:
    maximum_length: int | None = None
    class_uid, version_name = "", ""
    window: AsynchronousWindow | None = None
    roles: list[RoleSelection] = []
    extended: list[ExtendedNegotiation] = []
    common: list[CommonExtendedNegotiation] = []
    identity: UserIdentity | None = None
    response: bytes | None = None
    for kind, value in _items(content, 0, budget):
        if kind == 0x51:
            (maximum_length,) = _unpacked(">I", value)
        elif kind == 0x52:
            class_uid = _uid_from(value)
        elif kind == 0x53:
            invoked, performed = _unpacked(">HH", value)
            window = AsynchronousWindow(invoked=invoked, performed=performed)
        elif kind == 0x54:
            roles.append(_role_from(value))
        elif kind == 0x55:
            version_name = value.decode("latin-1").strip(" \0")
        elif kind == 0x56:
            uid, rest = _take(value)
            extended.append(ExtendedNegotiation(sop_class_uid=_uid_from(uid), application_information=rest))
        elif kind == 0x57:
            common.append(_common_extended_from(value, budget))
        elif kind == 0x58:
            identity = _identity_from(value)
        elif kind == 0x59:
            response, _ = _take(value)
    return UserInformation(
        # absent: PS3.8 D.1 says nothing; the library everyone tests with takes it as unlimited
        maximum_length=maximum_length or 0,
        implementation_class_uid=class_uid,
        implementation_version_name=version_name,
        asynchronous_window=window,
        roles=tuple(roles),
        extended=tuple(extended),
        common_extended=tuple(common),
        identity=identity,
        identity_response=response,
    )


def _unpacked(form: str, value: bytes) -> tuple[int, ...]:
    if len(value) != struct.calcsize(form):
        raise InvalidPdu(f"a user information item has {len(value)} bytes, {struct.calcsize(form)} are needed")
    return struct.unpack(form, value)


def _take(value: bytes) -> tuple[bytes, bytes]:
    """A field with its length before it, and what follows it."""
    if len(value) < 2:
        raise InvalidPdu("a field has no length")
    (length,) = struct.unpack_from(">H", value)
    if length > len(value) - 2:
        raise InvalidPdu(f"a field says it has {length} bytes, {len(value) - 2} are left")
    return value[2 : 2 + length], value[2 + length :]


def _role_from(value: bytes) -> RoleSelection:
    uid, roles = _take(value)
    if len(roles) != 2 or max(roles) > 1:
        raise InvalidPdu("a role selection item whose roles are not two of 0 and 1")
    return RoleSelection(sop_class_uid=_uid_from(uid), scu=bool(roles[0]), scp=bool(roles[1]))


def _common_extended_from(value: bytes, budget: _Budget) -> CommonExtendedNegotiation:
    sop_class, rest = _take(value)
    service_class, rest = _take(rest)
    related, _ = _take(rest) if rest else (b"", b"")
    found: list[str] = []
    while related:
        budget.spend()
        uid, related = _take(related)
        found.append(_uid_from(uid))
    return CommonExtendedNegotiation(
        sop_class_uid=_uid_from(sop_class),
        service_class_uid=_uid_from(service_class),
        related_general_sop_class_uids=tuple(found),
    )


def _identity_from(value: bytes) -> UserIdentity:
    if len(value) < 2:
        raise InvalidPdu("a user identity item of fewer than 2 bytes")
    primary, rest = _take(value[2:])
    secondary, _ = _take(rest)
    return UserIdentity(kind=value[0], response_requested=bool(value[1]), primary=primary, secondary=secondary)
