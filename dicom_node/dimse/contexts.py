"""What the node agrees to when an association is negotiated. Pure: UIDs in, UIDs out; knows no library and no socket.

Owns the list of storage SOP classes and transfer syntaxes of the Standard (PS3.6 annex A), the order of preference
among the transfer syntaxes of one presentation context, and the rules of SCP/SCU role selection (PS3.7 D.3.3.4).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydicom._uid_dict import UID_dictionary

__all__ = [
    "GET_SOP_CLASSES",
    "MOVE_SOP_CLASSES",
    "NATIVE_SYNTAXES",
    "PATIENT_ROOT_FIND",
    "PATIENT_ROOT_GET",
    "PATIENT_ROOT_MOVE",
    "STORAGE_COMMITMENT",
    "STORAGE_SOP_CLASSES",
    "STUDY_ROOT_FIND",
    "STUDY_ROOT_GET",
    "STUDY_ROOT_MOVE",
    "TRANSFER_SYNTAXES",
    "VERIFICATION",
    "Acceptance",
    "Answer",
    "Proposal",
    "ProposedContext",
    "answer_contexts",
    "choose_transfer_syntax",
]

VERIFICATION = "1.2.840.10008.1.1"
STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"  # Push Model
PATIENT_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.1.1"
PATIENT_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.1.2"
PATIENT_ROOT_GET = "1.2.840.10008.5.1.4.1.2.1.3"
STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
STUDY_ROOT_MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.2.2.3"
FIND_SOP_CLASSES = frozenset({PATIENT_ROOT_FIND, STUDY_ROOT_FIND})
MOVE_SOP_CLASSES = frozenset({PATIENT_ROOT_MOVE, STUDY_ROOT_MOVE})
GET_SOP_CLASSES = frozenset({PATIENT_ROOT_GET, STUDY_ROOT_GET})
_SERVICE_SOP_CLASSES = FIND_SOP_CLASSES | MOVE_SOP_CLASSES | GET_SOP_CLASSES | {VERIFICATION}

EXPLICIT_LE = "1.2.840.10008.1.2.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_BE = "1.2.840.10008.1.2.2"
NATIVE_SYNTAXES = (EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE)

# SOP classes of the current Standard that are younger than the UID dictionary in use
_YOUNGER_SOP_CLASSES = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.66.7",  # Label Map Segmentation Storage
        "1.2.840.10008.5.1.4.1.1.66.8",  # Height Map Segmentation Storage
        "1.2.840.10008.5.1.4.1.1.9.100.1",  # Waveform Presentation State Storage
        "1.2.840.10008.5.1.4.1.1.9.100.2",  # Waveform Acquisition Presentation State Storage
    }
)
# "Storage" in the name, but no composite instances: the DICOMDIR and the storage commitment service
_NOT_STORED = ("1.2.840.10008.1.",)


def _storage_sop_classes() -> frozenset[str]:
    listed = {
        uid
        for uid, (name, kind, *_) in UID_dictionary.items()
        if kind == "SOP Class" and "Storage" in name and not uid.startswith(_NOT_STORED)
    }
    return frozenset(listed) | _YOUNGER_SOP_CLASSES


STORAGE_SOP_CLASSES = _storage_sop_classes()
"""Every storage SOP class of the Standard, retired ones included: old modalities still send them."""

_DEFLATED_IMAGE_FRAME = "1.2.840.10008.1.2.8.1"
_NATIVE_OR_DEFLATED = (
    EXPLICIT_BE,
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.1.98",  # Encapsulated Uncompressed Explicit VR Little Endian
    _DEFLATED_IMAGE_FRAME,
)
_LOSSLESS = tuple(
    f"1.2.840.10008.1.2.{suffix}"
    for suffix in ("4.57", "4.58", "4.65", "4.66", "4.70", "4.80", "4.90", "4.92", "4.110", "4.201", "4.202", "5")
)
_YOUNGER_TRANSFER_SYNTAXES = (
    "1.2.840.10008.1.2.4.110",  # JPEG XL Lossless
    "1.2.840.10008.1.2.4.111",  # JPEG XL JPEG Recompression
    "1.2.840.10008.1.2.4.112",  # JPEG XL
    _DEFLATED_IMAGE_FRAME,
)
# Not encodings of a data set that is sent by C-STORE: MIME and XML (retired, PS3.5 2018b), live video over
# SMPTE ST 2110 (PS3.22), and Papyrus 3
_NOT_FOR_STORAGE = ("1.2.840.10008.1.2.6.", "1.2.840.10008.1.2.7.", "1.2.840.10008.1.20")


def _ranks() -> dict[str, int]:
    listed = [uid for uid, (_, kind, *_) in UID_dictionary.items() if kind == "Transfer Syntax"]
    known = [uid for uid in (*listed, *_YOUNGER_TRANSFER_SYNTAXES) if not uid.startswith(_NOT_FOR_STORAGE)]
    ranks = dict.fromkeys(known, 4)  # what may have lost something, and what only refers to pixels (JPIP)
    ranks.update(dict.fromkeys(_LOSSLESS, 3))
    ranks.update(dict.fromkeys(_NATIVE_OR_DEFLATED, 2))
    ranks.update({IMPLICIT_LE: 1, EXPLICIT_LE: 0})
    return ranks


_RANK: Mapping[str, int] = _ranks()
TRANSFER_SYNTAXES = frozenset(_RANK)
"""Every transfer syntax of the Standard in which a C-STORE may come."""


def choose_transfer_syntax(offered: Iterable[str]) -> str | None:
    """The syntax the node takes of those in one presentation context, or None when it knows none of them.

    Explicit VR Little Endian, Implicit VR Little Endian, other native or deflated, lossless, lossy; within one of
    these groups the requestor's own order decides. JPEG 2000, HTJ2K and JPEG XL "may be lossy" count as lossy.
    """
    return min((uid for uid in offered if uid in _RANK), key=_RANK.__getitem__, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposedContext:
    """One context to propose; `as_scp`: the node wants to be SCP in it (C-GET, reports of storage commitment)."""

    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]
    as_scp: bool = False


# --- answering a request -------------------------------------------------------------------------------------------

# PS3.8 table 9-18
ACCEPTED = 0x00
USER_REJECTION = 0x01
ABSTRACT_SYNTAX_NOT_SUPPORTED = 0x03
TRANSFER_SYNTAXES_NOT_SUPPORTED = 0x04


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One proposed presentation context. `scu`, `scp`: the roles the requestor asked for, None without a role item."""

    context_id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]
    scu: bool | None = None
    scp: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to one proposal; `result` as in PS3.8 table 9-18.

    `requestor_scp`: the node may send C-STORE requests in this context (C-GET). `role_reply` is the (SCU, SCP) pair
    of the role selection item to answer with, None when none was asked for.
    """

    proposal: Proposal
    result: int
    transfer_syntax: str
    requestor_scu: bool = True
    requestor_scp: bool = False
    role_reply: tuple[bool, bool] | None = None
    denied: bool = False  # the node could, and this peer may not


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Which abstract syntaxes the node takes: the Standard's, these more, or (by configuration) unknown ones too.

    `commits`: storage commitment may be asked of the node, `is_told`: it may be reported to the node, by this peer.
    `services` and `sop_classes` are what this peer may ask for, and store; None = everything.
    """

    extra_sop_classes: Collection[str] = ()
    unknown_sop_classes: bool = False
    commits: bool = False
    is_told: bool = False
    services: Collection[str] | None = None
    sop_classes: Collection[str] | None = None

    def serves(self, service: str) -> bool:
        """Whether this peer may ask for it."""
        return self.services is None or service in self.services

    def takes(self, sop_class_uid: str) -> bool:
        """Whether this peer may store instances of a SOP class that the node stores."""
        return self.serves("store") and (self.sop_classes is None or sop_class_uid in self.sop_classes)

    def stores(self, abstract_syntax: str) -> bool:
        """Whether the node stores instances of this SOP class."""
        if abstract_syntax in STORAGE_SOP_CLASSES or abstract_syntax in self.extra_sop_classes:
            return True
        return self.unknown_sop_classes and abstract_syntax not in UID_dictionary


def answer_contexts(proposals: Sequence[Proposal], acceptance: Acceptance) -> list[Answer]:
    """One answer for each proposal, in the order of their context ids."""
    return [_answer(proposal, acceptance) for proposal in sorted(proposals, key=lambda item: item.context_id)]


def _answer(proposal: Proposal, acceptance: Acceptance) -> Answer:
    first = proposal.transfer_syntaxes[0] if proposal.transfer_syntaxes else IMPLICIT_LE
    storage = acceptance.stores(proposal.abstract_syntax)
    commitment = proposal.abstract_syntax == STORAGE_COMMITMENT and (acceptance.commits or acceptance.is_told)
    if not storage and not commitment and proposal.abstract_syntax not in _SERVICE_SOP_CLASSES:
        return Answer(proposal=proposal, result=ABSTRACT_SYNTAX_NOT_SUPPORTED, transfer_syntax=first)
    offered = proposal.transfer_syntaxes
    if not storage:
        # Identifiers are small and decoded at once: a compressed or deflated one is only an attack surface
        offered = tuple(uid for uid in offered if uid in NATIVE_SYNTAXES)
    chosen = choose_transfer_syntax(offered)
    if chosen is None:
        return Answer(proposal=proposal, result=TRANSFER_SYNTAXES_NOT_SUPPORTED, transfer_syntax=first)
    asks = _may_ask(proposal.abstract_syntax, acceptance, storage=storage)
    without_roles = proposal.scu is None and proposal.scp is None
    if not asks and (without_roles or not (storage and acceptance.serves("get") and proposal.scp)):
        return Answer(proposal=proposal, result=USER_REJECTION, transfer_syntax=chosen, denied=True)
    if without_roles:
        return Answer(proposal=proposal, result=ACCEPTED, transfer_syntax=chosen)
    # PS3.7 D.3.3.4: a role may be turned down, never offered; the node sends to a requestor only stored instances, and
    # is told only by those it asks for storage commitment (PS3.4 J.3.3.1.3)
    scu = proposal.scu is not False and asks
    scp = bool(proposal.scp) and ((storage and acceptance.serves("get")) or commitment)
    if commitment:
        scu, scp = scu and acceptance.commits, scp and acceptance.is_told
    return Answer(
        proposal=proposal,
        result=ACCEPTED if scu or scp else USER_REJECTION,
        transfer_syntax=chosen,
        requestor_scu=scu,
        requestor_scp=scp,
        role_reply=(scu, scp),
    )


def _may_ask(abstract_syntax: str, acceptance: Acceptance, *, storage: bool) -> bool:
    """Whether this peer may be SCU of a SOP class that the node knows."""
    if storage:
        return acceptance.takes(abstract_syntax)
    for classes, service in (
        (FIND_SOP_CLASSES, "find"),
        (GET_SOP_CLASSES, "get"),
        (MOVE_SOP_CLASSES, "move"),
        ({VERIFICATION}, "echo"),
    ):
        if abstract_syntax in classes:
            return acceptance.serves(service)
    return True  # storage commitment: `commits` and `is_told` say
