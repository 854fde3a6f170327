"""What the gauges of `/metrics` say, from the catalog's snapshot and the signs of life. Pure, but for the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dicom_node.config import NodeConfig
from dicom_node.metrics import DELIVERY_STATES, JOB_STATES, LEDGER, OTHER, QUEUE_STATES, VARIANT_KINDS, Reading
from dicom_node.pulse import read_pulse, receiver_roles
from dicom_node.store.pressure import volumes

__all__ = ["catalog_readings", "node_readings"]

VOLUME, CATALOG_VOLUME = "data", "catalog"  # the latter where it is another
ENGINE_GAUGES = ("breaker_state", "token_expires_seconds")  # of `Engine.gauges`


def catalog_readings(snapshot: Mapping[str, Any], config: NodeConfig, rules: Collection[str]) -> Iterator[Reading]:
    """The readings of one `Status.snapshot`; label values beyond the configuration are added up as `other`.

    `rules` are the names of those in force; one that never matched reads 0.
    """
    studies = snapshot["studies"]
    yield "studies", (), studies["total"]
    yield "studies_open", (), studies["open"]
    yield "study_oldest_open_age_seconds", (), studies["oldest_open_age_s"]
    yield "identity_conflict_studies", (), studies["identity_conflicts"]
    yield "instances", (), snapshot["instances"]
    for state in LEDGER:
        yield "ledger_series", (state,), snapshot["ledger"][state]
        yield "ledger_studies", (state,), snapshot["ledger_studies"][state]
    yield "ledger_imbalance_series", (), snapshot["ledger"]["imbalance"]
    yield "ledger_imbalance_studies", (), snapshot["ledger_studies"]["imbalance"]
    for kind in VARIANT_KINDS:
        yield "variants", (kind,), snapshot["variants"].get(kind, 0)
    callers = {peer.ae_title for peer in config.peers.values()}
    for title, count in _folded(snapshot["associations"]["by_calling_ae"], callers, sum, 0).items():
        yield "associations_active", (title,), count
    for state in JOB_STATES:
        yield "jobs", (state,), snapshot["jobs"][state]["count"]
        yield "job_oldest_age_seconds", (state,), snapshot["jobs"][state]["oldest_age_s"]
    yield from _by_engine("engine_queue_jobs", QUEUE_STATES, snapshot["engines"], config)
    yield from _by_engine("engine_cancellations", ("pending", "failed"), snapshot["cancellations"], config)
    for state, count in snapshot["returned"].items():
        yield "returned_objects", (state,), count
    for state, count in snapshot["commitments"].items():
        yield "commitment_requests", (state,), count
    for rule in rules:
        yield "rule_last_match_timestamp_seconds", (rule,), snapshot["last_match"].get(rule, 0.0)
    yield from _deliveries(snapshot["deliveries"], config)
    yield "dead_letters", ("job",), snapshot["dead_letters"]["jobs"]
    yield "dead_letters", ("delivery",), snapshot["dead_letters"]["deliveries"]
    yield "undelivered_bytes", (), snapshot["undelivered_bytes"]


def _deliveries(by_destination: Mapping[str, Any], config: NodeConfig) -> Iterator[Reading]:
    for state in DELIVERY_STATES:
        counts = {name: states[state]["count"] for name, states in by_destination.items()}
        ages = {name: states[state]["oldest_age_s"] for name, states in by_destination.items()}
        for name, count in _folded(counts, config.destinations, sum, 0).items():
            yield "deliveries", (name, state), count
        for name, age in _folded(ages, config.destinations, max, 0.0).items():
            yield "delivery_oldest_age_seconds", (name, state), age


def _by_engine(
    name: str, states: Collection[str], counted: Mapping[str, Mapping[str, int]], config: NodeConfig
) -> Iterator[Reading]:
    for state in states:
        counts = {engine: by_state[state] for engine, by_state in counted.items()}
        for engine, count in _folded(counts, config.engines, sum, 0).items():
            yield name, (engine, state), count


def _folded(
    values: Mapping[str, float], known: Collection[str], fold: Callable[[list[float]], float], zero: float
) -> dict[str, float]:
    """One value for each known name, and `other`: what `fold` makes of the rest."""
    rest = [value for name, value in values.items() if name not in known]
    return {name: values.get(name, zero) for name in sorted(known)} | {OTHER: fold(rest) if rest else zero}


def node_readings(config: NodeConfig, workers_alive: int) -> Iterator[Reading]:
    """Disk and processes."""
    for name, volume in zip((VOLUME, CATALOG_VOLUME), volumes(config.data_dir, config.storage), strict=False):
        usage = shutil.disk_usage(volume.path)
        yield "storage_free_bytes", (name,), usage.free
        yield "storage_reserve_bytes", (name,), volume.reserve(usage.total)
        yield "storage_used_ratio", (name,), usage.used / usage.total if usage.total else 0.0
    yield "workers_alive", (), workers_alive
    work = read_pulse(config.data_dir, "work")
    unusable = work.facts.get("unusable", {}) if work else {}
    for engine in config.engines:
        yield "engine_usable", (engine,), float(engine not in unusable)
        for gauge, value in (work.facts.get("engines", {}) if work else {}).get(engine, {}).items():
            if gauge in ENGINE_GAUGES:
                yield f"engine_{gauge}", (engine,), value
    for runtime in work.facts.get("runtimes", ()) if work else ():
        yield "runtime_breaker_state", (runtime["device"],), runtime["breaker"]
        for model, version in runtime["models"] if work and work.ok else ():
            yield "model_loaded", (model, version, runtime["device"]), 1
    yield from _certificates(config)
    supervisor = read_pulse(config.data_dir, "supervisor")
    for role, restarts in (supervisor.facts.get("restarts", {}) if supervisor else {}).items():
        yield "process_restarts", (role,), restarts


def _certificates(config: NodeConfig) -> Iterator[Reading]:
    """When the certificate that receivers show ends, at the first of them, and those that destinations are shown."""
    if config.tls is not None:
        pulses = [read_pulse(config.data_dir, role) for role in receiver_roles(config.receivers)]
        ends = [pulse.facts.get("certificate_ends", 0.0) for pulse in pulses if pulse is not None]
        if known := [end for end in ends if end]:
            yield "tls_certificate_expiry_timestamp_seconds", ("tls",), min(known)
    if any(one.tls is not False for one in config.destinations.values()):
        from dicom_node.dimse.tls import client_expiries  # only where there are such

        for name, end in client_expiries(config):
            yield "tls_certificate_expiry_timestamp_seconds", (f"destinations.{name}.tls",), end
