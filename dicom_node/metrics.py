"""Prometheus metrics: the only importer of prometheus_client.

Counters and histograms live in every process and are added up at scrape through files in PROMETHEUS_MULTIPROC_DIR,
which the supervisor sets and empties before any of its children imports this file. The files are named after the
process's role, not its id: a restarted process goes on counting where the killed one stopped, and none is left over.
Gauges are not counted at all: they are computed from the catalog at the time of scrape (`Gauges`).

Every label has a closed set of values, known at start and initialised at zero: AE titles only if configured, else
`other`. Never a UID, a name, an address or free text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from dicom_node.auditing import AuditKind, AuditOutcome
from dicom_node.config import NodeConfig
from dicom_node.errors import NodeError
from dicom_node.model import (
    CloseTrigger,
    DeliveryState,
    JobState,
    Priority,
    StoreOutcome,
)

__all__ = ["CONTENT_TYPE", "GAUGES", "MULTIPROCESS_VARIABLE", "Gauges", "Metrics", "Reading", "render"]

PREFIX = "dicom_node_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
OTHER = "other"
FILE_BYTES = 1 << 20  # of one process's counters, or histograms; more would be added beyond it

# PS3.3 C.7.3.1.1.1, the ones a node meets; any other is counted as `other`
MODALITIES = ("CR", "CT", "DX", "KO", "MG", "MR", "NM", "OT", "PR", "PT", "RF", "SEG", "SR", "US", "XA")
SERVICES = ("echo", "store", "find", "get", "move", "commit", "commit_report")
STATUS_CLASSES = ("success", "pending", "warning", "cancel", "failure")
OUTCOMES = (*(outcome.value for outcome in StoreOutcome), "invalid", "failed")
DURABLE_BY = ("journal", "file")
DURABLE_STEPS = ("write", "sync", "catalog")
STEP_OUTCOMES = ("slow", "failed")
ASSOCIATION_RESULTS = ("released", "aborted")
REJECT_REASONS = ("calling_ae", "called_ae", "address", "certificate", "tls", "user", "limit", "rate", "protocol")
CONTEXT_REFUSALS = ("abstract_syntax", "transfer_syntax", "role", "policy")
VERDICTS = ("match", "nomatch", "missing_tag", "mixed", "error")
ATTEMPT_OUTCOMES = ("done", "rejected", "retry", "parked", "failed", "lost")
DEAD_LETTER_REASONS = ("attempts", "deadline", "error", "poison")
# of one call: run, poll or cancel; dropped: its job was taken over or cancelled meanwhile
CALL_OUTCOMES = ("ok", "pending", "rejected", "unavailable", "timeout", "error", "dropped")
# of one request on the wire; resting: the circuit breaker let nothing through
REQUEST_OUTCOMES = ("ok", "rejected", "unavailable", "timeout", "error", "resting", "dropped")
# what a plug-in may not do well, see `worker` and `watching`
ENGINE_METHODS = ("trouble", "gauges", "facts", "hangs", "observe", "warm_up", "close")
# queue: until a worker has it; wait: read, until the device has it
STAGES = ("queue", "load", "prepare", "wait", "forward", "finish", "encode")
RUNTIME_ENDS = ("died", "hung", "device", "nonsense")
OBJECT_KINDS = ("ANN", "DOC", "M3D", "SEG", "SR", "image", OTHER)
HTTP_REFUSALS = ("no_token", "token", "host", "malformed", "timeout", "busy")
DELIVERY_OUTCOMES = ("sent", "refused", "retry", "failed")
AUDIT_KINDS = tuple(kind.value for kind in AuditKind)
AUDIT_OUTCOMES = tuple(str(int(outcome)) for outcome in AuditOutcome)  # PS3.15 A.5.2

FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WORK_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STUDY_S = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)


def _allocate(path: Path) -> None:
    """Give the file its blocks: it is mapped, and to touch a hole of it on a full disk would end the process."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return  # the library will say so
    try:
        with suppress(OSError):  # started on a full disk: what is there has its blocks
            os.posix_fallocate(fd, 0, FILE_BYTES)
    finally:
        os.close(fd)


class _Labels:
    """A closed set of label values."""

    def __init__(self, known: Iterable[str], *, other: bool = True) -> None:
        self.values = tuple(dict.fromkeys((*known, OTHER) if other else known))

    def __call__(self, value: str) -> str:
        return value if value in self.values else OTHER


class Metrics:
    """The counters and histograms of one process. Thread-safe, never raises for an unknown label value: `other`.

    `process` is the role of this process; with PROMETHEUS_MULTIPROC_DIR set, no other living process may use the same.
    """

    def __init__(self, config: NodeConfig, *, process: str = "main") -> None:
        if folder := os.environ.get(MULTIPROCESS_VARIABLE):
            for kind in ("counter", "histogram"):
                _allocate(Path(folder) / f"{kind}_{process}.db")
            values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._calling = _Labels(sorted({peer.ae_title for peer in config.peers.values()}))
        self._modality = _Labels(MODALITIES)
        self._destination = _Labels(sorted(config.destinations))
        self._engine = _Labels(sorted(config.engines))
        self._rule = _Labels(())
        self._retention = _Labels(rule.name for rule in config.retention.rules) if config.retention else _Labels(())
        self._device = _Labels(dict.fromkeys((*config.jobs.devices, "cpu")))
        self._request_counters: dict[tuple[str, str], Counter] = {}
        self._request_seconds: dict[str, Histogram] = {}
        self._intake()
        self._studies()
        self._work()
        self._delivery()
        self._audit(sorted(config.audit.collectors) if config.audit is not None else ())

    # --- definitions, each label set at zero

    def _counter(self, name: str, text: str, labels: Mapping[str, Sequence[str]] | None = None) -> Counter:
        counter = Counter(PREFIX + name, text, tuple(labels or ()), registry=self.registry)
        for combination in product(*labels.values()) if labels else ():
            counter.labels(*combination)
        return counter

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Mapping[str, Sequence[str]] | None = None
    ) -> Histogram:
        histogram = Histogram(PREFIX + name, text, tuple(labels or ()), registry=self.registry, buckets=buckets)
        for combination in product(*labels.values()) if labels else ():
            histogram.labels(*combination)
        return histogram

    def _intake(self) -> None:
        calling = {"calling_ae": self._calling.values}
        self._associations = self._counter(
            "associations_total", "Associations that ended, by how.", calling | {"result": ASSOCIATION_RESULTS}
        )
        self._rejects = self._counter(
            "association_reject_total", "Association requests that were rejected.", {"reason": REJECT_REASONS}
        )
        self._requests = self._counter(
            "dimse_requests_total",
            "DIMSE requests answered, by the class of the final status.",
            {"service": SERVICES, "status_class": STATUS_CLASSES},
        )
        self._dimse_seconds = self._histogram(
            "dimse_duration_seconds", "Request to final response.", FAST_S, {"service": SERVICES}
        )
        self._answered = {
            (service, result): (self._requests.labels(service, result), self._dimse_seconds.labels(service))
            for service, result in product(SERVICES, STATUS_CLASSES)
        }
        self._instances = self._counter(
            "instances_received_total",
            "Instances that came by C-STORE, by what became of them.",
            calling | {"modality": self._modality.values, "outcome": OUTCOMES},
        )
        self._received: dict[tuple[str, str, str], Counter] = {}
        durable = self._counter(
            "instances_durable_total",
            "Instances that were kept, by what made them durable: the intake journal, or syncs of their own (slower).",
            {"by": DURABLE_BY},
        )
        self._durable = {by: durable.labels(by) for by in DURABLE_BY}
        self._steps = self._counter(
            "storage_steps_total",
            "Writes, syncs and commits of the catalog that failed, or took longer than `storage.slow_step_s`.",
            {"step": DURABLE_STEPS, "outcome": STEP_OUTCOMES},
        )
        self._irregular = self._counter("irregular_uids_total", "Instances with padded UIDs or leading zeros in them.")
        self._bytes = self._counter("received_bytes_total", "Data set bytes that came by C-STORE.")
        self._contexts = self._counter(
            "context_refused_total", "Presentation contexts that were refused.", {"kind": CONTEXT_REFUSALS}
        )

    def _studies(self) -> None:
        self._closed = self._counter(
            "study_closed_total", "Study revisions closed.", {"trigger": tuple(item.value for item in CloseTrigger)}
        )
        self._close_seconds = self._histogram(
            "study_receive_to_close_seconds", "First image received to revision closed.", STUDY_S
        )
        self._late = self._counter("late_revisions_total", "Revisions that late images opened and routing closed.")
        self._evaluations = self._counter(
            "rule_evaluations_total", "Rules evaluated on series.", {"rule": (), "verdict": VERDICTS}
        )
        rules = self._retention.values
        self._deleted = self._counter("studies_deleted_total", "Studies that retention deleted.", {"rule": rules})
        self._deleted_bytes = self._counter("deleted_bytes_total", "Of them, bytes of files.", {"rule": rules})
        self._unrouted = self._counter("unrouted_studies_total", "Closed study revisions that no rule matched.")

    def _work(self) -> None:
        engine = {"engine": self._engine.values}
        self._attempts = self._counter(
            "job_attempts_total", "Attempts at jobs, by how they ended.", engine | {"outcome": ATTEMPT_OUTCOMES}
        )
        self._calls = self._counter(
            "engine_calls_total", "Calls of engines, by how they ended.", engine | {"outcome": CALL_OUTCOMES}
        )
        self._call_seconds = self._histogram("engine_call_duration_seconds", "Calls of engines.", WORK_S, engine)
        self._engine_requests = self._counter(
            "engine_requests_total",
            "Requests that engines outside the node were sent, by how they ended.",
            engine | {"outcome": REQUEST_OUTCOMES},
        )
        self._engine_request_seconds = self._histogram(
            "engine_request_duration_seconds", "Requests to engines outside the node.", WORK_S, engine
        )
        self._engine_misbehaved = self._counter(
            "engine_misbehaved_total",
            "Calls of an engine's own code that raised, hung or answered nonsense, by method.",
            engine | {"method": ENGINE_METHODS},
        )
        self._lease_lost = self._counter("job_lease_expired_total", "Jobs whose lease was lost to another worker.")
        self._dead = self._counter(
            "dead_letters_total",
            "Work given up until a person retries it.",
            {"kind": ("job", "delivery"), "reason": DEAD_LETTER_REASONS},
        )
        self._runtime_restarts = self._counter(
            "runtime_restarts_total",
            "Runtime processes that ended and were replaced, by device and why.",
            {"device": self._device.values, "reason": RUNTIME_ENDS},
        )
        self._inference_seconds = self._histogram(
            "inference_duration_seconds", "Stages of an analysis.", WORK_S, engine | {"stage": STAGES}
        )
        self._turnaround = self._histogram(
            "study_turnaround_seconds",
            "Job created to result in the catalog.",
            STUDY_S,
            {"priority": tuple(item.value for item in Priority)} | engine,
        )

    def _delivery(self) -> None:
        self._deliveries = self._counter(
            "deliveries_total",
            "Objects sent to destinations, by how it ended.",
            {"destination": self._destination.values, "object": OBJECT_KINDS, "outcome": DELIVERY_OUTCOMES},
        )
        self._delivery_seconds = self._histogram(
            "delivery_duration_seconds", "Queued to acknowledged.", STUDY_S, {"destination": self._destination.values}
        )
        self._http_refusals = self._counter(
            "http_refusals_total", "HTTP requests that were not served, by why.", {"reason": HTTP_REFUSALS}
        )

    def http_refused(self, reason: str) -> None:
        """`reason`: one of HTTP_REFUSALS."""
        self._http_refusals.labels(reason if reason in HTTP_REFUSALS else "malformed").inc()

    def _audit(self, collectors: Sequence[str]) -> None:
        self._sink = _Labels(("file", *collectors))
        events = self._counter(
            "audit_events_total",
            "Messages of the audit trail, by Event Outcome Indicator (0: success).",
            {"kind": AUDIT_KINDS, "outcome": AUDIT_OUTCOMES},
        )
        self._audited = {labels: events.labels(*labels) for labels in product(AUDIT_KINDS, AUDIT_OUTCOMES)}
        self._audit_failures = self._counter(
            "audit_sink_failures_total",
            "Tries to write or to send the audit trail that failed.",
            {"sink": self._sink.values},
        )
        self._audit_lost = self._counter(
            "audit_messages_lost_total",
            "Audit messages that were given up: the file could not be written for too long.",
        )

    # --- intake

    def association_ended(self, calling_ae_title: str, result: str) -> None:
        """`result`: released or aborted."""
        self._associations.labels(self._calling(calling_ae_title), result).inc()

    def association_rejected(self, reason: str) -> None:
        """`reason`: one of REJECT_REASONS."""
        self._rejects.labels(reason if reason in REJECT_REASONS else "protocol").inc()

    def context_refused(self, kind: str) -> None:
        """`kind`: one of CONTEXT_REFUSALS."""
        self._contexts.labels(kind if kind in CONTEXT_REFUSALS else "abstract_syntax").inc()

    def request_answered(self, service: str, status: int, seconds: float) -> None:
        """A DIMSE request got its final response."""
        count, duration = self._answered[service, status_class(status)]  # `labels` costs as much as counting
        count.inc()
        duration.observe(seconds)

    def durable_step(self, step: str, outcome: str) -> None:
        """A step toward the disk, one of DURABLE_STEPS, ended as one of STEP_OUTCOMES."""
        self._steps.labels(step, outcome).inc()

    def instance_received(
        self,
        calling_ae_title: str,
        modality: str,
        outcome: str,
        length: int = 0,
        *,
        irregular_uids: bool = False,
        durable_by: str = "",
    ) -> None:
        """A C-STORE was answered; `outcome` is a StoreOutcome value, `invalid` or `failed`.

        `durable_by`: one of DURABLE_BY, '' where nothing was kept.
        """
        known = outcome if outcome in OUTCOMES else "failed"
        labels = self._calling(calling_ae_title), self._modality(modality), known
        counter = self._received.get(labels)
        if counter is None:  # `labels` costs as much as counting
            counter = self._received[labels] = self._instances.labels(*labels)
        counter.inc()
        self._bytes.inc(length)
        if durable_by:
            self._durable[durable_by].inc()
        if irregular_uids:
            self._irregular.inc()

    # --- studies and rules

    def rules_loaded(self, names: Sequence[str]) -> None:
        """A rule set came into force: its rules become label values, at zero."""
        self._rule = _Labels(names)
        for rule, verdict in product(self._rule.values, VERDICTS):
            self._evaluations.labels(rule, verdict)

    def study_closed(self, trigger: str, revision: int, seconds: float, *, matched: bool) -> None:
        """A study revision was routed, `seconds` after its first image."""
        self._closed.labels(trigger).inc()
        self._close_seconds.observe(max(seconds, 0.0))
        if revision > 1:
            self._late.inc()
        if not matched:
            self._unrouted.inc()

    def study_deleted(self, rule: str, length: int) -> None:
        """A study went by that rule of retention, with files of so many bytes; `other`: begun by a person."""
        self._deleted.labels(self._retention(rule)).inc()
        self._deleted_bytes.labels(self._retention(rule)).inc(length)

    def rule_evaluated(self, rule: str, verdict: str) -> None:
        """`verdict`: one of VERDICTS."""
        self._evaluations.labels(self._rule(rule), verdict if verdict in VERDICTS else "error").inc()

    # --- work

    def job_attempted(self, engine: str, outcome: str) -> None:
        """An attempt at a job ended; `outcome` is one of ATTEMPT_OUTCOMES."""
        self._attempts.labels(self._engine(engine), outcome if outcome in ATTEMPT_OUTCOMES else "failed").inc()
        if outcome == "lost":
            self._lease_lost.inc()

    def engine_called(self, engine: str, outcome: str, seconds: float) -> None:
        """An engine was called; `outcome` is one of CALL_OUTCOMES."""
        self._calls.labels(self._engine(engine), outcome if outcome in CALL_OUTCOMES else "error").inc()
        self._call_seconds.labels(self._engine(engine)).observe(max(seconds, 0.0))

    def engine_requested(self, engine: str, outcome: str, seconds: float) -> None:
        """An engine outside the node was sent a request; `outcome` is one of REQUEST_OUTCOMES."""
        known = outcome if outcome in REQUEST_OUTCOMES else "error"
        self._engine_requests.labels(self._engine(engine), known).inc()
        self._engine_request_seconds.labels(self._engine(engine)).observe(max(seconds, 0.0))

    def engine_misbehaved(self, engine: str, method: str) -> None:
        """An engine's own code raised, hung or answered nonsense; `method` is one of ENGINE_METHODS."""
        self._engine_misbehaved.labels(self._engine(engine), method if method in ENGINE_METHODS else "hangs").inc()

    def dead_letter(self, kind: str, reason: str) -> None:
        """A job or delivery was given up."""
        self._dead.labels(kind, reason if reason in DEAD_LETTER_REASONS else "error").inc()

    def inference(self, engine: str, stage_seconds: Mapping[str, float]) -> None:
        """The stages of one analysis; a stage that is not one of STAGES is not kept."""
        for stage, seconds in stage_seconds.items():
            if stage in STAGES:
                self._inference_seconds.labels(self._engine(engine), stage).observe(seconds)

    def runtime_ended(self, device: str, reason: str, count: int = 1) -> None:
        """Runtime processes of that device ended otherwise than by being closed; `reason` is one of RUNTIME_ENDS."""
        known = reason if reason in RUNTIME_ENDS else "died"
        self._runtime_restarts.labels(self._device(device), known).inc(count)

    def turnaround(self, engine: str, priority: str, seconds: float) -> None:
        """A job is done, `seconds` after it was created."""
        self._turnaround.labels(priority, self._engine(engine)).observe(max(seconds, 0.0))

    # --- delivery

    def object_delivered(self, destination: str, modality: str, outcome: str) -> None:
        """One object, one try; `outcome` is one of DELIVERY_OUTCOMES."""
        kind = modality if modality in OBJECT_KINDS else "image" if modality else OTHER
        known = outcome if outcome in DELIVERY_OUTCOMES else "failed"
        self._deliveries.labels(self._destination(destination), kind, known).inc()

    def delivery_finished(self, destination: str, seconds: float) -> None:
        """A whole delivery was acknowledged, `seconds` after it was queued."""
        self._delivery_seconds.labels(self._destination(destination)).observe(max(seconds, 0.0))

    # --- audit trail

    def audit_recorded(self, kind: str, outcome: int) -> None:
        """A message was written; `kind` an AuditKind, `outcome` an AuditOutcome."""
        self._audited[kind, str(outcome)].inc()

    def audit_failed(self, sink: str) -> None:
        """A try to write or to send failed; `sink`: file, or the name of a collector."""
        self._audit_failures.labels(self._sink(sink)).inc()

    def audit_lost(self, messages: int) -> None:
        """So many events were given up."""
        self._audit_lost.inc(messages)


def status_class(status: int) -> str:
    """The class of a DIMSE status (PS3.7 Annex C): success, pending, warning, cancel or failure."""
    if status == 0x0000:
        return "success"
    if status in (0xFF00, 0xFF01):
        return "pending"
    if status == 0xFE00:
        return "cancel"
    if status in (0x0001, 0x0107, 0x0111, 0x0116) or status & 0xF000 == 0xB000:
        return "warning"
    return "failure"


# --- gauges -----------------------------------------------------------------------------------------------------------

JOB_STATES = tuple(state.value for state in JobState)
QUEUE_STATES = ("pending", "leased", "waiting", "failed")
DELIVERY_STATES = tuple(state.value for state in DeliveryState)
LEDGER = ("received", "routed", "filtered", "waiting", "failed")
VARIANT_KINDS = tuple(outcome.value for outcome in StoreOutcome)

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "associations_active": ("Associations open now.", ("calling_ae",)),
    "studies": ("Studies kept.", ()),
    "studies_open": ("Studies with series not yet routed.", ()),
    "study_oldest_open_age_seconds": ("Age of the oldest study not yet routed.", ()),
    "instances": ("Instances kept.", ()),
    "variants": ("Listed variants: other content or syntax under a known UID.", ("kind",)),
    "identity_conflict_studies": ("Studies under two patient identities, not released.", ()),
    "ledger_series": ("Series by where they stand; received is the sum of the others.", ("state",)),
    "ledger_studies": ("Studies by where the worst of their series stands.", ("state",)),
    "ledger_imbalance_series": ("Series in no class of the ledger, or that no receipt is for; must be 0.", ()),
    "ledger_imbalance_studies": ("Studies in no class of the ledger, or that no receipt is for; must be 0.", ()),
    "jobs": ("Jobs by state.", ("state",)),
    "job_oldest_age_seconds": ("Age of the oldest unfinished job in that state, 0 when there is none.", ("state",)),
    "deliveries": ("Deliveries by state.", ("destination", "state")),
    "delivery_oldest_age_seconds": ("Age of the oldest unfinished delivery in that state.", ("destination", "state")),
    "dead_letters": ("Work that needs a person.", ("kind",)),
    "retention_kept_studies": ("Studies that are due by a rule of retention and stay, by why.", ("reason",)),
    "retention_over_quota_bytes": ("What a rule's studies have beyond its quota and could not be deleted.", ("rule",)),
    "deletions_unfinished": ("Deleted studies whose files are not all removed.", ()),
    "undelivered_bytes": ("Data sets that wait for a destination or were given up.", ()),
    "rule_last_match_timestamp_seconds": ("When the rule last matched, Unix time; 0 if never.", ("rule",)),
    "destination_up": ("1 if the last try got through or none was made.", ("destination",)),
    "circuit_state": ("0 closed, 1 open: the destination is only probed.", ("destination",)),
    "ruleset_info": ("The rule set in force.", ("digest",)),
    "ruleset_rules": ("Rules in force.", ()),
    "ruleset_load_failed": ("1 when the rules on disk could not be taken in.", ()),
    "storage_free_bytes": ("Free space on the volume of the data folder.", ("volume",)),
    "storage_reserve_bytes": ("Of it, kept in reserve: below that nothing is taken in.", ("volume",)),
    "storage_used_ratio": ("Used part of that volume.", ("volume",)),
    "intake_state": ("0 open, 1 background work pauses, 2 C-STORE is refused: the disk is full or fails.", ()),
    "tls_certificate_expiry_timestamp_seconds": (
        "When the certificate under that key of the settings ends, or one of its chain, in seconds since 1970.",
        ("certificate",),
    ),
    "workers_alive": ("Workers that gave a sign of life lately.", ()),
    "model_loaded": ("1 for each model whose network is loaded on a device.", ("model", "version", "device")),
    "engine_usable": ("0: its model package cannot be used, status says why; its jobs wait.", ("engine",)),
    "engine_breaker_state": ("0 closed, 1 open: it is not asked, 2 one call tries it.", ("engine",)),
    "engine_token_expires_seconds": ("Until the engine's credentials expire; negative when they did.", ("engine",)),
    "engine_queue_jobs": ("Jobs not done, by engine; waiting: parked at the engine.", ("engine", "state")),
    "engine_cancellations": ("Work at engines that is to be stopped: pending, or given up.", ("engine", "state")),
    "returned_objects": ("Objects engines stored in the node: results of a job, or of none so far.", ("state",)),
    "commitment_requests": (
        "Peers' requests for storage commitment; asked: not checked, judged: not told.",
        ("state",),
    ),
    "runtime_breaker_state": ("0 closed, 1 open: its work goes to the CPU, 2 one request tries it.", ("device",)),
    "audit_backlog_messages": ("Messages of the audit trail that the collector has not got yet.", ("collector",)),
    "audit_collector_up": ("1 if the last try to send to the collector got through.", ("collector",)),
    "audit_trail_whole": ("0: what was verified of the audit trail is not what was written.", ()),
    "process_restarts": ("Times the supervisor started the process again.", ("process",)),
    "catalog_readable": ("0 when the gauges above could not be computed.", ()),
}

Reading = tuple[str, tuple[str, ...], float]  # name in GAUGES, label values, value


class Gauges(Collector):
    """Every gauge, computed by `read` when asked. When `read` fails only `catalog_readable` (0) is given."""

    def __init__(self, read: Callable[[], Iterable[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The families, those without a reading left out."""
        try:
            readings = [*self._read(), ("catalog_readable", (), 1.0)]
        except (NodeError, OSError):
            readings = [("catalog_readable", (), 0.0)]
        families: dict[str, GaugeMetricFamily] = {}
        for name, label_values, value in readings:
            text, labels = GAUGES[name]
            family = families.setdefault(name, GaugeMetricFamily(PREFIX + name, text, labels=labels))
            family.add_metric(label_values, value)
        yield from families.values()


class _Own(Protocol):
    registry: CollectorRegistry


def render(own: _Own, gauges: Gauges) -> tuple[str, bytes]:
    """Content type and text of one scrape: counters of every process together, and the gauges."""
    scrape = CollectorRegistry()
    folder = os.environ.get(MULTIPROCESS_VARIABLE)
    if folder and Path(folder).is_dir():
        MultiProcessCollector(scrape, path=folder)  # type: ignore[no-untyped-call]
        text = generate_latest(scrape)
    else:
        text = generate_latest(own.registry)
    now = CollectorRegistry()
    now.register(gauges)
    return CONTENT_TYPE, text + generate_latest(now)
