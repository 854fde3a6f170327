"""One study all the way: received, kept, routed, analysed, encoded, delivered, found, fetched."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from dicom_node.demo.phantom_dicom import write_ct_series, write_cxr

SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"


def _dice(fetched_seg: Path, written: Any, label: int) -> float:
    """Dice of one segment, read as any reader would: frames to slices by the instance they refer to."""
    ds = pydicom.dcmread(fetched_seg)
    frames = np.atleast_3d(ds.pixel_array)
    found = np.zeros(written.labels.shape, bool)
    rows = {uid: index for index, uid in enumerate(written.sop_instance_uids)}
    for frame, groups in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
        if int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber) == label:
            source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            found[rows[source]] = frame.astype(bool)
    truth = written.labels == label
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


@pytest.mark.timeout(240)
def test_a_ct_and_a_radiograph_go_through_and_their_results_come_back(
    pair: Callable[..., tuple[Any, Any]],
    eyes: Callable[[Any], Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    tool: Callable[[str], str],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    pacs, node = pair()
    ct = write_ct_series(tmp_path / "ct", 810005, shape=(80, 128, 128), spacing_mm=(4.0, 3.0, 3.0))
    film = write_cxr(tmp_path / "film.dcm", 810002)
    for path in (tmp_path / "ct", tmp_path / "film.dcm"):
        sent = storescu(node, path)
        assert sent.returncode == 0, sent.stderr
    ours, theirs = eyes(node), eyes(pacs)
    for study in (ct.study_instance_uid, film.study_instance_uid):
        wait_for(lambda study=study: ours.at_rest(study), 120, f"{study}; log:\n{node.tail()}")

    # once-only, and in the PACS exactly what is here
    jobs = ours.jobs(ct.study_instance_uid) + ours.jobs(film.study_instance_uid)
    assert [job.state.value for job in jobs] == ["done", "done"], [job.error for job in jobs]
    for study, kinds in ((ct.study_instance_uid, [SEG, SR]), (film.study_instance_uid, [SR])):
        results = [one for one in ours.instances(study) if one.modality in ("SEG", "SR")]
        assert sorted(one.sop_class_uid for one in results) == sorted(kinds)
        arrived = {one.sop_instance_uid: one.sha256 for one in theirs.instances(study)}
        assert arrived == {one.sop_instance_uid: one.sha256 for one in results}

    # found and fetched by a foreign client
    found = subprocess.run(
        [tool("findscu"), "-S", "-aec", "PACS", "127.0.0.1", str(pacs.dicom_port), "-k", "QueryRetrieveLevel=SERIES",
         "-k", f"StudyInstanceUID={ct.study_instance_uid}", "-k", "Modality=SEG", "-k", "SeriesInstanceUID"],
        text=True, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert "SEG" in found.stdout + found.stderr
    into = tmp_path / "fetched"
    into.mkdir()
    subprocess.run(
        [tool("getscu"), "-S", "+B", "-od", str(into), "-aec", "PACS", "127.0.0.1", str(pacs.dicom_port),
         "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={ct.study_instance_uid}"],
        check=True, timeout=60, capture_output=True,
    )  # fmt: skip
    segs = [path for path in into.iterdir() if pydicom.dcmread(path, stop_before_pixels=True).Modality == "SEG"]
    assert len(segs) == 1
    for label, floor in ((1, 0.9), (2, 0.85), (3, 0.85)):
        assert _dice(segs[0], ct, label) >= floor, f"segment {label}"

    # explained, counted, balanced
    explained = node.command("rules", "explain", ct.study_instance_uid).stdout
    assert "ct-abdomen" in explained and "chest-xray" in explained
    status = json.loads(node.command("status", "--json").stdout)
    assert status["ledger"]["imbalance"] == 0 and status["ledger"]["routed"] == 2
    metrics = node.get("/metrics")[1]
    assert "dicom_node_ledger_imbalance_studies 0.0" in metrics and "dicom_node_undelivered_bytes 0.0" in metrics
    matched = re.search(r'dicom_node_rule_last_match_timestamp_seconds\{rule="ct-abdomen"\} (\S+)', metrics)
    assert matched and 0 < time.time() - float(matched[1]) < 300

    # the same study again changes nothing; a forced run makes a second, linked result
    assert storescu(node, tmp_path / "film.dcm").returncode == 0
    before = {one.sop_instance_uid for one in ours.of_modality(film.study_instance_uid, "SR")}
    node.command("route", film.study_instance_uid, "--again")
    wait_for(lambda: len(ours.jobs(film.study_instance_uid)) == 2, 30, "the second job")
    wait_for(lambda: ours.at_rest(film.study_instance_uid), 60, f"the second run; log:\n{node.tail()}")
    reports = ours.of_modality(film.study_instance_uid, "SR")
    assert len(reports) == 2
    newest = next(one for one in reports if one.sop_instance_uid not in before)
    predecessor = pydicom.dcmread(newest.path).PredecessorDocumentsSequence[0]
    named = predecessor.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert named in before
    assert "PHANTOM" not in node.log.read_text(), "a patient's name is in the log"
