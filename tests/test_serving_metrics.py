"""What `/metrics` says of the runtime processes."""

from pathlib import Path
from typing import Any

import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig
from dicom_node.gauges import node_readings
from dicom_node.metrics import GAUGES, Gauges, Metrics, render
from dicom_node.process import Orders
from dicom_node.pulse import Pulse, beat, run_folder
from dicom_node.worker import Work


def text_of(metrics: Metrics) -> str:
    return render(metrics, Gauges(lambda: ()))[1].decode()


def test_ends_of_runtimes_are_counted_by_device_and_reason_from_zero() -> None:
    metrics = Metrics(NodeConfig())
    line = 'dicom_node_runtime_restarts_total{{device="auto",reason="hung"}} {}'
    assert line.format(0.0) in text_of(metrics)
    metrics.runtime_ended("auto", "hung", 2)
    metrics.runtime_ended("cuda:7", "hung")
    assert line.format(2.0) in text_of(metrics)
    assert 'runtime_restarts_total{device="other",reason="hung"} 1.0' in text_of(metrics)


def test_every_stage_of_an_analysis_has_its_histogram() -> None:
    metrics = Metrics(NodeConfig())
    text = text_of(metrics)
    for stage in ("queue", "load", "prepare", "wait", "forward", "finish", "encode"):
        name = "dicom_node_inference_duration_seconds_count"
        assert f'{name}{{engine="ct-abdomen",stage="{stage}"}} 0.0' in text


def test_loaded_models_and_breakers_are_read_from_the_work_processs_pulse(tmp_path: Path) -> None:
    run_folder(tmp_path).mkdir()
    runtimes = [{"device": "auto", "breaker": 1, "models": [["demo-ct-abdomen", "1.0.0"]]}]
    now = SystemClock().boot()
    facts = {"runtimes": runtimes, "unusable": {"cxr-findings": "disabled"}}
    pulse = Pulse(pid=1, boot_id=now.boot_id, boot_s=now.seconds, started_at="", ok=True, facts=facts)
    assert beat(tmp_path, "work", pulse)
    readings = {(name, labels): value for name, labels, value in node_readings(NodeConfig(data_dir=tmp_path), 1)}
    assert readings["runtime_breaker_state", ("auto",)] == 1
    assert readings["model_loaded", ("demo-ct-abdomen", "1.0.0", "auto")] == 1
    assert readings["engine_usable", ("cxr-findings",)] == 0 and readings["engine_usable", ("ct-abdomen",)] == 1
    assert {"engine_usable", "runtime_breaker_state", "model_loaded"} <= set(GAUGES)


def test_the_work_process_tells_of_its_runtimes_and_counts_each_end_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        ends = 0

        def facts(self) -> list[dict[str, Any]]:
            return [{"device": "auto", "breaker": 0, "models": [], "restarts": {"died": self.ends}, "calls": 0}]

        def close(self) -> None: ...

    engine = Engine()
    monkeypatch.setattr("dicom_node.worker.engines", lambda config, **how: {"one": engine, "two": engine})
    rules = tmp_path / "rules"
    rules.mkdir()
    config = NodeConfig(data_dir=tmp_path, rules_dir=rules, jobs={"workers": 0})
    work = Work(Orders(config=config, supervisor_pid=1), SystemClock())
    try:
        assert work.health()[2]["runtimes"] == [{"device": "auto", "breaker": 0, "models": []}]
        engine.ends = 3
        work.health()
        work.health()
        assert 'runtime_restarts_total{device="auto",reason="died"} 3.0' in text_of(work._metrics)
    finally:
        work.stop()
