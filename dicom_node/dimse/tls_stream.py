"""TLS over a connected socket that stays as it is: blocking, with the kernel's timeouts, shut down by other threads.

Has what an association uses of a socket, under the same names and with the same meaning: `recv_into` raises
BlockingIOError when nothing came in time, `sendmsg` writes all of its parts. OpenSSL sees memory only, so no wait
happens inside it; one call of the system reads several records, and one sends what many values make.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from dicom_node.dimse.link import SEND_S
from dicom_node.dimse.sending import send_all
from dicom_node.dimse.tls import failure

__all__ = ["TlsStream"]

RAW = 64 * 1024  # of what is read from, or written to, the socket at once: the memory each connection keeps
SHORT = 16 * 1024  # parts below share a record


class _Raw(threading.local):
    """For what came and is not yet decrypted; one for each thread, not for each connection."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RAW))


_raw = _Raw()


class TlsStream:
    """One side of a TLS connection. From one thread at a time, but `shutdown(SHUT_RD)`, which any thread may call."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_name: str | None = None, send_s: float = SEND_S
    ) -> None:
        self._sock, self._send_s = sock, send_s
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._poll: select.poll | None = None
        self._has_more = False  # may have, decrypted or not, in memory: the socket knows nothing of it
        self._is_open = self._was_closed = False
        self.has_begun = False
        self.trouble = ""  # why a record could not be had: an alert of the peer's, most often

    # --- handshake

    def shake(self) -> bool:
        """One step of the handshake, waiting for nothing; True when it is done. Raises OSError when it fails."""
        try:
            received = self._sock.recv_into(_raw.view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return self._step(received, socket.MSG_DONTWAIT)

    def shake_hands(self, timeout_s: float) -> None:
        """All of the handshake. Raises OSError when it fails or takes longer; the socket's timeout is changed."""
        deadline = time.monotonic() + timeout_s
        with suppress(ssl.SSLWantReadError):  # the client speaks first
            self._tls.do_handshake()
        self._send_out()
        while True:
            left = deadline - time.monotonic()
            if left <= 0.0:
                raise TimeoutError("the TLS handshake took too long")
            self._sock.settimeout(left)
            if self._step(self._sock.recv_into(_raw.view)):
                return

    def _step(self, received: int, flags: int = 0) -> bool:
        if not received:
            raise ConnectionResetError("closed in the TLS handshake")
        self.has_begun = True
        self._incoming.write(_raw.view[:received])
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        else:
            self._is_open = self._has_more = True  # the peer may have gone on at once
            return True
        finally:  # also the alert that says why it failed
            if self._outgoing.pending and self._sock.send(out := self._outgoing.read(), flags) < len(out):
                raise ConnectionResetError("the peer does not read")

    def peer_certificate(self) -> bytes | None:
        """The peer's, verified (DER); None where it has shown none, or none was asked for."""
        return self._tls.getpeercert(binary_form=True)

    @property
    def version(self) -> str:
        """TLSv1.2 or TLSv1.3."""
        return self._tls.version() or ""

    # --- what an association uses of a socket

    def recv_into(self, view: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """What came, of at most one read of the socket; 0 at the end. Raises OSError; BlockingIOError: nothing yet.

        That is also raised when a part of a record came: whoever waits looks at its own deadlines then.
        """
        received = self._decrypt(view) if self._has_more else None
        if received is None:
            raw = _raw.view
            came = self._sock.recv_into(raw, 0, flags)
            if not came:  # OpenSSL is not told: it would fail for it, and our last word could not be sent
                return 0
            self._incoming.write(raw[:came])
            received = self._decrypt(view)
            if self._outgoing.pending:  # the answer to a change of keys
                self._send_out()
            if received is None:
                raise BlockingIOError
        return received

    def _decrypt(self, view: memoryview) -> int | None:
        """What is in memory, as much as `view` takes; 0 at the end, None when there is no whole record."""
        done, size = 0, len(view)
        try:
            while done < size:
                count = self._tls.read(size - done, view[done:])  # of one record at most
                if not count:
                    break
                done += int(count)
        except ssl.SSLWantReadError:
            self._has_more = False
            return done or None
        except ssl.SSLZeroReturnError:  # close_notify: the next read says so again
            pass
        except ssl.SSLError as exc:
            self.trouble = failure(exc)
            if not done:
                raise
        self._has_more = True
        return done

    def ready(self, timeout_ms: float) -> bool:
        """Whether `recv_into` may have something within that time: to be asked instead of polling the socket."""
        if self._has_more:
            return True
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self._sock, select.POLLIN)
        return bool(self._poll.poll(timeout_ms))

    def sendmsg(self, parts: Sequence[bytes | memoryview]) -> int:
        """All of `parts`; how many bytes that are. Raises OSError when the peer leaves no room for too long."""
        run: list[bytes | memoryview] = []
        size = total = 0
        for part in parts:
            length = len(part)
            total += length
            if length < SHORT and size < RAW:
                run.append(part)
                size += length
                continue
            self._encrypt(b"".join(run))
            self._encrypt(part)
            run, size = [], 0
        self._encrypt(run[0] if len(run) == 1 else b"".join(run))
        self._send_out()
        return total

    def sendall(self, data: bytes) -> None:
        """All of it, within the socket's timeout."""
        self.sendmsg([data])

    def send(self, data: bytes, flags: int = 0) -> int:
        """All of it or, where the socket has no room at once, a connection that cannot be used any more."""
        self._encrypt(data)
        out = self._outgoing.read()
        if self._sock.send(out, flags) < len(out):
            raise ConnectionResetError("the peer does not read")
        return len(data)

    def _encrypt(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), RAW):
            piece = view[start : start + RAW]
            while piece:
                piece = piece[self._tls.write(piece) :]
            if self._outgoing.pending >= RAW:
                self._send_out()

    def _send_out(self) -> None:
        if self._outgoing.pending:
            send_all(self._sock, [self._outgoing.read()], self._send_s)

    def fileno(self) -> int:
        """As of the socket."""
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        """As of the socket."""
        self._sock.setblocking(flag)

    def settimeout(self, seconds: float | None) -> None:
        """As of the socket."""
        self._sock.settimeout(seconds)

    def setsockopt(self, level: int, name: int, value: int | bytes) -> None:
        """As of the socket."""
        self._sock.setsockopt(level, name, value)

    def shutdown(self, how: int) -> None:
        """As of the socket; before no more is sent the peer is told so (close_notify), once."""
        if how != socket.SHUT_RD:
            self._close_notify()
        self._sock.shutdown(how)

    def close(self) -> None:
        """As of the socket, after a close_notify if there is room for one."""
        if self._sock.fileno() >= 0:
            self._close_notify()
            self._sock.close()

    def _close_notify(self) -> None:
        if self._was_closed or not self._is_open:
            return
        self._was_closed = True
        with suppress(OSError):
            self._tls.unwrap()  # its answer is not waited for
        with suppress(OSError):
            self._sock.send(self._outgoing.read(), socket.MSG_DONTWAIT)
