"""One child of the supervisor: `python -m dicom_node.process ROLE`, told what to do on standard input.

The child dies with its parent (PR_SET_PDEATHSIG), leaves SIGINT to it, stops cleanly on SIGTERM and gives a sign of
life every second. What a role does is in `node`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError, NodeError
from dicom_node.interfaces import Clock
from dicom_node.lifeline import tied_to
from dicom_node.logs import setup_logging
from dicom_node.pulse import Pulse, beat
from dicom_node.recovery import ROLE, run_recovery

__all__ = ["EXIT_ERROR", "Facts", "Orders", "Part", "adopted", "counted", "encode_orders", "main", "wait_for_children"]

log = logging.getLogger(__name__)

BEAT_S = 1.0
EXIT_ERROR = 2
CHILDREN_LOCK = "children.lock"
CHILDREN_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the supervisor tells a child. `listen_fd` is an inherited listening socket, -1 for none.

    For receivers only: `tls_listen_fd`, that of `tls.port`, -1 where TLS has no port of its own; `receiver_number` from
    0, the same after each restart; `places_fd`, what several of them know of each other (`places.Places`), -1 where
    there is one; `epoch`, under which this life of the process opens associations. For service and work:
    `service_bell` and `work_bell` (`bells.Bell`), -1 for none. For service: `metrics_listen_fd`, that of
    `metrics_port`, -1 where there is none.
    """

    config: NodeConfig
    supervisor_pid: int
    listen_fd: int = -1
    tls_listen_fd: int = -1
    metrics_listen_fd: int = -1
    ports: tuple[int, int] = (0, 0)  # DICOM, HTTP: as really bound
    receiver_number: int = 0
    places_fd: int = -1
    epoch: str = ""
    service_bell: int = -1
    work_bell: int = -1
    migrated: bool = False  # the catalog, just now: not where a process is started again


Facts = tuple[bool, str, Mapping[str, Any]]  # ok, detail, facts


class Part(Protocol):
    """A running role."""

    def health(self) -> Facts:
        """ok, detail, facts: goes into the pulse every second. Must not block."""
        ...

    def reload(self) -> None:
        """SIGHUP."""
        ...

    def stop(self) -> None:
        """End cleanly within a few seconds."""
        ...


def adopted(orders: Orders) -> socket.socket:
    """The listening socket the supervisor bound."""
    return socket.socket(fileno=orders.listen_fd)


def encode_orders(orders: Orders) -> bytes:
    """For the child's standard input; the configuration never stands on a command line."""
    plain = {
        "config": orders.config.model_dump(mode="json"),
        "supervisor_pid": orders.supervisor_pid,
        "listen_fd": orders.listen_fd,
        "tls_listen_fd": orders.tls_listen_fd,
        "metrics_listen_fd": orders.metrics_listen_fd,
        "ports": orders.ports,
        "receiver_number": orders.receiver_number,
        "places_fd": orders.places_fd,
        "epoch": orders.epoch,
        "service_bell": orders.service_bell,
        "work_bell": orders.work_bell,
        "migrated": orders.migrated,
    }
    return json.dumps(plain).encode()


def _read_orders() -> Orders:
    """Waits for them. The process ends where the supervisor ended, or changed its mind, before it gave any."""
    text = sys.stdin.buffer.read()
    if not text:
        os._exit(EXIT_ERROR)
    return _decode_orders(text)


def _decode_orders(text: bytes) -> Orders:
    plain = json.loads(text)
    return Orders(
        config=NodeConfig.model_validate(plain["config"]),
        supervisor_pid=plain["supervisor_pid"],
        listen_fd=plain["listen_fd"],
        tls_listen_fd=plain["tls_listen_fd"],
        metrics_listen_fd=plain["metrics_listen_fd"],
        ports=tuple(plain["ports"]),
        receiver_number=plain["receiver_number"],
        places_fd=plain["places_fd"],
        epoch=plain["epoch"],
        service_bell=plain["service_bell"],
        work_bell=plain["work_bell"],
        migrated=plain["migrated"],
    )


def main(argv: list[str] | None = None) -> int:
    """Run one role until SIGTERM. Returns the exit status."""
    role = (sys.argv[1:] if argv is None else argv)[0]
    if role == ROLE:
        return run_recovery()
    from dicom_node.node import part_class  # it imports classes from here

    asked = _Asked()
    signal.signal(signal.SIGTERM, asked.to_stop)
    signal.signal(signal.SIGHUP, asked.to_reload)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is blocked here, but what plug-ins begin may unblock it
    make = part_class(role)  # while the supervisor prepares the data folder
    orders = _read_orders()
    if not tied_to(orders.supervisor_pid):
        os._exit(EXIT_ERROR)
    os.umask(0o077)
    setup_logging(orders.config.log_level, role)
    try:
        with counted(orders.config.data_dir):
            return _run(role, make, orders, asked)
    except NodeError as exc:
        log.critical("the process cannot run", extra={"role": role, "error": str(exc)})
        return EXIT_ERROR


class _Asked:
    """What signals asked for; `wake` is set by each."""

    def __init__(self) -> None:
        self.wake = threading.Event()
        self.stop = False
        self.reload = False

    def to_stop(self, *_: object) -> None:
        self.stop = True
        self.wake.set()

    def to_reload(self, *_: object) -> None:
        self.reload = True
        self.wake.set()


def _run(role: str, make: Callable[[Orders, Clock], Part], orders: Orders, asked: _Asked) -> int:
    clock = SystemClock()
    started_at = clock.wall().isoformat()
    part = make(orders, clock)
    try:
        while not asked.stop:
            ok, detail, facts = part.health()
            beat(orders.config.data_dir, role, _pulse(clock, started_at, ok, detail, facts))
            asked.wake.wait(BEAT_S)
            asked.wake.clear()
            if asked.reload:
                asked.reload = False
                part.reload()
        return 0
    finally:
        log.info("stopping", extra={"role": role})
        part.stop()
        beat(orders.config.data_dir, role, _pulse(clock, started_at, False, "stopped", {}))


def _pulse(clock: Clock, started_at: str, ok: bool, detail: str, facts: Mapping[str, Any]) -> Pulse:
    now = clock.boot()
    return Pulse(
        pid=os.getpid(),
        boot_id=now.boot_id,
        boot_s=now.seconds,
        started_at=started_at,
        ok=ok,
        detail=detail,
        facts=facts,
    )


@contextmanager
def counted(data_dir: Path) -> Iterator[None]:
    """Show that a process of a node works on this folder, for `wait_for_children`."""
    fd = os.open(data_dir / CHILDREN_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


def wait_for_children(data_dir: Path) -> None:
    """Wait until no process of an earlier node works on this folder. Raises ConfigError when one stays too long."""
    fd = os.open(data_dir / CHILDREN_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + CHILDREN_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"data_dir: a process of an earlier node still works on {data_dir}; end it first"
                    ) from None
                time.sleep(0.05)
    finally:
        os.close(fd)


if __name__ == "__main__":
    from dicom_node.process import main as run  # the module under its own name: `node` imports its classes too

    sys.exit(run())
