"""The head of a request, read strictly (RFC 9112): what two servers could read in two ways is refused.

Knows no socket. A head is judged while it comes (`judge`), so what is too long or no HTTP is refused before it ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

__all__ = ["BODY_BYTES_MAX", "HEADERS_MAX", "HEAD_BYTES_MAX", "LINE_BYTES_MAX", "BadRequest", "Request", "judge"]

LINE_BYTES_MAX = 4096  # of the request line
HEAD_BYTES_MAX = 16 * 1024
HEADERS_MAX = 64
BODY_BYTES_MAX = 1024**2  # no body is read; a longer one is refused where it is announced

_END = b"\r\n\r\n"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_TARGET = re.compile(r"[\x21-\x7e]+")
_ABSOLUTE = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_VERSION = re.compile(r"HTTP/([0-9])\.([0-9])")
# a line end that is half of one (RFC 9112 2.2), and what no head may hold
_BROKEN = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


class BadRequest(Exception):
    """A request that is not served; `reason` is for the client and repeats nothing it sent."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request without its body. `target` is in origin form; headers by lower-case name, repeated ones joined."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.split("?", 1)[0]


def judge(received: bytes) -> Request | None:
    """The request whose head `received` begins with, None while that is not whole. Raises BadRequest."""
    received = received[2:] if received.startswith(b"\r\n") else received  # RFC 9112 2.2: one empty line before it
    head, end, _ = received.partition(_END)
    line, line_end, _ = head.partition(b"\r\n")
    if len(line) > LINE_BYTES_MAX:
        raise BadRequest(HTTPStatus.REQUEST_URI_TOO_LONG, f"a request line has at most {LINE_BYTES_MAX} bytes")
    if _BROKEN.search(head):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "not an HTTP/1 request")
    if len(head) > HEAD_BYTES_MAX or head.count(b"\r\n") > HEADERS_MAX:
        raise BadRequest(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            f"headers have at most {HEAD_BYTES_MAX} bytes and are at most {HEADERS_MAX}",
        )
    if not end:
        if line_end:
            _request_line(line)
        return None
    method, target, minor = _request_line(line)
    headers = _headers(head[len(line) + 2 :])
    if minor and ("host" not in headers or ", " in headers["host"]):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "one Host header is needed")  # RFC 9112 3.2
    _check_body(headers)
    return Request(method=method, target=target, headers=headers)


def _request_line(line: bytes) -> tuple[str, str, int]:
    parts = line.decode("latin-1").split(" ")
    version = _VERSION.fullmatch(parts[-1])
    if len(parts) != 3 or version is None or not _TOKEN.fullmatch(parts[0]) or not _TARGET.fullmatch(parts[1]):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "not an HTTP/1 request")
    if version[1] != "1":
        raise BadRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.0 or HTTP/1.1")
    target = _ABSOLUTE.sub("", parts[1], count=1) if not parts[1].startswith("/") else parts[1]
    if not target.startswith("/"):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "the target is no path")
    return parts[0], target, int(version[2])


def _headers(lines: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in lines.decode("latin-1").split("\r\n") if lines else ():
        name, colon, value = line.partition(":")
        # RFC 9112 5.1, 5.2: no space before the colon, no folded lines
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadRequest(HTTPStatus.BAD_REQUEST, "a header is malformed")
        key, value = name.lower(), value.strip(" \t")
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found


def _check_body(headers: Mapping[str, str]) -> None:
    """RFC 9112 6.1, 6.3: how long a body is must be said in one way only."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if length is not None and (coding is not None or not re.fullmatch(r"[0-9]{1,18}", length)):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "the length of the body is not clear")
    if coding is not None and coding.lower() != "chunked":
        raise BadRequest(HTTPStatus.NOT_IMPLEMENTED, "no transfer coding but chunked is known")
    if length is not None and int(length) > BODY_BYTES_MAX:
        raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {BODY_BYTES_MAX} bytes")
