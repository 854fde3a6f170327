"""Audit messages on the wire (PS3.15 A.6, A.7): RFC 5424 in frames of RFC 5425 (TLS) or datagrams of RFC 5426."""

from __future__ import annotations

import fcntl
import select
import socket
import ssl
import struct
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

__all__ = ["Connection", "TlsConnection", "UdpConnection", "syslog_message"]

_NOTICE, _WARNING = 10 * 8 + 5, 10 * 8 + 4  # facility 10, security/authorization (A.6)
MSGID = "DICOM+RFC3881"
_BOM = b"\xef\xbb\xbf"  # RFC 5424 6.4: MSG is UTF-8
_ALERT = b'<EventID csd-code="110113"'
_SUCCESS = b'EventOutcomeIndicator="0"'
_MAX_SEQUENCE = 2147483647  # RFC 5424 7.3.1
CONNECT_S = 10.0
SEND_S = 30.0


def syslog_message(sequence: int, at: str, message: bytes, hostname: str) -> bytes:
    """One SYSLOG-MSG. `meta sequenceId` (RFC 5424 7.3.1) is the line's number in the local trail: a gap shows."""
    head = message[:1024]
    priority = _WARNING if _ALERT in head or _SUCCESS not in head else _NOTICE
    known_by = (sequence - 1) % _MAX_SEQUENCE + 1
    text = f'<{priority}>1 {at} {hostname} dicom-node - {MSGID} [meta sequenceId="{known_by}"] '
    return text.encode("ascii") + _BOM + message


class Connection(Protocol):
    """To one collector. Everything raises OSError when it is not, or no longer, to be had."""

    def send(self, messages: Sequence[bytes]) -> None:
        """Give them to the network."""
        ...

    def check(self) -> bool:
        """Whether everything sent has left this machine; raises when the collector has gone."""
        ...

    def close(self) -> None:
        """End it. Idempotent, raises nothing."""
        ...


class TlsConnection:
    """RFC 5425: each message after its length; the collector's certificate and name are verified by `context`."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext, server_name: str) -> None:
        plain = socket.create_connection((host, port), timeout=CONNECT_S)
        try:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._sock = context.wrap_socket(plain, server_hostname=server_name)
        except BaseException:
            plain.close()
            raise
        self._sock.settimeout(SEND_S)

    def send(self, messages: Sequence[bytes]) -> None:
        """See `Connection`."""
        self._sock.sendall(b"".join(b"%d %s" % (len(one), one) for one in messages))

    def check(self) -> bool:
        """See `Connection`. A collector says nothing: what comes is its end, or TLS's own."""
        self._sock.settimeout(0)
        try:
            while select.select([self._sock], [], [], 0)[0]:
                if not self._sock.recv(4096):
                    raise ConnectionResetError("the collector has closed the connection")
        except ssl.SSLWantReadError:
            pass
        finally:
            self._sock.settimeout(SEND_S)
        (unsent,) = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, b"\0\0\0\0"))
        return bool(unsent == 0)

    def close(self) -> None:
        """See `Connection`."""
        with suppress(OSError, ValueError):
            self._sock.settimeout(1.0)
            self._sock.unwrap()
        self._sock.close()


class UdpConnection:
    """RFC 5426: each message in a datagram of its own. Nobody says whether it came; ICMP may say that it did not."""

    def __init__(self, host: str, port: int) -> None:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        self._sock = socket.socket(family, kind, protocol)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            self._sock.settimeout(SEND_S)
            self._sock.connect(address)
        except BaseException:
            self._sock.close()
            raise

    def send(self, messages: Sequence[bytes]) -> None:
        """See `Connection`."""
        for one in messages:
            self._sock.send(one)

    def check(self) -> bool:
        """See `Connection`."""
        error = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "the collector's machine takes no datagrams there")
        return True

    def close(self) -> None:
        """See `Connection`."""
        self._sock.close()


Connect = Callable[[], Connection]
