"""What every engine behind HTTP can be told, and how an adapter reads its `options` without repeating a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dicom_node.errors import ConfigError

__all__ = ["HttpSettings", "Options", "parse_options"]

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?)(:[0-9]{1,5})?")

Seconds = Annotated[float, Field(gt=0)]


def _base_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_ok = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_ok or not value.isascii():
        raise ValueError("expected http(s)://host[:port][/path]")
    if "@" in parts.netloc or parts.query or parts.fragment or "?" in value or "#" in value:
        raise ValueError("no user, password, query or fragment belongs here; name credentials as env: or file:")
    return value.rstrip("/")


def _host(value: str) -> str:
    host = value.lower()
    if not _HOST.fullmatch(host):
        raise ValueError("expected host or host:port, an IPv6 address in brackets")
    return host


def _verify(value: Any) -> Any:
    if value is True or (isinstance(value, str | Path) and str(value) not in ("", ".")):
        return value
    raise ValueError("TLS is always verified: true, or the path of a file or folder of authorities (PEM)")


class Options(BaseModel):
    """The base of an adapter's options: frozen, no unknown keys, and errors that do not quote what was given."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)


class HttpSettings(Options):
    """How an engine is reached over HTTP. Proxies of the environment are never used."""

    base_url: Annotated[str, AfterValidator(_base_url)]
    verify: Annotated[Literal[True] | Path, BeforeValidator(_verify)] = True
    """true: the authorities of the operating system; a path: those and no others."""
    connect_timeout_s: Seconds = 5.0
    """To look the name up and to connect; as much again for the TLS handshake."""
    read_timeout_s: Seconds = 120.0
    """Longest silence while an answer is awaited or received."""
    write_timeout_s: Seconds = 60.0
    """Longest time without progress while a request is sent."""
    total_timeout_s: Seconds = 900.0
    """Of one call with its waiting and its retries, when the caller names none."""
    max_response_bytes: Annotated[int, Field(gt=0)] = 256 * 1024**2
    """Of an answer that is held in memory."""
    max_download_bytes: Annotated[int, Field(gt=0)] = 8 * 1024**3
    """Of an answer that is written to a file, when the caller names no bound."""
    calls_per_s: Seconds | None = None
    """Most calls per second, retries included; null = no limit."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 2
    """Most calls at a time."""
    allow_hosts: tuple[Annotated[str, AfterValidator(_host)], ...] = ()
    """`host` or `host:port` that redirects and URLs handed out by the engine may name although they lead to a private
    address or use plain http; other URLs must be https and lead to a public address."""
    retries: Annotated[int, Field(ge=0, le=20)] = 4
    """Of calls that may be repeated, after the first try."""
    backoff_s: Seconds = 0.5
    backoff_max_s: Seconds = 30.0
    retry_after_max_s: Seconds = 60.0
    """A Retry-After beyond this is not sat out: the call fails as unavailable and the job comes back later."""
    breaker_failures: Annotated[int, Field(ge=1)] = 5
    """After this many failures in a row nothing is sent for `breaker_rest_s`, then one call tries."""
    breaker_rest_s: Seconds = 30.0


Block = TypeVar("Block", bound=BaseModel)


def parse_options(block: type[Block], engine: str, options: Mapping[str, Any]) -> Block:
    """The `options` of engine `engine` as `block`. Raises ConfigError that names the key and never the value."""
    try:
        return block.model_validate(dict(options))
    except ValidationError as exc:
        error = exc.errors(include_input=False, include_context=False, include_url=False)[0]
        key = ".".join(("engines", engine, "options", *(str(part) for part in error["loc"])))
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            known = ", ".join(sorted(block.model_fields)) if len(error["loc"]) == 1 else "see the README"
            message = f"unknown key; known: {known}"
        raise ConfigError(f"{key}: {message}") from None  # the cause holds the values
