"""Storage commitment between whole nodes, and with Orthanc, in both roles: what is delivered is committed to."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.model import DeliveryState

RULE = "rule: onward\nwhen: ['Modality == \"CT\"']\nsend: {to: [PACS], what: source}\n"
QUICK = {"lease_s": 3.0, "backoff_s": 0.2, "backoff_max_s": 1.0, "breaker_probe_s": 1.0, "response_timeout_s": 5.0}
ALONE = {"engines": {}, "jobs": {"workers": 0}}


def _peer(ae_title: str, port: int = 0) -> dict[str, Any]:
    asks = {"storage_commitment": True, "report_host": "127.0.0.1", "report_port": port} if port else {}
    return {"ae_title": ae_title, **asks}


def _ct(folder: Path, seed: int) -> Any:
    return write_ct_series(folder, seed, shape=(5, 16, 16), spacing_mm=(4.0, 4.0, 4.0))


def _rules(node_folder: Path) -> str:
    node_folder.mkdir(parents=True)
    (node_folder / "onward.yaml").write_text(RULE)
    return str(node_folder)


def _state(eyes: Any, study: str) -> list[DeliveryState]:
    return [delivery.state for delivery in eyes.catalog.queue.deliveries(study_instance_uid=study)]


@pytest.mark.timeout(240)
def test_a_delivery_is_done_when_the_destination_committed_whatever_dies_meanwhile(
    running_node: Callable[..., Any],
    eyes: Callable[[Any], Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    free_port: Callable[[], int],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    ours, theirs = free_port(), free_port()
    pacs = running_node(
        "pacs",
        ae_titles=["PACS"],
        dicom_port=theirs,
        peers={"node": _peer("DICOM_NODE", ours)},
        delivery=QUICK,
        **ALONE,
    )
    settings = {
        "dicom_port": ours,
        "rules_dir": _rules(tmp_path / "rules"),
        "peers": {"scanner": _peer("CT1"), "PACS": _peer("PACS")},
        "destinations": {
            "PACS": {
                **{"ae_title": "PACS", "host": "127.0.0.1", "port": theirs},
                "storage_commitment": {"timeout_s": 2.0, "wait_s": 0.0},  # so that the report comes on its own
            }
        },
        "completion": {"quiet_s": 0.3},
        "delivery": QUICK,
        **ALONE,
    }
    node = running_node("node", **settings)
    mine, yours = eyes(node), eyes(pacs)

    def send(number: int) -> str:
        series = _ct(tmp_path / f"ct-{number}", 860000 + number)
        assert storescu(node, tmp_path / f"ct-{number}", calling="CT1").returncode == 0
        return str(series.study_instance_uid)

    def committed(study: str) -> None:
        what = f"the delivery to be committed to; {node.tail()}"
        wait_for(lambda: _state(mine, study) == [DeliveryState.DONE], 60, what)
        (delivery,) = mine.catalog.queue.deliveries(study_instance_uid=study)
        assert len(delivery.items) == 5 and all(item.committed for item in delivery.items)
        for item in delivery.items:
            kept = item.instance
            assert mine.catalog.queue.committed_by(kept.sop_instance_uid, kept.sha256) == ["PACS"]
        assert len(yours.instances(study)) == 5

    study = send(0)
    committed(study)
    told = [event.text for event in mine.catalog.queue.timeline(study)]
    assert told[-1] == "delivered to PACS: 5 objects, it committed to 5"
    assert any(text == "DICOM_NODE was told: committed to 5" for text in _texts(yours, study))

    for number, (there, here) in enumerate((("receiver", "service"), ("service", "receiver")), start=1):
        study = send(number)
        wait_for(lambda study=study: _state(mine, study), 30, "a delivery")
        os.kill(pacs.pid(there), signal.SIGKILL)
        os.kill(node.pid(here), signal.SIGKILL)
        committed(study)

    pacs.process.kill()
    pacs.process.wait(timeout=10)
    study = send(3)
    wait_for(lambda: mine.catalog.queue.stuck(), 30, "the delivery to be shown as waiting")
    running_node(
        "pacs",
        ae_titles=["PACS"],
        dicom_port=theirs,
        peers={"node": _peer("DICOM_NODE", ours)},
        delivery=QUICK,
        **ALONE,
    )
    committed(study)
    page = node.get("/metrics")[1]
    assert 'dicom_node_deliveries{destination="PACS",state="done"} 4.0' in page
    assert 'dicom_node_deliveries{destination="PACS",state="committing"} 0.0' in page


def _texts(eyes: Any, study: str) -> list[str]:
    return [event.text for event in eyes.catalog.queue.timeline(study)]


@pytest.mark.peers
@pytest.mark.timeout(240)
def test_orthanc_asks_and_is_asked(
    running_node: Callable[..., Any],
    orthanc: Callable[[int, int, int], Any],
    eyes: Callable[[Any], Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    free_port: Callable[[], int],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    http, dicom = free_port(), free_port()
    node = running_node(
        "node",
        rules_dir=_rules(tmp_path / "rules"),
        peers={"scanner": _peer("CT1"), "orthanc": _peer("ORTHANC", dicom)},
        destinations={
            "PACS": {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": dicom, "storage_commitment": True},
        },
        completion={"quiet_s": 0.3},
        delivery=QUICK,
        **ALONE,
    )
    peer, mine = orthanc(http, dicom, node.dicom_port), eyes(node)

    # the node asks Orthanc, which reports on an association of its own
    series = _ct(tmp_path / "ct", 861000)
    assert storescu(node, tmp_path / "ct", calling="CT1").returncode == 0
    study = str(series.study_instance_uid)
    wait_for(lambda: _state(mine, study) == [DeliveryState.DONE], 60, f"Orthanc to commit; {node.tail()}")
    (delivery,) = mine.catalog.queue.deliveries(study_instance_uid=study)
    assert all(item.committed for item in delivery.items) and len(delivery.items) == 5

    # Orthanc asks the node about what both have, and about what the node never had
    kept = [
        {"SOPClassUID": item.instance.sop_class_uid, "SOPInstanceUID": item.instance.sop_instance_uid}
        for item in delivery.items
    ]
    unknown = {"SOPClassUID": kept[0]["SOPClassUID"], "SOPInstanceUID": "1.2.3.4"}

    def asked(instances: list[dict[str, str]]) -> dict[str, Any]:
        ticket = peer.call("/modalities/node/storage-commitment", {"DicomInstances": instances})
        report: dict[str, Any] = {}

        def is_told() -> bool:
            report.update(peer.call(ticket["Path"]))
            return bool(report["Status"] != "Pending")

        wait_for(is_told, 30, f"Orthanc to be told; {node.tail()}")
        return report

    assert asked(kept)["Status"] == "Success"
    report = asked([*kept, unknown])
    assert report["Status"] == "Failure" and len(report["Success"]) == 5
    (failure,) = report["Failures"]
    assert (failure["SOPInstanceUID"], failure["FailureReason"]) == ("1.2.3.4", 0x0112)
    assert any(text == "ORTHANC was told: committed to 5" for text in _texts(mine, study))
