"""A CT series through a node and a real MONAI Label server: SEG and SR in the PACS, right to the voxel."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from dicom_node.demo.phantom_dicom import WrittenSeries, write_ct_series
from dicom_node.model import JobState

ROOT = Path(__file__).resolve().parents[2]
RULE = ROOT / "routing_rules" / "examples" / "monai_label.yaml"
SHAPE, SPACING = (14, 64, 80), (4.0, 3.1, 3.3)
SOFT, BONE = 20, 150  # as in monai_label_app
SEG, SR = "SEG", "SR"


@pytest.fixture
def oblique(tmp_path: Path) -> WrittenSeries:
    """A CT phantom whose planes are turned about all three axes."""
    frame = np.eye(3)
    for axis, degrees in enumerate((20.0, -15.0, 35.0)):
        one, other = (k for k in range(3) if k != axis)
        turn, angle = np.eye(3), np.radians(degrees)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        frame = turn @ frame
    return write_ct_series(tmp_path / "ct", 840011, shape=SHAPE, spacing_mm=SPACING, direction=frame)


def _engine(peer: Any, *, model: str = "threshold", timeout_s: float = 120.0, **options: Any) -> dict[str, Any]:
    settings = {"base_url": peer.url, "retries": 1, "backoff_s": 0.1, "breaker_rest_s": 1.0, **options}
    return {"monai-label": {"kind": "monai_label", "model": model, "timeout_s": timeout_s, "options": settings}}


QUICK = {"jobs": {"backoff_s": 0.5, "backoff_max_s": 1.0, "lease_s": 5.0}}


# --- the judge: source files and the SEG, each read on its own, meet in patient coordinates --------------------------


def _source(written: WrittenSeries) -> tuple[Any, Any]:
    """(slice, row, column) HU of the files, and the 4 x 4 from those indices to patient coordinates in mm."""
    images = [pydicom.dcmread(path) for path in written.paths]
    first, last = images[0], images[-1]
    hu = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in images])
    along_row, along_column = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    start, end = (np.array(ds.ImagePositionPatient, float) for ds in (first, last))
    affine = np.eye(4)
    affine[:3, 0] = (end - start) / (len(images) - 1)
    affine[:3, 1] = along_column * float(first.PixelSpacing[0])
    affine[:3, 2] = along_row * float(first.PixelSpacing[1])
    affine[:3, 3] = start
    return hu, affine


def _assert_in_place(volume: Path, written: WrittenSeries) -> None:
    """Every voxel that was sent lies where it lies in the patient and has its HU there."""
    image: Any = nibabel.load(volume)
    hu, affine = _source(written)
    indices = np.argwhere(np.ones(image.shape, bool))
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # NIfTI's x is to the right, y to the front
    index = (np.linalg.inv(affine) @ to_lps @ np.c_[indices, np.ones(len(indices))].T).T[:, :3]
    assert np.abs(index - np.rint(index)).max() < 1e-3
    assert np.array_equal(np.asarray(image.dataobj).reshape(-1), hu[tuple(np.rint(index).astype(int).T)])


def _painted(seg: Path, affine: Any, shape: tuple[int, ...], tool: Callable[[str], str], into: Path) -> dict[str, Any]:
    """The mask of each segment on the source grid, as dcmqi reads the SEG; only where its voxels lie is trusted."""
    into.mkdir()
    command = [tool("segimage2itkimage"), "--inputDICOM", str(seg), "--outputDirectory", str(into), "-t", "nii"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    described = json.loads((into / "meta.json").read_text())["segmentAttributes"]
    masks = {}
    for number, (segment,) in enumerate(described, start=1):
        image: Any = nibabel.load(next(into.glob(f"{number}.nii*")))
        found = np.argwhere(np.asarray(image.dataobj) > 0)
        to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # NIfTI's x is to the right, y to the front
        index = (np.linalg.inv(affine) @ to_lps @ np.c_[found, np.ones(len(found))].T).T[:, :3]
        assert np.abs(index - np.rint(index)).max() < 1e-3, "voxels of the SEG lie between those of the images"
        mask = np.zeros(shape, bool)
        mask[tuple(np.rint(index).astype(int).T)] = True
        assert mask.sum() == len(found)
        masks[segment["SegmentLabel"]] = mask
    return masks


def _assert_right(line: Any, written: WrittenSeries, tool: Callable[[str], str], scratch: Path) -> None:
    """One SEG that equals the thresholds on every voxel, SRs that tell volume and mean of them; all in the PACS."""
    (job,) = line.jobs(written.study_instance_uid)
    assert job.state is JobState.DONE, job.error
    arrived = line.arrived(written.study_instance_uid)
    assert sorted(one.modality for one in arrived) == [SEG, SR]
    (seg,) = [Path(one.path) for one in arrived if one.modality == SEG]
    hu, affine = _source(written)
    truth = {"soft tissue": (hu >= SOFT) & (hu < BONE), "bone": hu >= BONE}
    assert all(0 < mask.sum() < mask.size for mask in truth.values())
    masks = _painted(seg, affine, hu.shape, tool, scratch / "seg")
    assert set(masks) == set(truth)
    for name, mask in truth.items():
        assert np.array_equal(masks[name], mask), f"{name}: {np.count_nonzero(masks[name] != mask)} voxels differ"
    (report,) = [pydicom.dcmread(one.path) for one in arrived if one.modality == SR]
    told = sorted(float(value) for value, unit in _numbers(report) if unit == "cm3")
    voxel_cm3 = np.prod(SPACING) / 1000
    assert told == pytest.approx(sorted(mask.sum() * voxel_cm3 for mask in truth.values()), rel=1e-4)
    means = sorted(float(value) for value, unit in _numbers(report) if unit == "[hnsf'U]")
    assert means == pytest.approx(sorted(hu[mask].mean() for mask in truth.values()), abs=0.01)


def _numbers(ds: Dataset) -> Iterator[tuple[str, str]]:
    for item in ds.get("ContentSequence", ()):
        if item.ValueType == "NUM":
            value = item.MeasuredValueSequence[0]
            yield str(value.NumericValue), str(value.MeasurementUnitsCodeSequence[0].CodeValue)
        yield from _numbers(item)


def _log(peer: Any, since: int) -> str:
    return str((peer.folder / "log").read_text(errors="replace")[since:])


def _sessions(peer: Any) -> list[Path]:
    return list((peer.folder / ".cache" / "monailabel" / "sessions").glob("*/"))


@contextmanager
def _held(hold: Path) -> Iterator[Callable[[], bool]]:
    """The model works on for as long as the block lasts; what is yielded tells whether it has begun."""
    hold.touch()
    try:
        yield hold.with_suffix(".held").exists
    finally:
        hold.unlink()


# --- the line --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize("session", [False, True], ids=["file", "session"])
def test_an_oblique_ct_comes_back_as_seg_and_sr_that_are_right_to_the_voxel(
    monai_label: Any,
    line: Callable[..., Any],
    send: Callable[..., None],
    tool: Callable[[str], str],
    oblique: WrittenSeries,
    tmp_path: Path,
    *,
    session: bool,
) -> None:
    since = (monai_label.folder / "log").stat().st_size
    running = line(RULE, _engine(monai_label, session=session))
    send(running, tmp_path / "ct")
    running.settle(oblique.study_instance_uid, 180)
    _assert_right(running, oblique, tool, tmp_path)
    log = _log(monai_label, since)
    assert log.count("POST /infer/threshold") == 1 and log.count("PUT /session/") == int(session)
    assert _sessions(monai_label) == []
    assert "PHANTOM" not in log and oblique.series_instance_uid not in log


@pytest.mark.timeout(600)
def test_nothing_found_is_a_report_and_no_segmentation(
    monai_label: Any, line: Callable[..., Any], send: Callable[..., None], oblique: WrittenSeries, tmp_path: Path
) -> None:
    running = line(RULE, _engine(monai_label, params={"above": 5000}))
    send(running, tmp_path / "ct")
    running.settle(oblique.study_instance_uid, 180)
    assert [job.state for job in running.jobs(oblique.study_instance_uid)] == [JobState.DONE]
    assert [one.modality for one in running.arrived(oblique.study_instance_uid)] == [SR]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kept", [True, False], ids=["session kept", "session lost"])
def test_a_server_that_is_killed_in_the_middle_is_waited_for(
    monai_label: Any,
    line: Callable[..., Any],
    send: Callable[..., None],
    tool: Callable[[str], str],
    wait_for: Callable[..., None],
    oblique: WrittenSeries,
    tmp_path: Path,
    *,
    kept: bool,
) -> None:
    since, hold = (monai_label.folder / "log").stat().st_size, tmp_path / "hold"
    running = line(RULE, _engine(monai_label, session=True, params={"hold": str(hold)}), **QUICK)

    def job() -> Any:
        return running.jobs(oblique.study_instance_uid)[0]

    with _held(hold) as begun:
        send(running, tmp_path / "ct")
        wait_for(begun, 60, f"the model to begin; log:\n{running.node.tail()}")
        monai_label.end(signal.SIGKILL)
    try:
        wait_for(lambda: job().outages >= 3, 60, f"the job to wait; log:\n{running.node.tail()}")
        waiting = job()
        assert waiting.state in (JobState.PENDING, JobState.LEASED), waiting
        assert waiting.attempts - waiting.outages == int(waiting.state is JobState.LEASED), waiting  # none counted
        assert "cannot be reached" in waiting.error, waiting.error
        (session,) = _sessions(monai_label)
        _assert_in_place(session / "volume.nii.gz", oblique)
        if not kept:
            shutil.rmtree(session)
    finally:
        monai_label.start()
    running.settle(oblique.study_instance_uid, 180)
    _assert_right(running, oblique, tool, tmp_path)
    assert _log(monai_label, since).count("PUT /session/") == (1 if kept else 2)
    assert _sessions(monai_label) == []


@pytest.mark.timeout(600)
def test_series_take_turns_at_a_server_that_answers_nobody_while_it_works(
    monai_label: Any,
    line: Callable[..., Any],
    send: Callable[..., None],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    hold = tmp_path / "hold"
    both = [write_ct_series(tmp_path / "ct" / str(seed), seed, shape=(10, 32, 32)) for seed in (840021, 840022)]
    running = line(RULE, _engine(monai_label, read_timeout_s=60, params={"hold": str(hold)}), **QUICK)
    with _held(hold) as begun:
        send(running, tmp_path / "ct")
        wait_for(begun, 60, f"the model to begin; log:\n{running.node.tail()}")
        wait_for(lambda: all(running.jobs(one.study_instance_uid) for one in both), 30, "both to be routed")
        checked = running.node.command("engines", "check", "monai-label", check=False)
        assert checked.returncode == 2 and "answers nobody while" in checked.stderr, checked.stderr
    for one in both:
        running.settle(one.study_instance_uid, 180)
        (job,) = running.jobs(one.study_instance_uid)
        assert (job.state, job.attempts) == (JobState.DONE, 1), job.error


@pytest.mark.timeout(600)
def test_an_app_that_fails_gets_the_series_once_more_and_then_never(
    monai_label: Any, line: Callable[..., Any], send: Callable[..., None], oblique: WrittenSeries, tmp_path: Path
) -> None:
    since = (monai_label.folder / "log").stat().st_size
    running = line(RULE, _engine(monai_label, params={"above": "no number"}), **QUICK)
    send(running, tmp_path / "ct")
    running.settle(oblique.study_instance_uid, 180)
    (job,) = running.jobs(oblique.study_instance_uid)
    assert job.state is JobState.FAILED and "answered with status 500" in job.error, job
    assert _log(monai_label, since).count("POST /infer/threshold") == 2
    assert running.arrived(oblique.study_instance_uid) == []


@pytest.mark.timeout(600)
def test_a_model_the_server_does_not_have_is_a_reason_that_says_which_it_has(
    monai_label: Any,
    line: Callable[..., Any],
    send: Callable[..., None],
    wait_for: Callable[..., None],
    oblique: WrittenSeries,
    tmp_path: Path,
) -> None:
    running = line(RULE, _engine(monai_label, model="nonsuch"), **QUICK)
    send(running, tmp_path / "ct")
    reason = "has no model 'nonsuch' (offered: threshold)"
    wait_for(
        lambda: [reason in job.error for job in running.jobs(oblique.study_instance_uid)] == [True],
        60,
        f"the reason; log:\n{running.node.tail()}",
    )
    (job,) = running.jobs(oblique.study_instance_uid)
    assert job.state in (JobState.PENDING, JobState.LEASED) and job.attempts - job.outages <= 1
    checked = running.node.command("engines", "check", "monai-label", check=False)
    assert checked.returncode == 2 and reason in checked.stderr


@pytest.mark.timeout(600)
def test_engines_list_check_and_run_by_hand(
    monai_label: Any,
    line: Callable[..., Any],
    send: Callable[..., None],
    oblique: WrittenSeries,
    tool: Callable[[str], str],
    tmp_path: Path,
) -> None:
    running = line(RULE, _engine(monai_label))
    assert re.search(r"monai-label +monai_label .* ready", running.node.command("engines", "list").stdout)
    checked = running.node.command("engines", "check", "monai-label").stdout
    for told in ("monai-label: can run", "MONAILabel - Threshold", "threshold (segmentation)", "1 soft tissue, 2 bone"):
        assert told in checked, checked
    send(running, tmp_path / "ct")
    running.settle(oblique.study_instance_uid, 180)
    out = tmp_path / "out"
    said = running.node.command("engines", "run", "monai-label", oblique.study_instance_uid, "--out", str(out)).stdout
    assert "soft tissue" in said and "bone" in said, said
    written = {pydicom.dcmread(path).Modality: path for path in out.iterdir()}
    assert sorted(written) == [SEG, SR]
    hu, affine = _source(oblique)
    masks = _painted(written[SEG], affine, hu.shape, tool, tmp_path / "by hand")
    assert np.array_equal(masks["bone"], hu >= BONE)
    assert len(running.arrived(oblique.study_instance_uid)) == 2  # by hand nothing is sent
