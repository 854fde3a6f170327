"""`dicom-node retention` and `dicom-node delete` on a data folder, beside a second node that is asked by C-FIND."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicom_node.cli import main
from dicom_node.clock import SystemClock
from dicom_node.config import DeliverySettings, NodeConfig, StorageSettings, load_config
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.dimse.server import DicomServer
from dicom_node.dimse.session import DimseSender
from dicom_node.interfaces import RoutedSeries
from dicom_node.metrics import Metrics
from dicom_node.model import (
    BootTime,
    CloseTrigger,
    LatePolicy,
    PlannedJob,
    Priority,
    SendWhat,
    SeriesHeader,
    Source,
    Verdict,
)
from dicom_node.pipeline.deliver import Courier
from dicom_node.pipeline.observe import Unobserved
from dicom_node.retaining import Retention
from dicom_node.wiring import destinations, node_catalog, node_ingest


@dataclass
class EarlierClock:
    """The system's clock, three hours ago."""

    ago_s: float = 3 * 3600.0

    def boot(self) -> BootTime:
        now = SystemClock().boot()
        return BootTime(boot_id=now.boot_id, seconds=now.seconds - self.ago_s)

    def wall(self) -> datetime:
        return SystemClock().wall() - timedelta(seconds=self.ago_s)

    def sleep(self, seconds: float) -> None:
        return None


def kept_and_routed(config: Any, folder: Path, send: bool) -> str:
    """Three hours ago a CT came, and was routed to PACS or nowhere; its Study Instance UID."""
    series = write_ct_series(folder, 870000 + send, shape=(3, 16, 16), spacing_mm=(4.0, 4.0, 4.0))
    clock = EarlierClock()
    catalog = node_catalog(config, clock)
    ingest = node_ingest(catalog, config, clock)
    for path in sorted(folder.rglob("*.dcm")):
        raw = path.read_bytes()
        meta = dcmread(path, stop_before_pixels=True).file_meta
        offset = 132 + 12 + meta.FileMetaInformationGroupLength
        result = ingest.accept(
            sop_class_uid=str(meta.MediaStorageSOPClassUID),
            sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
            transfer_syntax_uid=str(meta.TransferSyntaxUID),
            fragments=[raw[offset:]],
            source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="127.0.0.1"),
        )
        assert result.status == 0
    (activity,) = catalog.queue.open_studies()
    (uid,) = activity.pending_series
    plan = PlannedJob(
        rule="onward", series_instance_uid=uid, engine="", priority=Priority.ROUTINE, results=(),
        destinations=("PACS",), send_what=SendWhat.SOURCE, late_instances=LatePolicy.RERUN,
    )  # fmt: skip
    verdict = Verdict(rule="onward", series_instance_uid=uid, matched=send, reason="", conditions=())
    header = SeriesHeader(series_instance_uid=uid, instance_count=3, values={})
    routed = RoutedSeries(series_instance_uid=uid, header=header, verdicts=(verdict,), jobs=(plan,) if send else ())
    catalog.queue.route_series(activity, [routed], CloseTrigger.IDLE, "digest")
    catalog.close()
    return str(series.study_instance_uid)


def deliver(config: Any) -> None:
    catalog = node_catalog(config, SystemClock())
    courier = Courier(
        catalog.queue,
        DimseSender(DeliverySettings(), "DICOM_NODE"),
        destinations(config),
        settings=DeliverySettings(),
        clock=SystemClock(),
        observer=Unobserved(),
    )
    while courier.run_once("PACS"):
        pass
    catalog.close()


@pytest.fixture
def pacs_port(tmp_path: Path) -> Iterator[int]:
    """Where a second node answers, as PACS: its receiver."""
    config = NodeConfig(
        data_dir=tmp_path / "pacs",
        ae_titles=("PACS",),
        dicom_port=0,
        storage=StorageSettings(reserve_bytes=0, reserve_ratio=0.0),
    )
    catalog = node_catalog(config, SystemClock())
    server = DicomServer(
        config,
        sink=node_ingest(catalog, config, SystemClock()),
        index=catalog.index,
        associations=catalog.index,
        observe=Metrics(config),
        commitments=catalog.queue,
    )
    yield server.start()
    server.stop(2.0)
    catalog.close()


@pytest.fixture
def settings(pacs_port: int, tmp_path: Path) -> Path:
    """A configuration with a PACS that runs, and rules of an hour."""
    path = tmp_path / "node.yaml"
    rules = [{"name": "sent", "older_than": "1h"}, {"name": "here", "deliveries": "none", "older_than": "1h"}]
    told = {
        **{"data_dir": str(tmp_path / "data"), "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0}},
        **{"rules_dir": str(tmp_path), "retention": {"rules": rules}},
        "destinations": {"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": pacs_port}},
    }
    path.write_text(json.dumps(told))
    return path


def test_from_dry_run_to_deleted(settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config(settings, environ={})
    sent = kept_and_routed(config, tmp_path / "sent", True)
    here = kept_and_routed(config, tmp_path / "here", False)

    def said(*words: str, status: int = 0) -> str:
        assert main([*words, "--config", str(settings)]) == status
        shown = capfd.readouterr()
        return shown.out + shown.err

    assert "1 deliveries are open" in said("delete", sent, "--yes", status=2)
    told = json.loads(said("retention", "--dry-run", "--json"))
    assert {one["study"]: one["goes"] for one in told["studies"]} == {sent: False, here: True}
    assert "1 deliveries are open" in said("retention", "--dry-run")
    deliver(config)
    assert json.loads(said("retention", "--dry-run", "--json"))["studies"][0]["safe"] == {"PACS": "found"}

    told_of: list[tuple[str, int]] = []
    catalog = node_catalog(config, SystemClock())
    service = Retention(catalog, config, SystemClock(), lambda rule, length: told_of.append((rule, length)))
    service.tick()
    assert [rule for rule, _ in told_of] == ["sent", "here"] and service.facts()["error"] == ""
    assert ("deletions_unfinished", (), 0) in list(service.readings())
    service.stop()
    catalog.close()
    assert "deleted by retention rule sent: 3 objects" in said("timeline", sent)
    assert "found at PACS" in said("timeline", sent)
    assert "Deleted on" in said("rules", "explain", here)
    assert "no study is due" in said("retention")

    again = kept_and_routed(config, tmp_path / "here", False)  # it comes again, and goes by a person's word
    assert "would be deleted" in said("delete", again, "--dry-run")
    assert "nobody to ask" in said("delete", again)
    assert "is deleted" in said("delete", again, "--yes") and f"no study {again}" in said("delete", again, status=2)
    assert "deleted by retention rule sent, and counted no more: 1 studies of 1 series" in said("ledger")
    deleted = {rule: {"studies": 1, "series": 1} for rule in ("here", "person", "sent")}
    assert json.loads(said("ledger", "--json"))["deleted"] == deleted
    assert said("fsck").endswith("archive and index agree\n")


def test_it_is_off_unless_it_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["retention", "--data-dir", str(tmp_path), "--config", "config/node.yaml"]) == 0
    assert "everything is kept" in capfd.readouterr().out


def test_a_node_that_runs_deletes_by_its_timer(
    tmp_path: Path, running_node: Callable[..., Any], wait_for: Callable[..., None]
) -> None:
    data = tmp_path / "node" / "data"
    config = NodeConfig(data_dir=data, storage=StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    study = kept_and_routed(config, tmp_path / "here", False)
    rules = [{"name": "here", "deliveries": "none", "older_than": "1h"}]
    node = running_node(retention={"every_s": 1.0, "rules": rules})

    def metrics() -> str:
        return str(node.get("/metrics")[1])

    wait_for(lambda: 'dicom_node_studies_deleted_total{rule="here"} 1.0' in metrics(), 60, "the deletion")
    assert "dicom_node_deletions_unfinished 0.0" in metrics()
    assert not list((data / "archive").glob("??/*.dcm")) and "study_deleted" in node.log.read_text()
    assert node.stop() == 0
    catalog = node_catalog(config, SystemClock())
    (deletion,) = catalog.queue.deletions(study)
    assert deletion.rule == "here" and deletion.ended_at is not None
    assert catalog.queue.ledger().totals["received"] == 0 and catalog.queue.audit_counts(repair=False) == []
    catalog.close()
