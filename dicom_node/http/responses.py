"""Answers, and the headers that all of them carry. Each ends its connection."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

__all__ = ["Response", "encoded", "head_of", "json_response", "refusal"]

# Nobody may keep an answer, guess at its kind, show it in a frame or run anything of it; no product or version is told
_ALWAYS: Mapping[str, str] = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_CONTROL = re.compile(r"[^\t\x20-\x7e\x80-\xff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A whole answer."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(status: HTTPStatus, value: object, **headers: str) -> Response:
    """`headers` by name with underscores for hyphens."""
    body = json.dumps(value).encode() + b"\n"
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response(status=status, content_type="application/json", body=body, headers=named)


def refusal(status: HTTPStatus, reason: str, **headers: str) -> Response:
    """Why not, in a few words."""
    return json_response(status, {"error": reason}, **headers)


def encoded(response: Response, *, with_body: bool = True) -> bytes:
    """The bytes of an answer; to HEAD without its body (RFC 9110 9.3.2)."""
    headers = {"Content-Type": response.content_type, "Content-Length": str(len(response.body)), **response.headers}
    return head_of(response.status, headers) + (response.body if with_body else b"")


def head_of(status: HTTPStatus, headers: Mapping[str, str]) -> bytes:
    """Status line and headers. What would end a header early is not written into one."""
    merged = {"Date": formatdate(usegmt=True), **_ALWAYS, **headers}
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{_CONTROL.sub('', name)}: {_CONTROL.sub('', value)}" for name, value in merged.items()]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
