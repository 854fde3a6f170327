"""The local engine from files to findings: phantoms and the demonstration models, hostile series and reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from pydicom.pixels import apply_modality_lut

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import WrittenSeries, write_ct_series, write_cxr
from dicom_node.errors import ConfigError, EngineRejected, EngineTimeout, LeaseLost, PackageError, SeriesRejected
from dicom_node.geometry import volume_geometry
from dicom_node.model import EngineTask
from dicom_node.models import segment
from dicom_node.models.engine import LocalModelEngine
from dicom_node.models.manifest import SegmentationManifest
from dicom_node.models.package import load_package
from dicom_node.models.volume import labels_of, network_values
from dicom_node.pixels import read_hounsfield, read_image
from dicom_node.plugins import encoder_kinds, engine_class, engine_kinds
from dicom_node.values import (
    EngineResult,
    Findings,
    LabelVolume,
    Measurements,
    Presence,
)

Task = Callable[..., EngineTask]


def nothing() -> None:
    """A heartbeat nobody listens to."""


@pytest.fixture(scope="module")
def ct_engine() -> Iterator[LocalModelEngine]:
    engine = LocalModelEngine("ct-abdomen", EngineSettings(model="demo-ct-abdomen", options={"threads": 1}))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def cxr_engine() -> Iterator[LocalModelEngine]:
    engine = LocalModelEngine("cxr-findings", EngineSettings(model="demo-cxr-findings", options={"threads": 1}))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> WrittenSeries:
    """An abdomen that shows everything, slices shuffled, Instance Numbers descending."""
    folder = tmp_path_factory.mktemp("ct")
    return write_ct_series(
        folder, 21, spleen=True, shape=(66, 128, 128), spacing_mm=(5, 3, 3), instance_numbers="descending"
    )


@pytest.fixture(scope="module")
def ct_result(ct: WrittenSeries, ct_engine: LocalModelEngine, task_for: Task) -> EngineResult:
    return ct_engine.run(task_for(ct.paths), nothing)


def _values(result: EngineResult) -> tuple[LabelVolume, Measurements]:
    labels, measurements = result.values
    assert isinstance(labels, LabelVolume) and isinstance(measurements, Measurements)
    return labels, measurements


def test_both_embedded_models_are_in_order(ct_engine: LocalModelEngine, cxr_engine: LocalModelEngine) -> None:
    ct_engine.check()
    cxr_engine.check()


def test_organs_are_found_where_they_are_slice_by_slice(ct: WrittenSeries, ct_result: EngineResult) -> None:
    labels, _ = _values(ct_result)
    assert labels.labels.dtype == np.uint8
    by_uid = dict(zip(labels.sop_instance_uids, labels.labels, strict=True))
    assert set(by_uid) == set(ct.sop_instance_uids)
    found = np.stack([by_uid[uid] for uid in ct.sop_instance_uids])
    for organ in labels.segments:
        a, b = found == organ.number, ct.labels == organ.number
        dice = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert dice > 0.8, organ.key


def test_planes_ascend_along_the_normal(ct: WrittenSeries, ct_result: EngineResult) -> None:
    labels, _ = _values(ct_result)
    assert labels.sop_instance_uids == ct.sop_instance_uids


def test_measurements_are_those_of_the_mask_on_the_source_grid(ct: WrittenSeries, ct_result: EngineResult) -> None:
    labels, measurements = _values(ct_result)
    paths = dict(zip(ct.sop_instance_uids, ct.paths, strict=True))
    sources = [pydicom.dcmread(paths[uid]) for uid in labels.sop_instance_uids]
    hu = np.stack([apply_modality_lut(ds.pixel_array, ds) for ds in sources])
    for item in measurements.items:
        assert item.presence is Presence.PRESENT
        mask = labels.labels == item.segment.number
        assert item.volume_cm3 == pytest.approx(mask.sum() * 5 * 3 * 3 / 1000)
        assert item.mean_hu == pytest.approx(hu[mask].mean(), abs=1e-6)


def test_the_same_series_gives_the_same_result_in_any_order(
    ct: WrittenSeries, ct_result: EngineResult, ct_engine: LocalModelEngine, task_for: Task
) -> None:
    task = task_for(ct.paths)
    again = ct_engine.run(dataclasses.replace(task, instances=task.instances[::-1]), nothing)
    np.testing.assert_array_equal(_values(again)[0].labels, _values(ct_result)[0].labels)
    assert _values(again)[1] == _values(ct_result)[1]
    assert again.provenance == ct_result.provenance


def test_every_stage_is_timed_and_the_model_is_named(ct_result: EngineResult) -> None:
    assert set(ct_result.stage_seconds) == {"load", "prepare", "wait", "forward", "finish"}
    provenance = ct_result.provenance
    assert provenance.name == "demo-ct-abdomen"
    assert provenance.demonstration and "not for clinical use" in provenance.notice
    assert provenance.device_uid.startswith("2.25.")
    assert {"device=cpu", "window=64x64x64"} <= set(provenance.parameters)


@pytest.mark.parametrize("direction", ["downwards", "sagittal"])
def test_orientation_of_the_stack_does_not_move_an_organ(
    direction: str, ct_folder: Path, tmp_path: Path, task_for: Task
) -> None:
    """The same phantom, laid out upside down or in sagittal planes, gives the same voxels of the patient."""
    axes = {
        "downwards": np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]]),
        "sagittal": np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]]),
    }[direction]
    engine = LocalModelEngine("ct", EngineSettings(model=str(ct_folder), options={"threads": 1}))
    centre, size = (0.0, -150.0, 0.0), (24, 24, 24)
    try:
        written = [
            write_ct_series(tmp_path / name, 5, shape=size, spacing_mm=(4, 4, 4), centre_mm=centre, direction=frame)
            for name, frame in (("plain", np.eye(3)), ("other", axes))
        ]
        if direction == "sagittal":
            with pytest.raises(EngineRejected, match="sagittal slices, the model takes axial ones"):
                engine.run(task_for(written[1].paths), nothing)
            return
        plain, other = (_values(engine.run(task_for(series.paths), nothing))[0].labels for series in written)
        # both stacks ascend along their own normals; the other one has rows and slices the other way round
        agreement = (plain == other[::-1, ::-1, :]).mean()
        assert agreement > 0.98
    finally:
        engine.close()


HOSTILE: list[tuple[str, dict[str, Any], type[EngineRejected], str]] = [
    ("a missing slice", {"missing_slices": [9]}, SeriesRejected, "missing slice: 1 position"),
    ("duplicated slices", {"duplicate_slices": [3, 4]}, SeriesRejected, "duplicate position: 2 of"),
    ("mixed orientation", {"mixed_orientation": 2}, SeriesRejected, "mixed orientation|Rows x Columns"),
    ("a tilted gantry", {"gantry_tilt_deg": 12.0}, SeriesRejected, "gantry tilt.*12"),
    ("jittering slices", {"slice_jitter_mm": 0.8}, SeriesRejected, "irregular spacing"),
    ("no position", {"omit": ["PixelSpacing"]}, SeriesRejected, "Pixel Spacing"),
    ("a knee", {"body_part": "KNEE"}, EngineRejected, "Body Part Examined is not ABDOMEN"),
    ("a scout", {"description": "Scout view"}, EngineRejected, "Series Description contains 'scout'"),
    ("few slices", {"shape": (6, 32, 32)}, EngineRejected, "6 slices, the model needs at least 10"),
    ("thick slices", {"spacing_mm": (9.0, 2.0, 2.0)}, EngineRejected, "9.00 mm, the model takes at most 8 mm"),
    ("two reasons", {"body_part": "KNEE", "description": "dose"}, EngineRejected, "Body Part.*; Series Description"),
]


@pytest.mark.parametrize(("options", "kind", "says"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_what_the_model_must_not_see_is_refused_with_a_reason(
    options: dict[str, Any],
    kind: type[EngineRejected],
    says: str,
    ct_engine: LocalModelEngine,
    tmp_path: Path,
    task_for: Task,
) -> None:
    series = write_ct_series(tmp_path, 3, **{"shape": (20, 32, 32), "spacing_mm": (4.0, 8.0, 8.0), **options})
    with pytest.raises(kind, match=says):
        ct_engine.run(task_for((*series.paths, *series.extra_paths)), nothing)


def test_an_mr_series_is_not_for_a_ct_model(ct_engine: LocalModelEngine, ct: WrittenSeries, task_for: Task) -> None:
    task = task_for(ct.paths)
    values = {**task.header.values, "Modality": ("MR",)}
    with pytest.raises(EngineRejected, match="Modality is not CT"):
        ct_engine.run(dataclasses.replace(task, header=dataclasses.replace(task.header, values=values)), nothing)


def test_a_removed_spleen_is_absent_where_its_place_was_seen(
    ct_engine: LocalModelEngine, tmp_path: Path, task_for: Task
) -> None:
    series = write_ct_series(tmp_path, 12, spleen=False, shape=(80, 112, 112), spacing_mm=(5, 4, 4), centre_mm=None)
    _, measurements = _values(ct_engine.run(task_for(series.paths), nothing))
    found = {item.segment.key: item for item in measurements.items}
    assert found["liver"].presence is Presence.PRESENT
    assert found["spleen"].presence is Presence.ABSENT
    assert found["spleen"].volume_cm3 is None and found["spleen"].mean_hu is None


def test_an_organ_outside_the_scan_is_undetermined_and_a_cut_one_says_so(
    ct_engine: LocalModelEngine, ct: WrittenSeries, task_for: Task
) -> None:
    # the lower part only: kidneys, a cut liver, no spleen in sight
    kidney = np.flatnonzero((ct.labels == 3).any(axis=(1, 2)))
    spleen = np.flatnonzero((ct.labels == 2).any(axis=(1, 2)))
    last = min(int(spleen[0]) - 1, int(kidney[-1]))
    low = max(0, last - 20)
    _, measurements = _values(ct_engine.run(task_for(ct.paths[low : last + 1]), nothing))
    found = {item.segment.key: item for item in measurements.items}
    assert found["spleen"].presence is Presence.UNDETERMINED
    assert found["spleen"].volume_cm3 is None
    assert "may not cover it" in found["spleen"].note or "tells where to look" in found["spleen"].note
    assert found["kidney"].presence is Presence.PRESENT
    assert "visible part only" in found["kidney"].note


# --- places: the patient position is encoded in the pixels, through the whole path and back


def _world_series(folder: Path, seed: int) -> list[Path]:
    """An axial-ish oblique stack whose HU are 2 x + 3 y + 5 z (mm, LPS, rounded)."""
    rng = np.random.default_rng(seed)
    turn = [float(a) for a in rng.uniform(-0.3, 0.3, 3)]
    frame = np.eye(3)
    for axis, angle in enumerate(turn):
        a, b = (i for i in range(3) if i != axis)
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        frame = step @ frame
    if seed % 2:
        frame[:, :2] *= -1  # prone
    spacing = rng.uniform((4.0, 1.5, 1.2), (6.0, 2.5, 2.8))
    weights, origin = np.array([2.0, 3.0, 5.0]), rng.uniform(-60, 10, 3)
    shape = (int(rng.integers(16, 24)), 40, 36)
    row, column = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    paths = []
    for k in rng.permutation(shape[0]):
        corner = origin + frame[:, 2] * spacing[0] * k
        place = corner + row[..., None] * spacing[1] * frame[:, 1] + column[..., None] * spacing[2] * frame[:, 0]
        ds = pydicom.dcmread(write_ct_series(folder / f"one{k}", 1, shape=(1, 4, 4)).paths[0])
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        ds.ImagePositionPatient = [f"{v:.9g}" for v in corner]
        ds.ImageOrientationPatient = [f"{v:.9g}" for v in (*frame[:, 0], *frame[:, 1])]
        ds.PixelSpacing = [f"{v:.9g}" for v in spacing[1:]]
        ds.Rows, ds.Columns = shape[1:]
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 15, 1
        ds.PixelData = np.rint(place @ weights + 1024).astype("<i2").tobytes()
        path = folder / f"{rng.integers(10**9)}.dcm"
        ds.save_as(path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("seed", range(6))
def test_no_voxel_moves_on_the_way_to_the_network_and_back(
    seed: int, ct_folder: Path, tmp_path: Path, task_for: Task
) -> None:
    manifest = load_package(ct_folder).manifest
    assert isinstance(manifest, SegmentationManifest)
    intensity = manifest.input.intensity.model_copy(update={"clip": (-3000.0, 3000.0), "to": (-3000.0, 3000.0)})
    wide = manifest.model_copy(update={"input": manifest.input.model_copy(update={"intensity": intensity})})
    paths = _world_series(tmp_path, seed)
    prepared = segment.prepare(wide, task_for(paths), nothing)
    # to the network: RAS, so the value must fall along X (to the right), fall along Y (to the front), rise along Z
    job, grid = segment.volume_job(wide, prepared.grid), prepared.grid
    volume = torch.from_numpy(prepared.volume_hu)
    values, _ = network_values(volume, grid, job["input"], torch.device("cpu"), nothing)
    seen = values.permute(grid.to_model_order())
    rises = [float(seen.diff(dim=axis).median()) > 0 for axis in range(3)]
    assert rises == [False, False, True]
    # back: a "network" that marks all places above a level; the mask must be cut at that level of the patient
    level = float(seen.median())
    logits = torch.full((4, *seen.shape), -1000.0)
    logits[0], logits[1] = 0.0, (seen - level) / 50
    whole = tuple(slice(0, n) for n in grid.shape)
    assert len(whole) == 3
    labels, _ = segment.finish(wide, prepared, labels_of(logits, grid, job["output"], whole, nothing), nothing)
    assert set(np.unique(labels.labels)) == {0, 1}
    for uid, plane in zip(labels.sop_instance_uids, labels.labels, strict=True):
        ds = pydicom.dcmread(next(path for path in paths if pydicom.dcmread(path).SOPInstanceUID == uid))
        values = ds.pixel_array.astype(float) - 1024
        away = np.abs(values - level) > 12  # 5 HU are 1 mm: rounding and the grid's ends stay below 2.5 mm
        np.testing.assert_array_equal(plane[away], (values > level)[away].astype(np.uint8))


def test_volume_and_affine_are_highdicoms(ct: WrittenSeries, ct_engine: LocalModelEngine, task_for: Task) -> None:
    import highdicom

    images = [read_image(instance) for instance in task_for(ct.paths).instances]
    geometry = volume_geometry([image.header for image in images])
    by_uid = {image.instance.sop_instance_uid: image for image in images}
    ours = read_hounsfield([by_uid[uid] for uid in geometry.sop_instance_uids])
    theirs = highdicom.get_volume_from_series(
        [pydicom.dcmread(path) for path in ct.paths], apply_presentation_lut=False
    )
    array, affine = theirs.array, theirs.affine
    if affine[:3, 0] @ geometry.affine[:3, 0] < 0:  # it stacks downwards
        affine = affine @ np.array([[-1, 0, 0, len(array) - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        array = array[::-1]
    np.testing.assert_allclose(geometry.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(ours, array)


# --- radiographs


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("sop_class", ["DX", "CR"])
def test_all_findings_of_a_radiograph_are_reported(
    photometric: str, sop_class: str, cxr_engine: LocalModelEngine, tmp_path: Path, task_for: Task
) -> None:
    image = write_cxr(
        tmp_path / "a.dcm", 4, rows=400, columns=380, photometric=photometric, view="PA", sop_class=sop_class
    )
    result = cxr_engine.run(task_for([image.path]), nothing)
    (findings,) = result.values
    assert isinstance(findings, Findings)
    assert findings.sop_instance_uid == image.sop_instance_uid
    assert len(findings.items) == 11
    for item in findings.items:
        assert item.confidence is not None and 0 <= item.confidence <= 1 and item.threshold is not None
        assert item.presence is (Presence.PRESENT if item.confidence >= item.threshold else Presence.ABSENT)


def test_both_photometric_interpretations_are_the_same_picture(
    cxr_engine: LocalModelEngine, tmp_path: Path, task_for: Task
) -> None:
    scores = []
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        image = write_cxr(tmp_path / f"{photometric}.dcm", 8, rows=400, columns=400, photometric=photometric, view="AP")
        (findings,) = cxr_engine.run(task_for([image.path]), nothing).values
        assert isinstance(findings, Findings)
        scores.append([item.confidence for item in findings.items])
    assert scores[0] == pytest.approx(scores[1], abs=5e-3)


def test_each_frontal_image_of_a_series_is_read_and_the_others_are_named(
    cxr_engine: LocalModelEngine, tmp_path: Path, task_for: Task
) -> None:
    images = [write_cxr(tmp_path / f"{k}.dcm", k, rows=300, columns=300, view="PA") for k in (1, 2)]
    lateral = write_cxr(tmp_path / "lateral.dcm", 3, rows=300, columns=300, view="PA")
    ds = pydicom.dcmread(lateral.path)
    ds.ViewPosition = "LL"
    ds.save_as(lateral.path)
    result = cxr_engine.run(task_for([*(image.path for image in images), lateral.path]), nothing)
    assert {value.sop_instance_uid for value in result.values if isinstance(value, Findings)} == {
        image.sop_instance_uid for image in images
    }
    for value in result.values:
        assert any("the view is not PA or AP" in note for note in value.notes)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"ViewPosition": "LL"}, "the view is not PA or AP"),
        ({"ViewPosition": None, "ViewCodeSequence": None}, "the view is not given"),
        ({"BodyPartExamined": "HAND"}, "Body Part Examined is not CHEST"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "FOR PROCESSING"),
        ({"Modality": "MG"}, "Modality is not"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "SOP class is not"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "in colour"),
    ],
)
def test_what_is_no_frontal_chest_film_is_refused_with_a_reason(
    attributes: dict[str, Any], says: str, cxr_engine: LocalModelEngine, tmp_path: Path, task_for: Task
) -> None:
    path = write_cxr(tmp_path / "a.dcm", 4, rows=300, columns=300, view="PA").path
    ds = pydicom.dcmread(path)
    for keyword, value in attributes.items():
        if value is None:
            if keyword in ds:
                del ds[keyword]
        else:
            setattr(ds, keyword, value)
    ds.save_as(path)
    with pytest.raises(EngineRejected, match=says):
        cxr_engine.run(task_for([path]), nothing)


def test_a_coded_view_is_enough(cxr_engine: LocalModelEngine, tmp_path: Path, task_for: Task) -> None:
    path = write_cxr(tmp_path / "a.dcm", 4, rows=300, columns=300, view="PA", omit=["ViewPosition"]).path
    assert "ViewCodeSequence" in pydicom.dcmread(path)
    task = task_for([path])
    coded = ([{"CodeValue": "272479007", "CodingSchemeDesignator": "SCT", "CodeMeaning": "postero-anterior"}],)
    values = {**task.header.values, "ViewCodeSequence": coded}
    task = dataclasses.replace(task, header=dataclasses.replace(task.header, values=values))
    assert len(cxr_engine.run(task, nothing).values) == 1


def test_an_image_without_contrast_is_not_scored(cxr_engine: LocalModelEngine, tmp_path: Path, task_for: Task) -> None:
    path = write_cxr(tmp_path / "a.dcm", 4, rows=300, columns=300, view="PA").path
    ds = pydicom.dcmread(path)
    ds.PixelData = np.full((300, 300), 700, np.uint16).tobytes()
    ds.save_as(path)
    (findings,) = cxr_engine.run(task_for([path]), nothing).values
    assert isinstance(findings, Findings)
    assert {item.presence for item in findings.items} == {Presence.UNDETERMINED}
    assert {item.confidence for item in findings.items} == {None}
    assert any("no contrast" in note for note in findings.notes)


# --- the engine itself


def test_a_lost_lease_stops_the_work(ct_engine: LocalModelEngine, ct: WrittenSeries, task_for: Task) -> None:
    def lost() -> None:
        raise LeaseLost("another worker owns this job")

    with pytest.raises(LeaseLost):
        ct_engine.run(task_for(ct.paths), lost)


def test_the_time_given_is_kept(ct_engine: LocalModelEngine, ct: WrittenSeries, task_for: Task) -> None:
    with pytest.raises(EngineTimeout):
        ct_engine.run(task_for(ct.paths, timeout_s=0.01), nothing)


@pytest.mark.parametrize(
    ("settings", "devices", "says"),
    [
        (EngineSettings(), ("auto",), "engines.x.model: missing"),
        (EngineSettings(model="demo-ct-abdomen", options={"wheels": 4}), ("auto",), "engines.x.options.wheels"),
        (EngineSettings(model="demo-ct-abdomen", options={"threads": -1}), ("auto",), "engines.x.options.threads"),
        (EngineSettings(model="demo-ct-abdomen"), (), "jobs.devices"),
    ],
)
def test_wrong_settings_are_named(settings: EngineSettings, devices: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LocalModelEngine("x", settings, devices=devices)


def test_an_engine_without_a_package_says_so_on_check() -> None:
    with pytest.raises(PackageError, match="no-such-model"):
        LocalModelEngine("x", EngineSettings(model="no-such-model")).check()


def test_plug_ins_are_found_by_their_word() -> None:
    assert engine_class("local") is LocalModelEngine
    assert "local" in engine_kinds()
    assert encoder_kinds()[:3] == ("seg", "labelmap", "sr")
    with pytest.raises(ConfigError, match=r"engine kind 'triton' is not known \(known: local"):
        engine_class("triton")
