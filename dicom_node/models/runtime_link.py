"""One life of a runtime process, seen from the work process: several requests on one socket, and is it alive?

A thread of its own reads what the child says, hands answers to those who wait for them and kills a child that has
work and gives no sign of life. Must not import torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicom_node.errors import EngineCrashed, EngineError, EngineUnavailable
from dicom_node.models.wire import Array, receive, send, shared_array

__all__ = ["Call", "Child", "DeviceFault", "Limits"]

log = logging.getLogger(__name__)

POLL_S = 0.25  # how often silence is looked at, and waiting askers beat
_STOP_S = 2.0
_STOPPED_S = 4 * POLL_S
_MOST_PATIENCE = 10.0  # times hang_s: what a child may ask for, which knows how long its batches take
_LOAD_FACTOR = 3.0  # loading a network may be silent for so many times longer than a batch of windows


class DeviceFault(EngineUnavailable):
    """The device cannot be used, whatever is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of a runtime process. `memory_bytes` of loaded networks, 0: a share of the device.

    `hang_s`: a child that has work and is silent so long is killed. It speaks between batches of windows, so this
    bounds one batch; a child that found a batch of its network to be slow gets more. `start_s`: until it first says
    something. `models_dir`: where the node installs models, in the folder of its data, of which the process can read
    nothing else (`sandbox`); "" where there is no such data. `trusted_code`: digests of the Python that packages may
    run.
    """

    memory_bytes: int = 0
    hang_s: float = 120.0
    start_s: float = 120.0
    models_dir: str = ""
    trusted_code: frozenset[str] = frozenset()


@dataclass(slots=True, eq=False)
class Call:
    """A request under way. When `done` is set one of `answer` and `failure` is there."""

    identity: int
    done: threading.Event = field(default_factory=threading.Event)
    answer: tuple[Mapping[str, Any], Sequence[int]] | None = None
    failure: EngineError | None = None
    sent: bool = False
    left: bool = False  # its asker went away


class Child:
    """A started runtime process. Thread-safe.

    `on_end(reason)` is called once, from the reading thread, when it ended and was not closed: died, hung, device
    (it said its device is at fault) or nonsense.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        sock: socket.socket,
        device: str,
        limits: Limits,
        on_end: Callable[[str], None],
    ) -> None:
        self.device, self.kind = device, ""
        self._process, self._socket, self._limits, self._on_end = process, sock, limits, on_end
        self._guard = threading.Lock()
        self._calls: dict[int, Call] = {}
        self._serving: frozenset[int] = frozenset()
        self._reason = ""
        self._sign, self._patience_s = time.monotonic(), limits.start_s
        self.models: tuple[tuple[str, str], ...] = ()
        sock.settimeout(POLL_S)
        self._reader = threading.Thread(target=self._read, name="runtime-reader", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int | None:
        """Process id, None when it ended."""
        return self._process.pid if self.alive and self._process.poll() is None else None

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return not self._reason and self._reader.is_alive()

    @property
    def calls(self) -> int:
        """Requests under way that somebody waits for."""
        with self._guard:
            return sum(call.sent and not call.left for call in self._calls.values())

    @property
    def serving(self) -> frozenset[int]:
        """The requests it said it works on: several only when they go through the network together."""
        with self._guard:
            return self._serving

    # --- asking

    def ask(self, message: Mapping[str, Any], array: Array) -> Call:
        """Send a request. Raises EngineUnavailable when the child is gone."""
        call = Call(int(message["id"]))
        with self._guard:
            if self._reason:
                raise self._gone()
            if not self._calls and self.kind:  # it had nothing to say before
                self._sign = time.monotonic()
            self._calls[call.identity] = call
        try:
            self._send(message, array)
        except OSError as exc:
            with self._guard:
                self._calls.pop(call.identity, None)
                if isinstance(exc, ConnectionError):  # it is dead: seen here before the reading thread saw it
                    self._reason = self._reason or "died"
            if self._reason:
                raise self._gone() from exc
            raise EngineUnavailable(f"the input cannot be handed to the runtime ({exc.strerror or exc})") from exc
        call.sent = True
        return call

    def _gone(self) -> EngineUnavailable:
        if not self.kind and self._reason in ("died", "hung"):
            return DeviceFault(f"the runtime process on {self.device!r} {self._reason} before it was ready")
        return EngineUnavailable("the runtime process is gone")

    def _send(self, message: Mapping[str, Any], array: Array) -> None:
        fd = shared_array(array)
        try:
            send(self._socket, message, [fd])
        finally:
            os.close(fd)

    def leave(self, call: Call) -> None:
        """Nobody waits for it any more: the child stops it at its next breath."""
        with self._guard:
            call.left = True
            if call.identity not in self._calls:  # answered meanwhile
                for fd in call.answer[1] if call.answer else ():
                    os.close(fd)
                return
        with contextlib.suppress(OSError):  # it is gone: the reader sees that
            send(self._socket, {"cancel": call.identity})

    # --- the reading thread

    def _read(self) -> None:
        reason, looked = "died", time.monotonic()
        while True:
            try:
                received = receive(self._socket)
            except TimeoutError:
                slept_s, looked = time.monotonic() - looked, time.monotonic()
                if self._silent(slept_s):
                    reason = "hung"
                    break
                continue
            except ValueError:
                reason = "nonsense"
                break
            if received is None:
                break
            if not self._understood(*received):
                reason = "nonsense"
                break
            looked = time.monotonic()
        self._ended(reason)

    def _silent(self, slept_s: float) -> bool:
        with self._guard:
            if slept_s > _STOPPED_S:  # this process stood still (a stopped machine): the child may have, too
                self._sign += slept_s
            patience_s = self._patience_s
            waited = [call for call in self._calls.values() if call.identity in self._serving]
            if waited and all(call.left for call in waited):  # nobody wants it: the others need not wait for it
                patience_s = min(patience_s, self._limits.hang_s)
            return bool(self._calls) and time.monotonic() - self._sign > patience_s

    def _understood(self, message: Mapping[str, Any], fds: Sequence[int]) -> bool:
        """Take a message in; False for one that makes no sense, as a package that took the child over may send."""
        try:
            self._take(message, fds)
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            log.warning(
                "the runtime process talks nonsense", extra={"device": self.device, "error": type(exc).__name__}
            )
            return False
        return True

    def _take(self, message: Mapping[str, Any], fds: Sequence[int]) -> None:
        with self._guard:
            self._sign, self._patience_s = time.monotonic(), self._limits.hang_s
            if "ready" in message or "serving" in message:
                for fd in fds:
                    os.close(fd)
            if "ready" in message:
                self.kind = str(message["ready"])
                return
            if "serving" in message:
                self._serving = frozenset(message["serving"])
                asked_s = min(float(message["patience"]), _MOST_PATIENCE * self._limits.hang_s)
                self._patience_s = max(self._patience_s, asked_s)
                if message["stage"] == "load":
                    self._patience_s *= _LOAD_FACTOR
                return
            call = self._calls.pop(int(message["id"]), None)
            self._serving -= {int(message["id"])}
            self.models = tuple((str(model), str(version)) for model, version in message.get("loaded", self.models))
            if call is None or call.left:
                for fd in fds:
                    os.close(fd)
                return
            call.answer = message, fds
            call.done.set()

    def _ended(self, reason: str) -> None:
        with self._guard:
            self._reason = self._reason or reason
            reason = self._reason
        self._socket.close()
        status = self._buried()
        with self._guard:
            calls, self._calls = list(self._calls.values()), {}
        if reason not in ("closed", "stale"):
            log.warning("runtime process ended", extra={"device": self.device, "reason": reason, "status": status})
            self._on_end(reason)
        for call in calls:
            call.failure = self._failure(call, reason, status)
            call.done.set()

    def _buried(self) -> int:
        """End the process for certain; its exit status."""
        patience_s = _STOP_S if self._reason == "closed" else 0.5 if self._reason == "died" else 0.0
        try:
            return self._process.wait(timeout=patience_s)  # it may have ended by itself: keep its own status
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(timeout=30.0)

    def _failure(self, call: Call, reason: str, status: int) -> EngineError:
        how = f"died ({_how(status)})" if reason == "died" else f"ended ({reason})"
        if reason == "hung":
            how = f"hung: no sign of life for {self._patience_s:g} s, and was killed"
        if not self.kind and reason in ("died", "hung"):  # it never began
            return DeviceFault(f"the runtime process on {self.device!r} {how} before it was ready")
        if call.identity in self._serving and reason in ("died", "hung", "nonsense"):
            return EngineCrashed(f"the runtime process on {self.device!r} {how}")
        return EngineUnavailable(f"the runtime process on {self.device!r} {how}")

    # --- the end

    def end(self, reason: str) -> None:
        """Kill it (`closed`: let it end by itself within a moment); returns when it is gone."""
        with self._guard:
            self._reason = self._reason or reason
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reading thread, which does the rest
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=40.0)


def _how(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
