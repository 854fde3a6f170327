"""A second dicom-node as the engine of the first: series out by C-STORE, its SEG and SR back, and on to the PACS."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest

from dicom_node.config import packaged
from dicom_node.demo.phantom_dicom import write_ct_series, write_cxr
from dicom_node.model import Origin

ELSEWHERE = pytest.mark.engine_peers  # half a minute each: in `make test-peers`, with the other real engines
EXAMPLE = Path(__file__).resolve().parents[2] / "routing_rules" / "examples" / "dicom_engine.yaml"
FILMS = """
rule: films-to-ai-box
when: ['Modality in ["CR", "DX"]']
run: {engine: ai-box, results: [sr]}
send: {to: [sender], what: results}
"""


@pytest.fixture
def three(running_node: Callable[..., Any], free_port: Callable[[], int], tmp_path: Path) -> Callable[..., Any]:
    """`three(host)`: a PACS, a node whose engine `ai-box` is at `host`, and that engine: a node with models."""

    def start(host: str) -> tuple[Any, Any, Any]:
        rules = tmp_path / "rules"
        rules.mkdir()
        shutil.copy(EXAMPLE, rules)
        (rules / "films.yaml").write_text(FILMS)
        port = free_port()
        pacs = running_node("pacs", ae_titles=["PACS"], engines={}, jobs={"workers": 0})
        ai = running_node(
            "ai",
            ae_titles=["AI_NODE"],
            rules_dir=str(packaged("default_rules")),
            destinations={"NODE": {"ae_title": "DICOM_NODE", "host": "127.0.0.1", "port": port}},
            completion={"quiet_s": 0.5},
            jobs={"workers": 1},
        )
        node = running_node(
            "node",
            dicom_port=port,
            rules_dir=str(rules),
            peers={"pacs": {"ae_title": "PACS"}, "ai": {"ae_title": "AI_NODE", "is_engine": True}},
            destinations={"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": pacs.dicom_port}},
            engines={
                "ai-box": {
                    "kind": "dicom",
                    "options": {
                        "ae_title": "AI_NODE",
                        "host": host,
                        "port": ai.dicom_port,
                        "quiet_s": 2.0,
                        "poll_s": 1.0,
                        "unreferenced": "take",
                    },
                }
            },
            completion={"quiet_s": 0.5},
            jobs={"workers": 1, "lease_s": 2.0, "backoff_s": 0.2},
        )
        return pacs, node, ai

    return start


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "host",
    [pytest.param("127.0.0.1", id="identifiable", marks=ELSEWHERE), pytest.param("0.0.0.0", id="pseudonymised")],
)
def test_a_second_node_answers_and_its_results_reach_the_pacs_once(
    host: str,
    *,
    three: Callable[..., Any],
    eyes: Callable[[Any], Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    tmp_path: Path,
) -> None:
    pacs, node, ai = three(host)
    ct = write_ct_series(tmp_path / "ct", 810005, shape=(80, 128, 128), spacing_mm=(4.0, 3.0, 3.0))
    film = write_cxr(tmp_path / "film.dcm", 810002)
    for path in (tmp_path / "ct", tmp_path / "film.dcm"):
        assert storescu(node, path).returncode == 0
    ours, theirs = eyes(node), eyes(pacs)
    studies = (ct.study_instance_uid, film.study_instance_uid)

    def waiting() -> bool:
        return [job.state.value for study in studies for job in ours.jobs(study)] == ["waiting", "waiting"]

    wait_for(waiting, 60, f"the engine to have both; log:\n{node.tail()}")
    os.kill(node.pid("work"), signal.SIGKILL)  # whoever waited is gone; what is waited for is not
    for study in studies:
        wait_for(lambda study=study: ours.at_rest(study), 120, f"{study}; log:\n{node.tail()}\n{ai.tail()}")

    for study, kinds in ((studies[0], ["SEG", "SR"]), (studies[1], ["SR"])):
        (job,) = ours.jobs(study)
        assert job.state.value == "done", job.error
        results = ours.catalog.queue.job_results(job.id)
        assert [one.modality for one in results] == kinds
        arrived = {one.sop_instance_uid: one.sha256 for one in theirs.instances(study)}
        assert arrived == {one.sop_instance_uid: one.sha256 for one in results}, "delivered as it is kept"
        told = node.command("timeline", study).stdout
        assert "came back from AI_NODE: results of job" in told and "its answer is waited for" in told
    (seg,) = ours.of_modality(studies[0], "SEG")
    assert seg.origin is (Origin.RETURNED if host == "127.0.0.1" else Origin.PRODUCED)
    ds = pydicom.dcmread(seg.path)
    source = pydicom.dcmread(ours.of_modality(studies[0], "CT")[0].path, stop_before_pixels=True)
    assert (ds.PatientID, ds.PatientName, ds.FrameOfReferenceUID) == (
        *(source.PatientID, source.PatientName, source.FrameOfReferenceUID),
    )
    referred = {item.ReferencedSOPInstanceUID for item in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred <= {one.sop_instance_uid for one in ours.of_modality(studies[0], "CT")}
    for study in studies:
        (job,) = ours.jobs(study)
        for one in ours.catalog.queue.job_results(job.id):
            checked = subprocess.run([tool("dciodvfy"), one.path], text=True, capture_output=True, timeout=60)
            assert [text for text in checked.stderr.splitlines() if text.startswith("Error")] == [], one.modality
    status = json.loads(node.command("status", "--json").stdout)
    assert status["studies"]["total"] == 2 and status["ledger"]["imbalance"] == 0
    assert status["returned"] == {"taken": 3, "untaken": 0}
    assert 'dicom_node_returned_objects{state="taken"} 3.0' in node.get("/metrics")[1]
    if host != "127.0.0.1":
        seen = {one.study_instance_uid for study in studies for one in eyes(ai).instances(study)}
        assert not seen, "the engine knows the studies under other UIDs"
        assert str(source.PatientName) not in ai.log.read_text()


@pytest.mark.timeout(120)
@ELSEWHERE
def test_it_can_be_tried_by_hand(
    three: Callable[..., Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    eyes: Callable[[Any], Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    _, node, _ = three("0.0.0.0")
    film = write_cxr(tmp_path / "film.dcm", 810002)
    (node.rules_dir / "films.yaml").unlink()
    node.command("rules", "reload")
    assert storescu(node, tmp_path / "film.dcm").returncode == 0
    wait_for(lambda: eyes(node).catalog.queue.verdicts(film.study_instance_uid), 30, "the study to be routed")
    assert "answers C-ECHO with status 0x0000" in node.command("engines", "check", "ai-box").stdout
    said = node.command("engines", "run", "ai-box", film.study_instance_uid, "--out", str(tmp_path / "out")).stdout
    assert "came back, under UIDs of this run: SR" in said
    (written,) = (tmp_path / "out").iterdir()
    ours = pydicom.dcmread(tmp_path / "film.dcm", stop_before_pixels=True)
    assert pydicom.dcmread(written).PatientID == ours.PatientID
