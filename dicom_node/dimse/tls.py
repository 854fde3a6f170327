"""What TLS needs besides a socket: contexts by the BCP 195 profiles, keys that are kept well, files that change.

PS3.15 B.9 to B.13 bind DICOM to BCP 195, which is RFC 8996 and RFC 9325: TLS 1.2 with forward secrecy and authenticated
encryption, TLS 1.3, nothing older, no compression, no renegotiation. All of it by the standard library's `ssl`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from dicom_node.config import NodeConfig, TlsSettings
from dicom_node.errors import ConfigError
from dicom_node.model import TlsClient
from dicom_node.private_files import check_private, read_private

__all__ = [
    "Credentials",
    "check_tls",
    "client_context",
    "client_expiries",
    "failure",
    "fingerprint",
    "for_listener",
]

log = logging.getLogger(__name__)

_AEAD = "ECDHE+AESGCM:ECDHE+CHACHA20"  # RFC 9325 4.2
_AEAD_256 = "ECDHE+AESGCM+AES256:ECDHE+CHACHA20"  # PS3.15 B.11
_CIPHERS = {"bcp195": _AEAD, "bcp195-non-downgrading": _AEAD, "bcp195-extended": _AEAD_256}
_LEVEL = "@SECLEVEL=2:"  # of OpenSSL: 112 bits, RSA from 2048, no SHA-1 in signatures
_WARN_S = 30 * 24 * 3600.0
_REMIND_S = 24 * 3600.0
_MAX_PEM = 4 * 1024 * 1024
_MAX_PASSPHRASE = 256  # characters, of 4 bytes each
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
_SEQUENCE, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x17, 0x18, 0xA0


# --- contexts


def _server_context(settings: TlsSettings) -> ssl.SSLContext:
    """Raises ConfigError."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, settings.profile)
    context.num_tickets = 0  # a client that never reads would be reset over tickets it was never asked to take
    context.options |= ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
    _load_pair(
        context,
        "tls",
        str(settings.certificate),
        str(settings.key),
        settings.key_passphrase_env,
        str(settings.key_passphrase_file or ""),
    )
    if settings.ca is not None:
        _load_authorities(context, "tls.ca", str(settings.ca))
    context.verify_mode = ssl.CERT_REQUIRED if settings.client_auth == "required" else ssl.CERT_NONE
    return context


def _client_context(settings: TlsClient, where: str) -> ssl.SSLContext:
    """Certificate and name of the server are always verified. Raises ConfigError."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, settings.profile)
    if settings.certificate:
        _load_pair(
            context,
            where,
            settings.certificate,
            settings.key,
            settings.key_passphrase_env,
            settings.key_passphrase_file,
        )
    if settings.ca:
        _load_authorities(context, f"{where}.ca", settings.ca)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _context(protocol: int, profile: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(_LEVEL + _CIPHERS[profile])
    return context


def _load_pair(
    context: ssl.SSLContext, where: str, certificate: str, key: str, passphrase_env: str, passphrase_file: str
) -> None:
    _readable(f"{where}.certificate", certificate)
    check_private(f"{where}.key", key, kind="a PEM file")

    def passphrase() -> str:  # asked for only where the key is encrypted; without it OpenSSL would ask the terminal
        return _passphrase(where, passphrase_env, passphrase_file)

    try:
        context.load_cert_chain(certificate, key, passphrase)
    except ssl.SSLError as exc:
        raise ConfigError(
            f"{where}: {certificate} and {key} make no pair ({failure(exc)}); expected PEM files of a certificate and "
            "of its private key, and the key's right passphrase if it has one"
        ) from None
    except OSError as exc:
        raise ConfigError(f"{where}: {certificate} or {key} cannot be read: {exc.strerror}; name PEM files") from None


def _load_authorities(context: ssl.SSLContext, where: str, path: str) -> None:
    _readable(where, path)
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError):
        raise ConfigError(f"{where}: {path} holds no certificate; name a PEM file of the authorities") from None


def _readable(where: str, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_PEM)
    except OSError as exc:
        raise ConfigError(f"{where}: {path} cannot be read: {exc.strerror}; name a PEM file") from None


def _passphrase(where: str, variable: str, path: str) -> str:
    """At most what OpenSSL takes."""
    if variable:
        if found := os.environ.get(variable):
            return found[:_MAX_PASSPHRASE]
        raise ConfigError(f"{where}.key_passphrase_env: the variable {variable} is not set; set it to the passphrase")
    if path:
        content = read_private(f"{where}.key_passphrase_file", path, _MAX_PEM)
        return content[:_MAX_PASSPHRASE].decode("latin-1").rstrip("\r\n")
    raise ConfigError(
        f"{where}.key: it is encrypted; set key_passphrase_file, or key_passphrase_env to the name of a variable"
    )


def failure(exc: OSError) -> str:
    """Why TLS failed, in OpenSSL's words and none of the peer's."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {exc.verify_message}".rstrip(".")
    if isinstance(exc, ssl.SSLError) and exc.reason:
        reason = exc.reason.lower().replace("_", " ")
        version, is_alert, what = reason.partition(" alert ")  # "sslv3" there is the alert's age, not the connection's
        return f"the peer refused: {what}" if is_alert and version.startswith(("sslv", "tlsv")) else reason
    return exc.strerror or type(exc).__name__


def fingerprint(certificate: bytes | None) -> str:
    """SHA-256 of a certificate (DER), hexadecimal; '' for none."""
    return hashlib.sha256(certificate).hexdigest() if certificate else ""


# --- files that change


class Credentials:
    """A context made of `files`, and a new one when they change. Thread-safe.

    A change that makes no context is logged once and leaves the old one in force. Raises ConfigError when there is none
    to begin with. A certificate that ends within 30 days is logged, once a day.
    """

    def __init__(
        self, where: str, make: Callable[[], ssl.SSLContext], *, certificate: str = "", others: tuple[str, ...] = ()
    ) -> None:
        self._where, self._make, self._certificate = where, make, certificate
        self._files = (*((certificate,) if certificate else ()), *(file for file in others if file))
        self._guard = threading.Lock()
        self._seen = self._signature()
        self._reminded = -_REMIND_S
        self.told: Callable[[str], None] = lambda where: None  # when changed files came into force
        self.not_after = 0.0  # of the certificate in force, seconds since the epoch; 0: there is none
        self.context = self._made()
        self._remind()

    def look(self) -> None:
        """Take in files that have changed."""
        with self._guard:
            signature = self._signature()
            if signature != self._seen:
                self._seen = signature
                try:
                    self.context = self._made()
                except ConfigError as exc:
                    fields = {"where": self._where, "error": str(exc)}
                    log.error("changed TLS files cannot be used; the old ones stay", extra=fields)
                else:
                    self._reminded = -_REMIND_S
                    log.info("changed TLS files are in force", extra={"where": self._where})
                    self.told(self._where)
            self._remind()

    def _made(self) -> ssl.SSLContext:
        context = self._make()
        self.not_after = _first_end(self._certificate) if self._certificate else 0.0
        return context

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        def of(file: str) -> tuple[int, int, int] | None:
            try:
                found = Path(file).stat()
            except OSError:
                return None
            return found.st_mtime_ns, found.st_size, found.st_ino

        return tuple(of(file) for file in self._files)

    def _remind(self) -> None:
        left_s = self.not_after - time.time()
        if not self.not_after or left_s > _WARN_S or time.monotonic() - self._reminded < _REMIND_S:
            return
        self._reminded = time.monotonic()
        fields = {"where": self._where, "days_left": int(left_s / 86400)}
        if left_s > 0:
            log.warning("a TLS certificate ends soon: replace its files", extra=fields)
        else:
            log.error("a TLS certificate has ended: replace its files", extra=fields)


def for_listener(settings: TlsSettings) -> Credentials:
    """What the node shows to those who call it. Raises ConfigError."""
    return Credentials(
        "tls",
        lambda: _server_context(settings),
        certificate=str(settings.certificate),
        others=(str(settings.key), str(settings.ca or ""), str(settings.key_passphrase_file or "")),
    )


_clients: dict[TlsClient, Credentials] = {}  # as many as the configuration has
_clients_guard = threading.Lock()


def client_context(settings: TlsClient, where: str) -> ssl.SSLContext:
    """What an AE is called with, as its files are now. Raises ConfigError when they never could be used."""
    with _clients_guard:
        known = _clients.get(settings)
        if known is None:
            known = _clients[settings] = Credentials(
                where,
                lambda: _client_context(settings, where),
                certificate=settings.certificate,
                others=(settings.key, settings.ca, settings.key_passphrase_file),
            )
            return known.context
    known.look()
    return known.context


def check_tls(config: NodeConfig) -> None:
    """Raises ConfigError for the first certificate, key or authority that cannot be used."""
    if config.tls is not None:
        _server_context(config.tls)
    for name in config.destinations:
        settings = config.destination(name).tls
        if settings is not None:
            _client_context(settings, f"destinations.{name}.tls")
    for name, one in (config.audit.collectors if config.audit is not None else {}).items():
        if one.protocol == "tls" and (asked := config.client_tls(one.tls)) is not None:
            _client_context(asked, f"audit.collectors.{name}.tls")


# --- how long they hold


def client_expiries(config: NodeConfig) -> Iterator[tuple[str, float]]:
    """Destinations that are shown a certificate of their own, and its end, seconds since the epoch."""
    shown = str(config.tls.certificate) if config.tls is not None else ""
    for name in config.destinations:
        settings = config.destination(name).tls
        if settings is not None and settings.certificate not in ("", shown):
            try:
                yield name, _first_end(settings.certificate)
            except ConfigError:  # whoever calls the destination says so
                continue


def _first_end(path: str) -> float:
    """When the first certificate or one of its chain in a PEM file ends. Raises ConfigError."""
    text, ends, position = _readable("certificate", path), [], 0
    try:
        while (start := text.find(_BEGIN, position)) >= 0:
            position = text.index(_END, start) + len(_END)
            ends.append(_not_after(ssl.PEM_cert_to_DER_cert(text[start:position].decode("ascii"))))
        return min(ends)
    except (ValueError, IndexError):
        raise ConfigError(f"certificate: {path} holds no certificate that can be read; name a PEM file") from None


def _not_after(der: bytes) -> float:
    """RFC 5280 4.1: Certificate, tbsCertificate, [version], serial, algorithm, issuer, validity. Raises ValueError."""
    start, _, _ = _element(der, 0, _SEQUENCE)
    start, _, _ = _element(der, start, _SEQUENCE)
    if der[start] == _VERSION:
        _, start, _ = _element(der, start)
    for _ in ("serialNumber", "signature", "issuer"):
        _, start, _ = _element(der, start)
    start, _, _ = _element(der, start, _SEQUENCE)
    _, start, _ = _element(der, start)
    content, end, kind = _element(der, start)
    text = der[content:end].decode("ascii")
    if kind == _UTC_TIME:  # RFC 5280 4.1.2.5.1: 50 to 99 are of the last century
        text = ("19" if text[:2] >= "50" else "20") + text
    elif kind != _GENERALIZED_TIME:
        raise ValueError("a validity without time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _element(der: bytes, at: int, kind: int | None = None) -> tuple[int, int, int]:
    """Where the content of the DER element at `at` begins and ends, and its kind. Raises ValueError, IndexError."""
    found, length, start = der[at], der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    if (kind is not None and found != kind) or start + length > len(der):
        raise ValueError("no certificate")
    return start, start + length, found
