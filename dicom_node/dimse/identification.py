"""For which user an association is: User Identity Negotiation as acceptor (PS3.7 D.3.3.7).

Called for associations that were admitted, on their own thread, with no lock held. Whoever is not identified is
rejected with "rejected-permanent, service-user, no-reason-given": the Standard has no reason of its own for it (PS3.8
table 9-21), the AE title was recognised, and what exactly was wrong is nothing to tell somebody who guesses. Whoever
tries too often, or while too many others try, is rejected for the moment. Names are personal data: they go into the
audit trail and nowhere else.
"""

from __future__ import annotations

import hmac
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, AuditTrail, Participant
from dicom_node.config import UserIdentitySettings, is_loopback
from dicom_node.dimse.admission import TOO_OFTEN, Rejection
from dicom_node.dimse.policy import Policy
from dicom_node.dimse.rates import AddressBuckets
from dicom_node.dimse.upper_layer.pdus import UserIdentity
from dicom_node.dimse.users import MAX_NAME, UsersFile
from dicom_node.errors import ConfigError

if TYPE_CHECKING:  # its libraries are loaded only where tokens are taken
    from dicom_node.dimse.tokens import Tokens

__all__ = ["Identification", "Identified", "Unidentified", "check_users"]

log = logging.getLogger(__name__)

NOT_IDENTIFIED = Rejection(result=1, source=1, diagnostic=1, reason="user")
MAX_WAITING = 16  # for the one passcode that is checked at a time
WAIT_S = 10.0
MAX_REMEMBERED = 256
_KINDS = {1: "username", 2: "passcode", 5: "jwt"}
_FOREIGN = {3: "a Kerberos ticket", 4: "a SAML assertion"}


@dataclass(frozen=True, slots=True)
class Identified:
    """`user`: '' for nobody in particular. `response`: what the A-ASSOCIATE-AC is to carry, None for no such item."""

    user: str = field(default="", repr=False)
    response: bytes | None = None


@dataclass(frozen=True, slots=True)
class Unidentified:
    """`why` is for the log, and holds nothing that the peer sent."""

    why: str
    rejection: Rejection = NOT_IDENTIFIED


class Identification:
    """The policy of one configuration; None: nobody is asked. Raises ConfigError for files that cannot be used."""

    def __init__(
        self, settings: UserIdentitySettings | None, audit: AuditTrail, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._audit, self._clock = settings, audit, clock
        self._users = UsersFile(settings.users_file) if settings is not None and settings.users_file else None
        self._tokens = _tokens(settings)
        self._attempts = AddressBuckets(settings.attempts_per_minute if settings is not None else 1.0, clock)
        self._slot, self._room = threading.Lock(), threading.BoundedSemaphore(MAX_WAITING)
        self._secret = os.urandom(32)
        self._right: OrderedDict[bytes, tuple[float, int]] = OrderedDict()
        self._guard = threading.Lock()

    def judge(
        self, identity: UserIdentity | None, policy: Policy, *, calling: str, address: str, encrypted: bool
    ) -> Identified | Unidentified:
        """For whom it is. May wait for a passcode to be checked; records in the audit trail how it ended."""
        if self._settings is None or policy.identity == "off":
            return Identified()
        if identity is None:
            if policy.identity == "optional":
                return Identified()
            found: Identified | Unidentified = Unidentified("no user identity, and this peer must have one")
            name = ""
        else:
            found, name = self._judged(self._settings, identity, policy, address, encrypted=encrypted)
        self._record(found, name, calling, address, claims=identity is not None)
        return found

    def _judged(
        self, settings: UserIdentitySettings, identity: UserIdentity, policy: Policy, address: str, *, encrypted: bool
    ) -> tuple[Identified | Unidentified, str]:
        """And the name that was told, which nothing has to be true of."""
        kind = _KINDS.get(identity.kind, "")
        if kind not in settings.kinds:
            what = _FOREIGN.get(identity.kind) or kind or "an unknown kind of identity"
            taken = ", ".join(settings.kinds)
            return Unidentified(f"{what} is not taken here; the peer is to use one of: {taken}"), ""
        if kind != "username" and not (encrypted or settings.allow_plain or is_loopback(_bare(address))):
            return Unidentified(
                "a secret in clear: the peer is to use TLS, or user_identity.allow_plain is to be set"
            ), ""
        if kind == "jwt":
            found, name = self._by_token(identity, address)
        else:
            name = identity.primary.decode("utf-8", "replace").rstrip("\0 ")
            found = self._by_name(name, kind == "passcode", identity.secondary, address)
        if found is None and policy.users and name not in policy.users:
            found = Unidentified("a user who may not come from this peer")
        return found or Identified(name, b"" if identity.response_requested else None), name

    def _by_token(self, identity: UserIdentity, address: str) -> tuple[Unidentified | None, str]:
        assert self._tokens is not None
        attempts = self._attempts.of(address)
        if not attempts.takes():
            return Unidentified("too many attempts from this address", TOO_OFTEN), ""
        self._look(self._tokens.look)
        name, why = self._tokens.user(identity.primary)
        if why:
            return Unidentified(why), ""
        attempts.give_back()
        return None, name

    def _by_name(self, name: str, with_passcode: bool, passcode: bytes, address: str) -> Unidentified | None:
        assert self._users is not None
        self._look(self._users.look)
        if not with_passcode:
            return None if self._users.knows(name) else Unidentified("a user who is not known")
        generation = self._users.generation
        remembered = hmac.digest(self._secret, len(name).to_bytes(4, "big") + name.encode() + passcode, "sha256")
        if self._is_remembered(remembered, generation):
            return None
        if not self._attempts.of(address).takes():
            return Unidentified("too many attempts from this address", TOO_OFTEN)
        right = self._checked(name, passcode, lambda: self._is_remembered(remembered, generation))
        if right is None:
            return Unidentified("too many passcodes are being checked", TOO_OFTEN)
        if not right:
            return Unidentified("a user who is not known, or another passcode")
        self._attempts.of(address).give_back()
        self._remember(remembered, generation)
        return None

    def _checked(self, name: str, passcode: bytes, is_remembered: Callable[[], bool]) -> bool | None:
        """One at a time in a process, so that a flood costs one core at most. None when too many are before it.

        Of associations that ask at once with the same passcode only the first pays for it.
        """
        assert self._users is not None
        if not self._room.acquire(blocking=False):
            return None
        try:
            if not self._slot.acquire(timeout=WAIT_S):
                return None
            try:
                return is_remembered() or self._users.check(name, passcode)
            finally:
                self._slot.release()
        finally:
            self._room.release()

    def _is_remembered(self, digest: bytes, generation: int) -> bool:
        with self._guard:
            until, of = self._right.get(digest, (0.0, -1))
            return of == generation and self._clock() < until

    def _remember(self, digest: bytes, generation: int) -> None:
        assert self._settings is not None
        with self._guard:
            self._right[digest] = (self._clock() + self._settings.remembered_s, generation)
            self._right.move_to_end(digest)
            while len(self._right) > MAX_REMEMBERED:
                self._right.popitem(last=False)

    @staticmethod
    def _look(look: Callable[[], None]) -> None:
        try:
            look()
        except (ConfigError, OSError) as exc:  # what was read before holds on
            log.error("users or keys cannot be read", extra={"error": str(exc)})

    def _record(self, found: Identified | Unidentified, name: str, calling: str, address: str, *, claims: bool) -> None:
        peer = Participant(calling, address, name[:MAX_NAME], is_requestor=True)
        node = Participant(is_this_node=True)
        if isinstance(found, Identified):
            event = AuditEvent(AuditKind.USER_AUTHENTICATED, participants=(peer, node))
        else:
            failure = AuditOutcome.SERIOUS_FAILURE
            kind = (
                AuditKind.USER_AUTHENTICATED if claims else AuditKind.SECURITY_ALERT
            )  # A.5.3.12: also one that failed
            event = AuditEvent(kind, failure, participants=(peer, node), detail=found.why)
        self._audit.record(event)


def _tokens(settings: UserIdentitySettings | None) -> Tokens | None:
    if settings is None or settings.jwt is None:
        return None
    from dicom_node.dimse.tokens import Tokens

    return Tokens(settings.jwt)


def _bare(address: str) -> str:
    return address.partition("%")[0]


def check_users(settings: UserIdentitySettings | None) -> int | None:
    """How many users there are, None where there is no file. Raises ConfigError for files that cannot be used."""
    if settings is None:
        return None
    _tokens(settings)
    return len(UsersFile(settings.users_file)) if settings.users_file is not None else None
