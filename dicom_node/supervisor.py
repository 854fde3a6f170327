"""The first process: binds the ports once, starts the others, restarts what dies, stops everything.

It opens no catalog, a process of its own does so for it (`recovery`), and serves nothing itself, so what a peer sends
cannot hurt it. A lock on the data folder keeps a second node out; each child holds a second one, so that after a crash
a new node does not begin while a child of the old one still writes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from dicom_node.auditing import AlertType, AuditEvent, AuditKind, AuditOutcome
from dicom_node.bells import new_bell
from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, is_loopback
from dicom_node.errors import ConfigError, NodeError
from dicom_node.lifeline import deaf_to_interrupts, role_environment
from dicom_node.model import BootTime
from dicom_node.places import Places, new_places
from dicom_node.process import Orders, encode_orders, wait_for_children
from dicom_node.pulse import Pulse, beat, read_pulse, receiver_roles, run_folder
from dicom_node.recovery import Recovery
from dicom_node.store.lock import data_lock
from dicom_node.trails import ClosableTrail, changed_settings, close_trail, configuration_event, life_event, node_trail

__all__ = ["serve"]

log = logging.getLogger(__name__)

START_S = 120.0  # all children ready within, else the start has failed
PORT_S = 10.0  # after a kill: a child that was just launched holds the ports until it sees that nobody orders it about
STOP_S = 15.0  # then SIGKILL: whatever is left is repeated after the next start
POLL_S = 0.05
BACKOFF_S = 0.2
BACKOFF_MAX_S = 30.0
UNWELL_S = 60.0  # a started child without a good sign of life for this long is killed and started again
LOOK_S = 0.5
TIDY_PAUSE_S = 5.0
TIDY_S = 20.0  # for ending the associations of a dead receiver; nothing is watched meanwhile
STEADY_S = 60.0  # a child that lived this long starts anew with the shortest back-off
BACKLOG = 256
ARENAS = "2"  # heaps of the C library: threads that come and go leave some memory behind in each, up to 8 a processor
_STOP = {int(signal.SIGTERM), int(signal.SIGINT)}
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


@dataclass(slots=True)
class _Child:
    role: str
    listener: socket.socket | None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failures: int = 0
    start_at: float = 0.0
    restarts: int = 0
    pulse_at: BootTime | None = None  # of the last pulse seen of this process
    unwell_s: float = 0.0  # observed without a good pulse
    receiver: int = -1  # its number, -1 for the others
    epoch: str = ""  # of a receiver that runs, for its associations
    tls_listener: socket.socket | None = None
    metrics_listener: socket.socket | None = None


def serve(config: NodeConfig, say: Callable[[str], None]) -> int:
    """Run the node until SIGTERM or SIGINT; `say` gets the one line that tells it is ready.

    Raises ConfigError (port taken, folder not writable or in use by another node; peers, users, rules or engines that
    are wrong), StorageError, NodeError (a child cannot start). Returns the exit status: 0 for a clean stop.
    """
    os.umask(0o077)
    config = replace_data_dir(config)
    with _Signals() as signals, contextlib.ExitStack() as stack:
        dicom, http = (stack.enter_context(_socket(host)) for host in (config.host, config.http_host))
        tls_port = config.tls.port if config.tls is not None else None
        tls = stack.enter_context(_socket(config.host)) if tls_port is not None else None
        metrics = stack.enter_context(_socket(config.monitoring_host())) if config.metrics_port is not None else None
        supervisor = _Supervisor(config, dicom, http, signals, tls, metrics)
        try:
            # Whoever sends waits for the receivers: they load their modules while the catalog is recovered
            supervisor.launch_receivers()
            recovery = stack.enter_context(contextlib.closing(Recovery(config)))
            stack.enter_context(data_lock(config.data_dir))
            until_s = time.monotonic() + (PORT_S if _was_killed(config) else 0.0)
            _bind(dicom, config.host, config.dicom_port, "dicom_port", until_s)
            if tls is not None and tls_port is not None:
                _bind(tls, config.host, tls_port, "tls.port", until_s)
            _bind(http, config.http_host, config.http_port, "http_port", until_s)
            if metrics is not None and config.metrics_port is not None:
                _bind(metrics, config.monitoring_host(), config.metrics_port, "metrics_port", until_s)
            supervisor.prepare(recovery)
            supervisor.start_receivers()
            recovery.check()  # may be slow: images are taken meanwhile
            recovery.close()
            supervisor.start()
            if supervisor.wait_until_ready():
                say(ready_line(config, dicom, http, tls, metrics))
                supervisor.watch()
        finally:
            supervisor.stop()
    return 0


def replace_data_dir(config: NodeConfig) -> NodeConfig:
    """The same settings with an absolute data folder, which exists. Raises ConfigError."""
    try:
        config.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise ConfigError(f"data_dir: {config.data_dir} cannot be made: {exc.strerror}; name another one") from exc
    return config.model_copy(update={"data_dir": config.data_dir.resolve()})


def ready_line(
    config: NodeConfig,
    dicom: socket.socket,
    http: socket.socket,
    tls: socket.socket | None = None,
    metrics: socket.socket | None = None,
) -> str:
    """One line: where the node answers, and who can reach it. `tls`, `metrics`: where these have ports of their own."""
    titles = "/".join(config.ae_titles)
    where = f"DICOM {titles} on {_address(dicom)}"
    if tls is not None:
        where += f" and, over TLS, on {_address(tls)}"
    elif config.tls is not None:
        where += " over TLS"
    where += f", HTTP on {_address(http)}"
    if metrics is not None:
        where += f" (/ready and /metrics on {_address(metrics)})"
    if is_loopback(config.host):
        reach = "only this machine can reach it (to open it set `host` and list `peers` in the configuration)"
    elif config.peers:
        reach = f"reachable from other machines by {len(config.peers)} configured peer(s)"
    elif config.allow_any_peer:
        reach = "ANYBODY who reaches this address may use it (allow_any_peer)"
    else:
        reach = "reachable from other machines by whoever has a certificate of tls.ca"
    return f"dicom-node ready: {where}; {reach}"


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _socket(host: str) -> socket.socket:
    """To be bound later: a child inherits it before the folder is known to be ours."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in host:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def _was_killed(config: NodeConfig) -> bool:
    """Whether an earlier node on this folder did not stop by itself: a process of it may be about to end."""
    pulse = read_pulse(config.data_dir, "supervisor")
    return pulse is not None and pulse.detail != "stopped"


def _bind(made: socket.socket, host: str, port: int, key: str, until_s: float) -> None:
    """Until then a port that is taken may still be that of an earlier node's last process."""
    try:
        while True:
            try:
                made.bind((host, port))
                made.listen(BACKLOG)
                return
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE or time.monotonic() > until_s:
                    raise
            time.sleep(POLL_S)
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "no such port"
        raise ConfigError(f"{key}: {host}:{port} cannot be bound: {reason}; choose another (0 = any free one)") from exc


class _Signals:
    """Signals as something to wait for. Handlers and a pipe, not a mask: libraries have threads that mask nothing."""

    def __enter__(self) -> _Signals:
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = {number: signal.signal(number, _nothing) for number in _SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read_end)
        os.close(self._write_end)

    def wait(self, seconds: float) -> set[int]:
        """The signals that came, at most `seconds` from now."""
        select.select([self._read_end], [], [], seconds)
        try:
            return set(os.read(self._read_end, 512))
        except BlockingIOError:
            return set()


def _nothing(*_: object) -> None:
    """The pipe tells."""


class _Supervisor:
    """Starts, watches and stops the children. Single-threaded but for the audit trail's own writer."""

    def __init__(
        self,
        config: NodeConfig,
        dicom: socket.socket,
        http: socket.socket,
        signals: _Signals,
        tls: socket.socket | None = None,
        metrics: socket.socket | None = None,
    ) -> None:
        self._config = config
        self._signals = signals
        self._clock = SystemClock()
        self._dicom, self._http, self._tls, self._metrics = dicom, http, tls, metrics
        self._has_begun = False
        receivers = receiver_roles(config.receivers)
        self._children = [
            *(
                _Child(role=role, listener=dicom, receiver=number, tls_listener=tls)
                for number, role in enumerate(receivers)
            ),
            _Child(role="service", listener=http, metrics_listener=metrics),
            _Child(role="work", listener=None),
        ]
        self._places_fd = new_places(len(receivers), len(config.peers)) if len(receivers) > 1 else -1
        self._bells = (new_bell(), new_bell())
        self._epochs_to_close, self._close_at = False, 0.0
        self._began_at = self._clock.wall().isoformat()
        self._audit: ClosableTrail | None = None  # from the moment the folder is known to be ours

    # --- start

    def prepare(self, recovery: Recovery) -> None:
        """Migrate the catalog, mend what a crash left, empty the run folder. Raises ConfigError, StorageError."""
        wait_for_children(self._config.data_dir)
        recovery.recover()
        was_killed = _was_killed(self._config)
        run = run_folder(self._config.data_dir)
        shutil.rmtree(run, ignore_errors=True)
        (run / "metrics").mkdir(parents=True)
        self._beat("starting")
        self._has_begun = True  # what an earlier node left there said how that one ended
        self._audit = node_trail(self._config, "supervisor", self._clock)
        if self._config.audit is not None and (changed := changed_settings(self._config)):
            more = f" and {len(changed) - 20} more" if len(changed) > 20 else ""
            self._audit.record(
                configuration_event(
                    f"settings differ from the last start: {', '.join(changed[:20])}{more}",
                    alert_type=AlertType.SECURITY_CONFIGURATION,
                )
            )
        if was_killed:
            self._tell_death("the node died")
        self._audit.record(life_event(AuditKind.APPLICATION_STARTED))

    def _tell_death(self, who: str) -> None:
        if self._audit is not None:
            self._audit.record(
                AuditEvent(
                    kind=AuditKind.SECURITY_ALERT,
                    outcome=AuditOutcome.SERIOUS_FAILURE,
                    detail=f"{who}: transfers that had begun there are not told as ended",
                    alert_type=AlertType.SOFTWARE_CONFIGURATION,
                )
            )

    def start(self) -> None:
        """Start the others."""
        for child in self._children:
            if child.process is None:
                self._spawn(child)

    def launch_receivers(self) -> None:
        """Let them load their modules. They do nothing and touch nothing before they get their orders."""
        for child in self._children:
            if child.receiver >= 0:
                self._launch(child)

    def start_receivers(self) -> None:
        """Give them their orders. Raises NodeError when one has ended already."""
        for child in self._children:
            if child.receiver >= 0:
                self._order(child)

    def _spawn(self, child: _Child) -> None:
        self._launch(child)
        self._order(child)

    def _launch(self, child: _Child) -> None:
        listeners = (child.listener, child.tls_listener, child.metrics_listener)
        fds = [listener.fileno() for listener in listeners if listener]
        if child.receiver < 0:
            fds += self._bells
        elif self._places_fd >= 0:
            fds.append(self._places_fd)
        with deaf_to_interrupts():
            child.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dicom_node.process", child.role],
                stdin=subprocess.PIPE,
                pass_fds=fds,
                env=self._environment(child),
            )

    def _environment(self, child: _Child) -> dict[str, str]:
        found = role_environment(PROMETHEUS_MULTIPROC_DIR=str(run_folder(self._config.data_dir) / "metrics"))
        if child.role != "work":  # where threads are few, and what they compute is large
            found.setdefault("MALLOC_ARENA_MAX", ARENAS)
        return found

    def _order(self, child: _Child) -> None:
        is_receiver = child.receiver >= 0
        child.epoch = uuid.uuid4().hex if is_receiver else ""
        orders = Orders(
            config=self._config,
            supervisor_pid=os.getpid(),
            listen_fd=child.listener.fileno() if child.listener else -1,
            tls_listen_fd=child.tls_listener.fileno() if child.tls_listener else -1,
            metrics_listen_fd=child.metrics_listener.fileno() if child.metrics_listener else -1,
            ports=self._ports(),
            receiver_number=max(child.receiver, 0),
            places_fd=self._places_fd if is_receiver else -1,
            epoch=child.epoch,
            service_bell=-1 if is_receiver else self._bells[0],
            work_bell=-1 if is_receiver else self._bells[1],
            migrated=child.restarts == 0,
        )
        child.started = time.monotonic()
        child.pulse_at, child.unwell_s = None, 0.0
        assert child.process is not None and child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.process.stdin as pipe:
            pipe.write(encode_orders(orders))

    def _ports(self) -> tuple[int, int]:
        return int(self._dicom.getsockname()[1]), int(self._http.getsockname()[1])

    def wait_until_ready(self) -> bool:
        """True once every child is ready; False when a signal asked to stop. Raises NodeError when one cannot start."""
        deadline = time.monotonic() + START_S
        while not all(self._is_ready(child) for child in self._children):
            if self._signals.wait(POLL_S) & _STOP:
                return False
            for child in self._children:
                status = child.process.poll() if child.process else None
                if status is not None:
                    raise NodeError(f"the {child.role} process ended with status {status} while starting; see the log")
            if time.monotonic() > deadline:
                waiting = ", ".join(child.role for child in self._children if not self._is_ready(child))
                raise NodeError(f"not ready after {START_S:g} s: {waiting}; see the log")
        self._beat("ready")
        return True

    def _is_ready(self, child: _Child) -> bool:
        pulse = read_pulse(self._config.data_dir, child.role)
        return pulse is not None and child.process is not None and pulse.pid == child.process.pid and pulse.ok

    # --- watch

    def watch(self) -> None:
        """Restart what dies, until SIGTERM or SIGINT; SIGHUP goes on to the service process."""
        looked = time.monotonic()
        while True:
            caught = self._signals.wait(LOOK_S)
            if caught & _STOP:
                log.info("stop asked for")
                return
            if signal.SIGHUP in caught:
                self._pass_on(signal.SIGHUP, "service")
            now = time.monotonic()
            # Only time in which pulses could be seen counts: not while the disk is full and nobody can write one, nor
            # while this process was itself stopped
            observed_s = min(now - looked, 2 * LOOK_S) if self._beat("ready") else 0.0
            looked = now
            for child in self._children:
                self._look_after(child, observed_s)
            if self._epochs_to_close and now >= self._close_at and all(child.process for child in self._children):
                self._close_dead_associations()

    def _look_after(self, child: _Child, observed_s: float) -> None:
        now = time.monotonic()
        if child.process is not None and (status := child.process.poll()) is not None:
            child.process = None
            child.failures = 0 if now - child.started > STEADY_S else child.failures + 1
            pause = _pause_before(child)
            log.error("a process ended", extra={"role": child.role, "status": status, "restart_in_s": pause})
            if child.receiver >= 0:
                self._receiver_died(child)
        if child.process is None and now >= child.start_at:
            self._restart(child)
        elif child.process is not None:
            self._feel_pulse(child, child.process, observed_s)

    def _restart(self, child: _Child) -> None:
        child.restarts += 1
        try:
            self._spawn(child)
        except OSError as exc:  # no memory, no process left: the others go on, and there may be later
            child.failures += 1
            pause = _pause_before(child)
            extra = {"role": child.role, "error": exc.strerror, "restart_in_s": pause}
            log.error("a process could not be started", extra=extra)
        self._beat("ready")

    def _feel_pulse(self, child: _Child, process: subprocess.Popen[bytes], observed_s: float) -> None:
        """Kill a child that lives but is stuck or stays unwell; what it had under way is repeated by the next one."""
        child.unwell_s += observed_s
        pulse = read_pulse(self._config.data_dir, child.role)
        if pulse is not None and pulse.pid == process.pid and pulse.at != child.pulse_at:
            child.pulse_at = pulse.at
            if pulse.ok:
                child.unwell_s = 0.0
        if child.unwell_s > (UNWELL_S if child.pulse_at else START_S):
            child.unwell_s = 0.0
            detail = pulse.detail if pulse is not None else ""
            log.error("a process is stuck and is killed", extra={"role": child.role, "detail": detail})
            process.kill()

    def _receiver_died(self, child: _Child) -> None:
        child.epoch = ""
        self._tell_death(f"receiver {child.receiver} died")
        if self._places_fd >= 0:
            Places(self._places_fd, child.receiver, len(self._config.peers)).leave()
        self._epochs_to_close = True

    def _close_dead_associations(self) -> None:
        """End what dead receivers had open; those that live are not touched."""
        try:
            with contextlib.closing(Recovery(self._config)) as recovery:
                recovery.end_associations({child.epoch for child in self._children if child.epoch}, TIDY_S)
            self._epochs_to_close = False
        except (NodeError, OSError) as exc:  # tried again, at a price: a process is begun for it
            self._close_at = time.monotonic() + TIDY_PAUSE_S
            log.error("associations of the dead receiver stay open", extra={"error": str(exc)})

    def _pass_on(self, number: signal.Signals, role: str) -> None:
        for child in self._children:
            if child.role == role and child.process is not None:
                child.process.send_signal(number)

    def _beat(self, detail: str) -> bool:
        now = self._clock.boot()
        pulse = Pulse(
            pid=os.getpid(),
            boot_id=now.boot_id,
            boot_s=now.seconds,
            started_at=self._began_at,
            ok=detail == "ready",
            detail=detail,
            facts={
                "dicom_port": self._ports()[0],
                "http_port": self._ports()[1],
                "tls_port": int(self._tls.getsockname()[1]) if self._tls is not None else None,
                "metrics_port": int((self._metrics or self._http).getsockname()[1]),
                "restarts": {child.role: child.restarts for child in self._children},
            },
        )
        return beat(self._config.data_dir, "supervisor", pulse)

    # --- stop

    def stop(self) -> None:
        """End every child: SIGTERM, then SIGKILL after STOP_S. Nothing is lost by it, only repeated."""
        alive = [child.process for child in self._children if child.process is not None]
        for process in alive:
            process.terminate()
            if process.stdin is not None:
                process.stdin.close()  # one that still waits for its orders gets none
        deadline = time.monotonic() + STOP_S
        for process in alive:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("a process did not stop in time and is killed", extra={"pid": process.pid})
                process.kill()
                process.wait(timeout=5.0)
        if self._audit is not None:
            self._audit.record(life_event(AuditKind.APPLICATION_STOPPED))
            close_trail(self._config, self._audit)
        if self._has_begun:
            self._beat("stopped")
        for fd in (*self._bells, *((self._places_fd,) if self._places_fd >= 0 else ())):
            os.close(fd)


def _pause_before(child: _Child) -> float:
    """Seconds until it is to be started again: longer after each failure."""
    pause: float = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** min(child.failures, 10))
    child.start_at = time.monotonic() + pause
    return pause
