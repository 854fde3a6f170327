"""The service process: timers, courier, HTTP. Part of the composition root."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dicom_node.auditing import AuditOutcome
from dicom_node.backpressure import PROBE_S, DiskWatch, disk_facts, pressed_elsewhere
from dicom_node.bells import Bell
from dicom_node.deciding import keep_rules, kept_rules, node_router, node_rules, sender_warnings
from dicom_node.dimse.committing import DimseCommitment
from dicom_node.dimse.session import DimseSender
from dicom_node.dimse.wires import open_link
from dicom_node.errors import NodeError, RuleError
from dicom_node.gauges import catalog_readings, node_readings
from dicom_node.http.health import Check, HealthServer, Mount, ReadyCheck
from dicom_node.http.token import BearerToken, Doorman
from dicom_node.interfaces import Clock
from dicom_node.metrics import Gauges, Metrics, Reading, render
from dicom_node.node import Timers
from dicom_node.pipeline.commit import Committer
from dicom_node.pipeline.deliver import Courier
from dicom_node.process import Facts, Orders, adopted
from dicom_node.pulse import fresh, read_pulse, receiver_roles
from dicom_node.retaining import Retention
from dicom_node.routing.rules import RuleSet
from dicom_node.store.pressure import Grade
from dicom_node.trails import Forwarding, configuration_event, node_trail
from dicom_node.wiring import destinations, engine_workers, node_catalog

if TYPE_CHECKING:
    from dicom_node.handing_out import Shelving

__all__ = ["Service"]

log = logging.getLogger(__name__)

SHELF_S = 600.0
MIN_SWEEP_S = 0.02  # between two sweeps, however soon something is due


class Service:
    """Timers, courier, HTTP."""

    def __init__(self, orders: Orders, clock: Clock) -> None:
        config = orders.config
        self._config, self._clock = config, clock
        self._metrics = Metrics(config, process="service")
        self._audit = node_trail(config, "service", clock, self._metrics, self._patient_ids)
        self._rules_error = ""
        self._shelving: Shelving | None = None
        self._rules = self._first_rules()
        self._reloads = 0
        self._catalog = node_catalog(config, clock, migrated=orders.migrated)
        self._catalog.pressure.observer = self._metrics
        self._disk = DiskWatch(self._catalog.pressure, lambda: pressed_elsewhere(config, clock))
        self._router = node_router(self._catalog, config, lambda: self._rules, clock, self._metrics)
        commitment = DimseCommitment(config.delivery, config.ae_titles[0], open_link(config.wire))
        self._courier = Courier(
            self._catalog.queue,
            DimseSender(config.delivery, config.ae_titles[0], open_link(config.wire)),
            destinations(config),
            settings=config.delivery,
            clock=clock,
            observer=self._metrics,
            asker=commitment,
            audit=self._audit,
        )
        self._committer = Committer(
            self._catalog.queue,
            self._catalog.index,
            self._catalog.archive,
            commitment,
            config.committed_to(),
            config.ae_titles,
            settings=config.delivery,
            clock=clock,
        )
        self._http = self._servers(orders)
        self._retention = Retention(self._catalog, config, clock, self._metrics.study_deleted, audit=self._audit)
        self._bell, self._work_bell = Bell(orders.service_bell), Bell(orders.work_bell)
        self._sweeping = threading.Lock()
        self._timers = Timers(clock)
        self._timers.every(config.completion.tick_s, self._sweep)
        self._timers.every(PROBE_S, self._probe)
        self._timers.every(self._retention.tick_s, self._retention.tick)
        if self._shelving is not None:
            self._timers.every(SHELF_S, self._shelving.sweep)
        self._courier.start()
        self._committer.start()
        self._bell.answer(self._courier.wake)
        for server in self._http:
            server.start()
        self._forwarding = Forwarding(config, self._metrics)

    def _patient_ids(self, studies: Sequence[str]) -> Sequence[str]:
        return self._catalog.index.patient_ids(studies)

    def _servers(self, orders: Orders) -> Sequence[HealthServer]:
        """One, or two where /ready and /metrics have a port of their own. Raises ConfigError: there is no token."""
        config = self._config
        token = None
        if config.http_token_env or config.http_token_file:
            token = BearerToken(config.http_token_env, config.http_token_file)
        doorman = Doorman(token, self._audit)
        refused = self._metrics.http_refused
        pages: dict[str, Any] = {"checks": self._checks(), "metrics": self._page}
        pages |= {"doorman": doorman, "any_host": config.http_without_token}
        if orders.metrics_listen_fd < 0:
            return (HealthServer(adopted(orders), mounts=self._mounts(), refused=refused, **pages),)
        apart = socket.socket(fileno=orders.metrics_listen_fd)
        return (
            HealthServer(adopted(orders), mounts=self._mounts(), refused=refused),
            HealthServer(apart, refused=refused, **pages),
        )

    def _mounts(self) -> Mapping[str, Mount]:
        """What engines may ask of the HTTP port, where one of them does."""
        from dicom_node import handing_out  # not before it is known that engines are configured

        if not handing_out.is_needed(self._config):
            return {}
        queue = self._catalog.queue
        self._shelving = handing_out.Shelving(self._config, self._clock, queue.still_wanted)
        return handing_out.mounts(self._config, self._clock, queue.wake_job)

    def _sweep(self) -> None:
        """Route what is due; what will be before the next tick is not left to that."""
        if not self._sweeping.acquire(blocking=False):
            return
        try:
            if self._router.sweep():
                self._work_bell.ring()
                self._courier.wake()
            due_s = self._router.next_due_s
            if due_s is not None and (left_s := due_s - self._clock.boot().seconds) < self._config.completion.tick_s:
                self._timers.once(max(left_s, MIN_SWEEP_S), self._sweep)
        except Exception as exc:  # edge: the timer's tick; the next one tries again
            log.error("the completion sweep failed", exc_info=exc)
        finally:
            self._sweeping.release()

    def _probe(self) -> None:
        """A disk that fails is noticed while nothing is received, and one that is well again too."""
        if self._disk.is_probe_due():
            self._catalog.archive.probe()

    # --- rules

    def _first_rules(self) -> RuleSet:
        """The rules folder, else the rules last in force. Raises NodeError when neither can be had.

        `serve` refuses a broken folder before this process exists. So a folder that is broken here was broken while
        the node ran, and a restart of this process must not end routing, delivery and HTTP for that.
        """
        try:
            return self._read_rules()
        except NodeError as exc:
            self._refused(exc)
            return self._in_force(kept_rules(self._config))

    def _read_rules(self) -> RuleSet:
        rule_set = self._in_force(node_rules(self._config))
        for warning in sender_warnings(self._config, rule_set):
            log.warning("results of a rule may reach nobody", extra={"warning": warning})
        try:
            keep_rules(self._config, rule_set)
        except (OSError, ValueError, NodeError) as exc:  # the rules hold; only a restart would not find them again
            log.error("the rules in force could not be kept", extra={"error": str(exc)})
        return rule_set

    def _in_force(self, rule_set: RuleSet) -> RuleSet:
        self._metrics.rules_loaded([rule.name for rule in rule_set.rules])
        log.info("rules in force", extra={"digest": rule_set.digest, "rules": len(rule_set.rules)})
        return rule_set

    def reload(self) -> None:
        """Take the rules in again, whole or not at all: a broken set leaves the old one in force."""
        try:
            before, self._rules = self._rules.digest, self._read_rules()
            self._rules_error = ""
            same = " (as before)" if self._rules.digest == before else f", before {before[:12]}"
            self._audit.record(configuration_event(f"rules reloaded: digest {self._rules.digest[:12]}{same}"))
        except NodeError as exc:
            self._refused(exc)
            refused = configuration_event("rules reload refused: the old rules stay in force")
            self._audit.record(replace(refused, outcome=AuditOutcome.MINOR_FAILURE))
        self._reloads += 1

    def _refused(self, exc: NodeError) -> None:
        self._rules_error = str(exc)
        kind = "rule" if isinstance(exc, RuleError) else "folder"
        log.error("the rules cannot be taken in; the old ones stay", extra={"error": str(exc), "wrong": kind})

    # --- health

    def health(self) -> Facts:
        """Timers run; the rule set in force."""
        self._timers.follow_clock()
        facts = {
            "rules_digest": self._rules.digest,
            "rules": len(self._rules.rules),
            "rules_error": self._rules_error,
            "reloads": self._reloads,
            "destinations_up": dict(self._courier.up()),
            **disk_facts(self._catalog.pressure),
            "retention": self._retention.facts(),
        }
        self._disk.look()
        running = self._timers.running
        return running, "" if running else "the timers do not run", facts

    def _checks(self) -> tuple[ReadyCheck, ...]:
        def scp() -> Check:
            roles = receiver_roles(self._config.receivers)
            unwell = {role: why for role in roles if (why := self._unwell(role))}
            detail = "; ".join(f"{role}: {why}" if len(roles) > 1 else why for role, why in unwell.items())
            return Check(name="scp", ok=len(unwell) < len(roles), detail=detail)  # one that lives takes all that come

        def catalog() -> Check:
            self._catalog.database.write(lambda connection: None, timeout_s=5.0)
            return Check(name="catalog", ok=True)

        def disk() -> Check:
            pressed = self._disk.pressed()
            if pressed.grade >= Grade.REFUSING:
                return Check(name="disk", ok=False, detail=f"C-STORE is refused: {pressed.reason}")
            detail = f"background work pauses: {pressed.reason}" if pressed.grade is Grade.PAUSED else ""
            return Check(name="disk", ok=True, detail=detail)

        def workers() -> Check:
            if self._config.jobs.workers == 0:
                return Check(name="workers", ok=True, detail="none configured")
            alive = self._workers_alive()
            wanted = self._config.jobs.workers + 1 + sum(engine_workers(self._config).values())  # one: urgent jobs only
            return Check(name="workers", ok=alive > 0, detail=f"{alive} of {wanted}")

        def engines() -> Check:
            pulse = read_pulse(self._config.data_dir, "work")
            unusable = sorted(pulse.facts.get("unusable", {})) if pulse else []
            misbehaving = sorted(pulse.facts.get("misbehaving", {})) if pulse else []
            resting = [one["device"] for one in pulse.facts.get("runtimes", ()) if one["breaker"]] if pulse else []
            detail = f"cannot run, see status: {', '.join(unusable)}" if unusable else ""
            if resting:
                detail += f"{'; ' if detail else ''}the CPU does the work of {', '.join(resting)}"
            if misbehaving:
                detail += f"{'; ' if detail else ''}not as they promise, see the log: {', '.join(misbehaving)}"
            return Check(name="engines", ok=True, detail=detail)  # images are taken in, kept and sent all the same

        return scp, catalog, disk, workers, engines

    def _unwell(self, receiver: str) -> str:
        """What is wrong with that process, '' when nothing is."""
        pulse = read_pulse(self._config.data_dir, receiver)
        if pulse is not None and fresh(pulse, self._clock) and pulse.ok:
            return ""
        return pulse.detail if pulse and pulse.detail else "the receiver gives no sign of life"

    def _workers_alive(self) -> int:
        pulse = read_pulse(self._config.data_dir, "work")
        return int(pulse.facts.get("workers_alive", 0)) if pulse and fresh(pulse, self._clock) else 0

    # --- metrics

    def _page(self) -> tuple[str, bytes]:
        return render(self._metrics, Gauges(self._readings))

    def _readings(self) -> Iterable[Reading]:
        rules = [rule.name for rule in self._rules.rules]
        yield from catalog_readings(self._catalog.queue.snapshot(), self._config, rules)
        yield "intake_state", (), float(min(self._disk.pressed().grade, Grade.REFUSING))
        yield from node_readings(self._config, self._workers_alive())
        for name, up in self._courier.up().items():
            yield "destination_up", (name,), float(up)
        for name, is_open in self._courier.circuits().items():
            yield "circuit_state", (name,), float(is_open)
        yield from self._retention.readings()
        yield "ruleset_info", (self._rules.digest,), 1.0
        yield "ruleset_rules", (), float(len(self._rules.rules))
        yield "ruleset_load_failed", (), float(bool(self._rules_error))
        yield from self._forwarding.readings()

    def stop(self) -> None:
        """What is being sent goes on after the next start."""
        self._retention.stop()
        self._timers.stop()
        self._bell.stop()
        for server in self._http:
            server.stop()
        self._courier.stop()
        self._committer.stop()
        self._audit.close()
        self._forwarding.stop()
        self._catalog.close()
