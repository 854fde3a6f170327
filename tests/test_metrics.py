"""Metrics: zeros first, closed label sets, right over several processes and restarts."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, StorageSettings, load_config
from dicom_node.errors import StorageError
from dicom_node.gauges import catalog_readings
from dicom_node.metrics import GAUGES, Gauges, Metrics, render, status_class
from dicom_node.store.catalog import open_catalog

CONFIG = load_config(
    environ={},
    overrides={
        "peers": {"ct": {"ae_title": "CT1"}, "pacs": {"ae_title": "PACS"}},
        "destinations": {"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104}},
    },
)


def samples(metrics: Metrics, gauges: Gauges | None = None) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    _, text = render(metrics, gauges or Gauges(lambda: ()))
    return parsed(text)


def parsed(text: bytes) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            assert sample.name.startswith("dicom_node_")
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def of(name: str, values: Mapping[str, Mapping[tuple[tuple[str, str], ...], float]], **labels: str) -> float:
    return values[f"dicom_node_{name}"][tuple(sorted(labels.items()))]


def test_every_label_set_begins_at_zero() -> None:
    values = samples(Metrics(CONFIG))
    assert of("associations_total", values, calling_ae="CT1", result="aborted") == 0
    assert of("associations_total", values, calling_ae="other", result="released") == 0
    assert of("dimse_requests_total", values, service="move", status_class="cancel") == 0
    assert of("deliveries_total", values, destination="PACS", object="SR", outcome="sent") == 0
    assert of("job_attempts_total", values, engine="cxr-findings", outcome="done") == 0
    assert of("dimse_duration_seconds_count", values, service="store") == 0
    assert of("unrouted_studies_total", values) == 0


def test_an_unknown_caller_is_other_and_makes_no_new_series() -> None:
    metrics = Metrics(CONFIG)
    before = len(samples(metrics)["dicom_node_associations_total"])
    for number in range(50):
        metrics.association_ended(f"EVIL{number}", "released")
    metrics.association_ended("CT1", "aborted")
    values = samples(metrics)
    assert of("associations_total", values, calling_ae="other", result="released") == 50
    assert of("associations_total", values, calling_ae="CT1", result="aborted") == 1
    assert len(values["dicom_node_associations_total"]) == before


def test_rules_become_labels_when_a_rule_set_is_loaded() -> None:
    metrics = Metrics(CONFIG)
    metrics.rules_loaded(["chest", "abdomen"])
    metrics.rule_evaluated("chest", "match")
    metrics.rule_evaluated("of an older set", "nomatch")
    values = samples(metrics)
    assert of("rule_evaluations_total", values, rule="chest", verdict="match") == 1
    assert of("rule_evaluations_total", values, rule="abdomen", verdict="error") == 0
    assert of("rule_evaluations_total", values, rule="other", verdict="nomatch") == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((0x0000, "success"), (0xFF00, "pending"), (0xFF01, "pending"), (0xFE00, "cancel"), (0xB000, "warning")),
        *((0xB007, "warning"), (0x0107, "warning"), (0xA700, "failure"), (0xC000, "failure"), (0x0122, "failure")),
    ],
)
def test_dimse_statuses_fall_into_their_class(status: int, expected: str) -> None:
    assert status_class(status) == expected


def test_gauges_are_computed_when_asked_and_vanish_when_they_cannot_be() -> None:
    depth = [3.0]

    def read() -> list[tuple[str, tuple[str, ...], float]]:
        if depth[0] < 0:
            raise StorageError("gone")
        return [("jobs", ("pending",), depth[0]), ("storage_free_bytes", ("data",), 10.0)]

    metrics, gauges = Metrics(CONFIG), Gauges(read)
    assert of("jobs", samples(metrics, gauges), state="pending") == 3
    depth[0] = 4.0
    values = samples(metrics, gauges)
    assert of("jobs", values, state="pending") == 4
    assert of("catalog_readable", values) == 1
    depth[0] = -1.0
    values = samples(metrics, gauges)
    assert "dicom_node_jobs" not in values
    assert of("catalog_readable", values) == 0


def test_gauge_names_carry_base_units() -> None:
    assert not [name for name in GAUGES if name.endswith(("_ms", "_mb", "_percent", "_total"))]


_CHILD = """
import sys
from dicom_node.config import NodeConfig
from dicom_node.metrics import Metrics, Gauges, render
metrics = Metrics(NodeConfig(), process=sys.argv[1])
for _ in range(int(sys.argv[2])):
    metrics.association_rejected("limit")
    metrics.request_answered("echo", 0, 0.002)
if sys.argv[3:] == ["kill"]:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
sys.stdout.buffer.write(render(metrics, Gauges(lambda: ()))[1])
"""


def _child(folder: Path, *words: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", _CHILD, *words]
    return parsed(subprocess.run(command, env=environment, capture_output=True, timeout=60).stdout)


def test_counters_add_up_over_processes_and_survive_kill_9(tmp_path: Path) -> None:
    _child(tmp_path, "receiver", "3", "kill")
    files = sorted(file.name for file in tmp_path.iterdir())
    _child(tmp_path, "receiver", "4")  # the restarted process goes on
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    values = _child(tmp_path, "service", "5")
    assert of("association_reject_total", values, reason="limit") == 12
    assert of("association_reject_total", values, reason="called_ae") == 0
    assert of("dimse_requests_total", values, service="echo", status_class="success") == 12
    assert of("dimse_duration_seconds_count", values, service="echo") == 12
    assert of("dimse_duration_seconds_bucket", values, service="echo", le="+Inf") == 12


def test_the_default_configuration_gives_a_scrape_of_bounded_size() -> None:
    _, text = render(Metrics(NodeConfig()), Gauges(lambda: ()))
    assert len(text) < 400_000


def test_calls_of_engines_and_requests_on_the_wire_are_counted_apart() -> None:
    metrics = Metrics(CONFIG)
    metrics.engine_called("cxr-findings", "ok", 2.0)
    metrics.engine_called("cxr-findings", "never heard of", 1.0)
    metrics.engine_called("of no configuration", "timeout", 1.0)
    metrics.engine_requested("cxr-findings", "resting", 0.0)
    values = samples(metrics)
    assert of("engine_calls_total", values, engine="cxr-findings", outcome="ok") == 1
    assert of("engine_calls_total", values, engine="cxr-findings", outcome="error") == 1
    assert of("engine_calls_total", values, engine="other", outcome="timeout") == 1
    assert of("engine_calls_total", values, engine="cxr-findings", outcome="pending") == 0
    assert of("engine_call_duration_seconds_sum", values, engine="cxr-findings") == 3
    assert of("engine_requests_total", values, engine="cxr-findings", outcome="resting") == 1
    assert of("engine_request_duration_seconds_count", values, engine="cxr-findings") == 1


def test_the_queue_of_each_engine_is_a_gauge_and_unknown_ones_are_other(tmp_path: Path) -> None:
    config = NodeConfig(data_dir=tmp_path)
    catalog = open_catalog(tmp_path, SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    snapshot = dict(catalog.queue.snapshot())
    catalog.close()
    counts = {"pending": 1, "leased": 0, "waiting": 2, "failed": 3}
    snapshot["engines"] = {"cxr-findings": counts, "gone": counts, "gone too": counts}
    snapshot["cancellations"] = {"gone": {"pending": 1, "failed": 4}}
    readings = {(name, labels): value for name, labels, value in catalog_readings(snapshot, config, [])}
    assert readings[("engine_queue_jobs", ("cxr-findings", "waiting"))] == 2
    assert readings[("engine_queue_jobs", ("ct-abdomen", "waiting"))] == 0
    assert readings[("engine_queue_jobs", ("other", "failed"))] == 6
    assert readings[("engine_cancellations", ("other", "failed"))] == 4
