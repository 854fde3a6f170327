"""Orthanc as the destination PACS: down at first, then up; a live destination beside it is not held up."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.config import packaged
from dicom_node.demo.phantom_dicom import write_ct_series, write_cxr

pytestmark = pytest.mark.peers


@pytest.mark.timeout(240)
def test_results_reach_an_orthanc_that_was_down_and_hold_up_nobody_meanwhile(
    running_node: Callable[..., Any],
    orthanc: Callable[[int, int, int], Any],
    eyes: Callable[[Any], Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    free_port: Callable[[], int],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    pacs = running_node("pacs", ae_titles=["PACS"], engines={}, jobs={"workers": 0})
    http, dicom = free_port(), free_port()
    node = running_node(
        "node",
        rules_dir=str(packaged("default_rules")),
        destinations={
            "orthanc": {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": dicom},
            "PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": pacs.dicom_port},
        },
        completion={"quiet_s": 1.0},
        delivery={"backoff_s": 0.5, "backoff_max_s": 1.0, "breaker_probe_s": 1.0},
    )
    ours = eyes(node)
    ct = write_ct_series(tmp_path / "ct", 840005, shape=(80, 96, 96), spacing_mm=(4.0, 4.0, 4.0))
    film = write_cxr(tmp_path / "film.dcm", 840002)
    assert storescu(node, tmp_path / "ct", calling="ORTHANC").returncode == 0
    assert storescu(node, tmp_path / "film.dcm", calling="PACS").returncode == 0

    wait_for(lambda: ours.at_rest(film.study_instance_uid), 90, f"the live destination; log:\n{node.tail()}")
    wait_for(lambda: ours.catalog.queue.stuck(), 90, "the down one to be shown as stuck")
    assert any("orthanc" in one.name for one in ours.catalog.queue.stuck()), ours.catalog.queue.stuck()
    wait_for(lambda: 'circuit_state{destination="orthanc"} 1.0' in node.get("/metrics")[1], 30, "the breaker to open")
    metrics = node.get("/metrics")[1]
    assert 'circuit_state{destination="PACS"} 0.0' in metrics and "dicom_node_undelivered_bytes 0.0" not in metrics

    peer = orthanc(http, dicom, node.dicom_port)
    wait_for(lambda: ours.at_rest(ct.study_instance_uid), 60, f"Orthanc to get its results; log:\n{node.tail()}")
    results = {one.sop_instance_uid for one in ours.instances(ct.study_instance_uid) if one.modality in ("SEG", "SR")}
    arrived = {peer.call(f"/instances/{one}/tags?simplify")["SOPInstanceUID"] for one in peer.call("/instances")}
    assert arrived == results and len(results) >= 2
