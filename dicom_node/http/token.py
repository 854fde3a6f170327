"""Who may ask: a bearer token (RFC 6750), from the environment or a file that is taken in again when it changes."""

from __future__ import annotations

import hmac
import logging
import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from dicom_node.addresses import whose
from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, AuditTrail, NoAuditTrail, Participant
from dicom_node.errors import ConfigError
from dicom_node.private_files import read_private, stamp

__all__ = ["TOKEN_CHARACTERS_MIN", "BearerToken", "Doorman", "read_token"]

log = logging.getLogger(__name__)

TOKEN_CHARACTERS_MIN = 32  # of hexadecimal digits: 128 bits, which nobody guesses
TOKEN_CHARACTERS_MAX = 1024
ALERT_S = 60.0  # one alert for each address in this time, with how often it tried
ALERTS_MAX = 20  # in this time, of all addresses together
ADDRESSES_MAX = 256  # that are counted apart
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 2.1, b64token
_REMEDY = "make one with `openssl rand -hex 32`"


def read_token(env: str, file: Path | None) -> str:
    """The token as it is now. Raises ConfigError, which does not repeat it."""
    if env:
        where, text = f"http_token_env: {env}", os.environ.get(env, "")
        if not text:
            raise ConfigError(f"{where} is not set in the environment; set it to the token ({_REMEDY})")
    else:
        where = f"http_token_file: {file}"
        text = read_private("http_token_file", str(file), TOKEN_CHARACTERS_MAX).decode("latin-1").strip("\r\n")
    if len(text) < TOKEN_CHARACTERS_MIN:
        raise ConfigError(f"{where} holds {len(text)} characters, expected at least {TOKEN_CHARACTERS_MIN}; {_REMEDY}")
    if len(text) > TOKEN_CHARACTERS_MAX or not _TOKEN.fullmatch(text):
        raise ConfigError(f"{where} is no token: expected one line of letters, digits and -._~+/; {_REMEDY}")
    return text


class BearerToken:
    """The token that is asked for. A changed file is taken in at the next request; a bad one leaves the old in force.

    Raises ConfigError when there is none to begin with.
    """

    def __init__(self, env: str, file: Path | None) -> None:
        self._env, self._file = env, file
        self._guard = threading.Lock()
        self._seen = self._stamp()
        self._digest = sha256(read_token(env, file).encode()).digest()

    def fits(self, authorization: str) -> bool:
        """Whether this Authorization header carries it; takes as long for any other."""
        scheme, _, told = authorization.partition(" ")
        digest = sha256(told.strip(" ").encode("latin-1", "replace")).digest()
        return hmac.compare_digest(digest, self._current()) and scheme.lower() == "bearer"

    def _current(self) -> bytes:
        with self._guard:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._digest = sha256(read_token(self._env, self._file).encode()).digest()
                    log.info("the token of HTTP was taken in again")
                except ConfigError as exc:
                    log.error("the token of HTTP cannot be taken in; the old one stays", extra={"error": str(exc)})
            return self._digest

    def _stamp(self) -> tuple[int, ...]:
        if self._file is None:
            return ()
        try:
            return stamp(self._file)
        except OSError:
            return (0,)


class Doorman:
    """Lets requests in that carry the token, all where there is none; tells the audit trail of the others.

    One alert for each address and minute, with how many refusals came before it, and few in all: nobody floods the
    trail, from however many addresses.
    """

    def __init__(
        self,
        token: BearerToken | None,
        audit: AuditTrail | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._token = token
        self._audit = audit or NoAuditTrail()
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._refused: OrderedDict[str, tuple[float, int]] = OrderedDict()  # address: last alert, refusals since
        self._told_at: deque[float] = deque(maxlen=ALERTS_MAX)

    @property
    def asks(self) -> bool:
        """Whether a token is needed at all."""
        return self._token is not None

    def lets_in(self, authorization: str | None, address: str) -> bool:
        """Whether this request is served. A request without any token is refused, and is no alarm."""
        if self._token is None:
            return True
        if authorization is None:
            return False
        if self._token.fits(authorization):
            return True
        self._alert(address)
        return False

    def _alert(self, address: str) -> None:
        now = self._monotonic()
        with self._guard:
            at, since = self._refused.get(whose(address), (float("-inf"), 0))
            full = len(self._told_at) == ALERTS_MAX and now - self._told_at[0] < ALERT_S
            due = now - at >= ALERT_S and not full
            if due:
                self._told_at.append(now)
            self._refused[whose(address)] = (now, 0) if due else (at, since + 1)
            self._refused.move_to_end(whose(address))
            while len(self._refused) > ADDRESSES_MAX:
                self._refused.popitem(last=False)
        if not due:
            return
        detail = "HTTP: wrong bearer token" + (f", and {since} times since the last alert" if since else "")
        log.warning("a wrong token was refused", extra={"address": address, "before": since})
        self._audit.record(
            AuditEvent(
                kind=AuditKind.SECURITY_ALERT,
                outcome=AuditOutcome.SERIOUS_FAILURE,
                participants=(Participant(host=address, is_requestor=True),),
                detail=detail,
            )
        )
