"""The sockets under the engines' HTTP: where they may lead, how long they may wait, and a heartbeat all the while.

httpcore2 speaks HTTP/1.1 (RFC 9112) on streams this file gives it. Each blocking step is cut into slices; between two
of them the caller's heartbeat runs and the deadline of the whole call is looked at. A name is looked up once for each
connection, and what is connected to is the very address that was checked: a name that changes its mind (DNS
rebinding) gains nothing. Knows nothing of engines, retries or settings files.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import queue
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeVar

import httpcore2
import httpx2

from dicom_node.interfaces import Clock, Heartbeat

__all__ = ["Fault", "PinnedTransport", "Resolve", "Route", "Watch", "WireFault", "look_up", "straight"]

SLICE_S = 0.2
KEEP_IDLE_S = 20.0

Resolve = Callable[[str, int], Sequence[str]]
Route = Callable[[str, int], tuple[str, int]]
Value = TypeVar("Value")


class Fault(Enum):
    """How a call can fail below HTTP."""

    CONNECT = "cannot be reached"
    CERTIFICATE = "shows a certificate that is not accepted"
    FORBIDDEN = "leads to an address that is not public; if that is meant, name the host in allow_hosts"
    SILENT = "was silent for too long"
    BROKEN = "broke the connection"
    PROTOCOL = "does not speak HTTP as it should"
    OUT_OF_TIME = "was not done within the time of the call"


class WireFault(Exception):
    """A call failed below HTTP; `sent` is true when bytes of the request may have reached the other side."""

    def __init__(self, fault: Fault, *, sent: bool) -> None:
        super().__init__(fault.value)
        self.fault = fault
        self.sent = sent


class _OutOfTime(Exception):
    pass


class _Forbidden(Exception):
    pass


class _BadCertificate(Exception):
    pass


class Watch:
    """The time of one call and the heartbeat of the work it is part of. Belongs to one thread."""

    def __init__(self, clock: Clock, timeout_s: float, heartbeat: Heartbeat) -> None:
        self._clock = clock
        self._heartbeat = heartbeat
        self._deadline = self.now() + timeout_s
        self._beaten = float("-inf")
        self.sent = False

    def now(self) -> float:
        """Seconds on the boot clock."""
        return self._clock.boot().seconds

    def left_s(self) -> float:
        """Seconds until the call must be over; not below 0."""
        return max(self._deadline - self.now(), 0.0)

    def tick(self) -> None:
        """Beat if it is time. Raises what the heartbeat raises, and WireFault(OUT_OF_TIME)."""
        now = self.now()
        if now - self._beaten >= SLICE_S:
            self._beaten = now
            self._heartbeat()
        if now >= self._deadline:
            raise _OutOfTime

    def wait(self, seconds: float) -> None:
        """Sleep, beating. Raises as `tick` does."""
        until = self.now() + seconds
        self.tick()
        while (left_s := until - self.now()) > 0:
            self._clock.sleep(min(left_s, SLICE_S))
            self.tick()

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turns what the block raises about the wire into WireFault; anything else passes."""
        try:
            yield
        except _OutOfTime:
            raise WireFault(Fault.OUT_OF_TIME, sent=self.sent) from None
        except _Forbidden:
            raise WireFault(Fault.FORBIDDEN, sent=self.sent) from None
        except _BadCertificate as exc:
            raise WireFault(Fault.CERTIFICATE, sent=self.sent) from exc
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.PoolTimeout) as exc:
            raise WireFault(Fault.CONNECT, sent=self.sent) from exc
        except httpcore2.TimeoutException as exc:
            raise WireFault(Fault.SILENT, sent=self.sent) from exc
        except httpcore2.NetworkError as exc:
            raise WireFault(Fault.BROKEN, sent=self.sent) from exc
        except httpcore2.RemoteProtocolError as exc:  # its text quotes the peer, which may quote us: drop it
            fault = Fault.BROKEN if "disconnect" in str(exc) or "closed connection" in str(exc) else Fault.PROTOCOL
            raise WireFault(fault, sent=self.sent) from None
        except (httpcore2.ProtocolError, httpcore2.UnsupportedProtocol):
            raise WireFault(Fault.PROTOCOL, sent=self.sent) from None


def look_up(host: str, port: int) -> Sequence[str]:
    """The addresses of `host` as the system knows them, in its order. Raises OSError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label of more than 63 characters
        raise socket.gaierror(socket.EAI_NONAME, "no such name") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def straight(address: str, port: int) -> tuple[str, int]:
    """Where a checked address is reached: there."""
    return address, port


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, and no other kind of address wrapped into one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        # RFC 4291 2.4: global unicast; 6to4 (2002::/16) and Teredo (2001::/32) carry an IPv4 address of any kind
        if ip not in ipaddress.ip_network("2000::/3") or ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class PinnedTransport(httpx2.BaseTransport):
    """One pool of HTTP/1.1 connections, without proxies, cookies or redirects.

    `trusts(host, port)` says which places may be at any address; all others must be at a public one. `resolve` turns a
    name into addresses. Thread-safe: each thread sets its own `Watch` with `watched` around a call and its answer.
    """

    def __init__(
        self,
        tls: ssl.SSLContext,
        *,
        trusts: Callable[[str, int], bool],
        timeouts_s: tuple[float, float, float],
        connections: int,
        resolve: Resolve = look_up,
        route: Route = straight,
    ) -> None:
        """`timeouts_s`: to connect, to read, to write. `route` may send a checked address elsewhere (for tests)."""
        # at DEBUG it writes the headers of answers
        logging.getLogger("httpcore2").setLevel(logging.WARNING)
        self._backend = _Backend(trusts, resolve, route)
        connect_s, read_s, write_s = timeouts_s
        self._timeouts = {"connect": connect_s, "read": read_s, "write": write_s, "pool": connect_s}
        self._pool = httpcore2.ConnectionPool(
            tls,
            max_connections=connections + 1,
            max_keepalive_connections=connections,
            keepalive_expiry=KEEP_IDLE_S,
            network_backend=self._backend,
        )

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """Within: this thread's connections keep to `watch`; faults of the wire are raised as WireFault."""
        self._backend.current.watch = watch
        try:
            with watch.faults():
                yield
        finally:
            self._backend.current.watch = None

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send it as it is; the answer's stream must be closed. Only within `watched`."""
        assert isinstance(request.stream, httpx2.SyncByteStream)
        url = request.url
        answer = self._pool.handle_request(
            httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions={"timeout": self._timeouts},
            )
        )
        assert isinstance(answer.stream, Iterable)
        return httpx2.Response(answer.status, headers=answer.headers, stream=_Incoming(answer))

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()


class _Incoming(httpx2.SyncByteStream):
    def __init__(self, answer: httpcore2.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


class _Current(threading.local):
    watch: Watch | None = None


class _Backend(httpcore2.NetworkBackend):
    """Looks names up, checks addresses, connects."""

    def __init__(self, trusts: Callable[[str, int], bool], resolve: Resolve, route: Route) -> None:
        self._trusts = trusts
        self._resolve = resolve
        self._route = route
        self.current = _Current()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address that is allowed and answers, within `timeout` for all of them together."""
        watch = self.current.watch
        assert watch is not None and timeout is not None
        until = watch.now() + timeout
        addresses = self._addresses(host, port, watch, until)
        if not self._trusts(host, port):
            addresses = [address for address in addresses if is_public(address)]
            if not addresses:
                raise _Forbidden
        failure: OSError = OSError(errno.EADDRNOTAVAIL, "no address")
        for index, address in enumerate(addresses):
            share_s = max(until - watch.now(), 0.0) / (len(addresses) - index)
            try:
                sock = _connected(*self._route(address, port), watch, share_s)
            except OSError as exc:
                failure = exc
                continue
            return _Stream(sock, self.current)
        raise httpcore2.ConnectError(errno.errorcode.get(failure.errno or 0, "timeout")) from failure

    def _addresses(self, host: str, port: int, watch: Watch, until: float) -> Sequence[str]:
        """Looked up in a thread that is left behind when it takes too long: getaddrinfo knows no time-out.

        glibc gives up on its own, by default after 10 s for each server, which bounds how many can be left.
        """
        answers: queue.SimpleQueue[Sequence[str] | OSError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self._resolve(host, port))
            except OSError as exc:
                answers.put(exc)

        threading.Thread(target=ask, name="engine-look-up", daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=SLICE_S)
            except queue.Empty:
                watch.tick()
                if watch.now() >= until:
                    raise httpcore2.ConnectTimeout("the name was not looked up in time") from None
                continue
            if isinstance(answer, OSError):
                raise httpcore2.ConnectError("the name is not known") from answer
            return answer


def _connected(address: str, port: int, watch: Watch, timeout_s: float) -> socket.socket:
    """A connection to exactly this address. Raises OSError."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        code = sock.connect_ex(where)
        if code == errno.EINPROGRESS:
            code = _outcome(sock, watch, timeout_s)
        if code:
            raise OSError(code, errno.errorcode.get(code, "?"))
    except BaseException:
        sock.close()
        raise
    return sock


def _outcome(sock: socket.socket, watch: Watch, timeout_s: float) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    until = watch.now() + timeout_s
    while not poll.poll(SLICE_S * 1000):
        watch.tick()
        if watch.now() >= until:
            return errno.ETIMEDOUT
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


class _Stream(httpcore2.NetworkStream):
    """A connected socket whose waits are sliced. A step that timed out may be repeated with the same bytes, TLS too."""

    def __init__(self, sock: socket.socket, current: _Current) -> None:
        self._sock = sock
        self._current = current

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Some bytes; none at the end."""
        late, broken = httpcore2.ReadTimeout, httpcore2.ReadError
        return self._sliced(lambda: self._sock.recv(max_bytes), timeout, late, broken)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """All of it; `timeout` is for each piece the other side takes."""
        watch = self._current.watch
        if watch is not None and buffer:
            watch.sent = True
        left = memoryview(buffer)
        while left:
            piece = left
            taken = self._sliced(
                lambda piece=piece: self._sock.send(piece),  # type: ignore[misc]
                timeout,
                httpcore2.WriteTimeout,
                httpcore2.WriteError,
            )
            left = left[taken:]

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """The same connection under TLS, the certificate verified for `server_hostname`."""
        try:
            secured = ssl_context.wrap_socket(
                self._sock, server_hostname=server_hostname, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as exc:
            self.close()
            raise httpcore2.ConnectError("TLS cannot be started") from exc
        stream = _Stream(secured, self._current)
        try:
            stream._sliced(secured.do_handshake, timeout, httpcore2.ConnectTimeout, httpcore2.ConnectError)
        except BaseException:
            stream.close()
            raise
        return stream

    def _sliced(
        self,
        step: Callable[[], Value],
        timeout: float | None,
        late: type[httpcore2.TimeoutException],
        broken: type[httpcore2.NetworkError],
    ) -> Value:
        watch = self._current.watch
        assert watch is not None and timeout is not None
        began = watch.now()
        self._sock.settimeout(SLICE_S)
        while True:
            watch.tick()
            try:
                return step()
            except TimeoutError:
                if watch.now() - began >= timeout:
                    raise late("no progress") from None
            except ssl.SSLCertVerificationError as exc:
                raise _BadCertificate(exc.verify_message) from exc
            except OSError as exc:
                raise broken(type(exc).__name__) from exc

    def close(self) -> None:
        """Close it."""
        self._sock.close()

    def get_extra_info(self, info: str) -> Any:
        """What httpcore2 asks: whether TLS is spoken, and whether an idle connection was closed by the other side."""
        if info == "ssl_object":
            return self._sock if isinstance(self._sock, ssl.SSLSocket) else None
        if info == "is_readable":
            if self._sock.fileno() < 0:
                return True
            poll = select.poll()
            poll.register(self._sock, select.POLLIN)
            return bool(poll.poll(0))
        return None
