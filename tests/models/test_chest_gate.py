"""What is taken for a frontal chest radiograph by its pixels, and what is not whatever its header says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from dicom_node.chest_gate import not_frontal_chest
from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_ct import ct_phantom
from dicom_node.demo.phantom_cxr import FINDING_NAMES, cxr_phantom
from dicom_node.demo.phantom_dicom import write_cxr
from dicom_node.model import EngineTask
from dicom_node.models.engine import LocalModelEngine
from dicom_node.radiograph import prepare_radiograph, prepare_xrv
from dicom_node.values import Findings, Presence

Picture = NDArray[np.floating]
SIDE = 160
SEEDS = range(5000, 5040)
EVERYTHING = dict.fromkeys(FINDING_NAMES, True)


def _collimated(image: Picture, rng: np.random.Generator) -> Picture:
    framed = image.copy()
    top, bottom, left, right = (int(n) for n in rng.integers(1, SIDE // 8, 4))
    framed[:top] = framed[-bottom:] = 0
    framed[:, :left] = framed[:, -right:] = 0
    return framed


def _labelled(image: Picture) -> Picture:
    written = image.copy()
    written[4:16, 4:30] = 1
    written[-20:-10, 100:140] = 1
    return written


@pytest.mark.parametrize("made", ["plain", "every finding", "collimated", "labelled"])
@pytest.mark.parametrize("prepare", [prepare_radiograph, prepare_xrv])
def test_frontal_films_pass_99_times_in_100(made: str, prepare: Callable[[Picture, int], Picture]) -> None:
    refused = []
    for seed in SEEDS:
        image: Picture = cxr_phantom(seed, SIDE, SIDE, findings=EVERYTHING if made == "every finding" else None).image
        if made == "collimated":
            image = _collimated(image, np.random.default_rng(seed))
        if made == "labelled":
            image = _labelled(image)
        if not_frontal_chest(prepare(image, 192)):
            refused.append(seed)
    assert len(refused) <= 0.01 * len(SEEDS), refused


def _grid() -> tuple[Picture, Picture]:
    v, u = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    return u, v


def _texture(rng: np.random.Generator) -> Picture:
    """Power falls with frequency as in photographs of nature."""
    frequency = np.fft.fftfreq(SIDE)
    radius = np.hypot(*np.meshgrid(frequency, frequency)) + 0.005
    spectrum = np.fft.fft2(rng.standard_normal((SIDE, SIDE))) / radius ** rng.uniform(1, 2)
    return np.asarray(np.fft.ifft2(spectrum).real)


def _skull(rng: np.random.Generator) -> Picture:
    u, v = _grid()
    radius = np.hypot(u / rng.uniform(0.5, 0.9), v / rng.uniform(0.5, 0.95))
    return np.asarray((radius < 1) * 0.6 + (np.abs(radius - 1) < 0.08) * 0.5)


def _limb(rng: np.random.Generator) -> Picture:
    across, width = np.abs(_grid()[0] - rng.uniform(-0.2, 0.2)), rng.uniform(0.15, 0.5)
    return np.asarray((across < width) * 0.4 + (across < width / 2) * 0.4)


def _hand(rng: np.random.Generator) -> Picture:
    u, v = _grid()
    bones = [np.abs(u + 0.7 - 0.35 * k - 0.1 * v * (k - 2)) < rng.uniform(0.07, 0.1) for k in range(5)]
    fingers = np.any(bones, axis=0) & (v < 0.2)
    return np.asarray(fingers | (np.hypot(u / 0.7, (v - 0.6) / 0.45) < 1), np.float64)


def _lateral(rng: np.random.Generator) -> Picture:
    """One lung field over all, heart in front, spine behind, abdomen below."""
    u, v = _grid()
    u = u * rng.choice([-1, 1])
    lung = np.hypot(u / 0.6, (v + 0.1) / 0.75) < 1
    heart = np.hypot((u + 0.25) / 0.3, (v - 0.2) / 0.3) < 1
    spine, abdomen = np.abs(u - 0.55 - 0.1 * v) < 0.12, v > 0.55
    return np.asarray(np.where(lung, 0.25, 0.7) + 0.4 * spine + 0.3 * heart + 0.3 * abdomen)


def _text(rng: np.random.Generator) -> Picture:
    page = np.ones((SIDE, SIDE))
    for row in range(8, SIDE - 8, 12):
        for column in range(8, SIDE - 8, 6):
            page[row : row + 7, column : column + 4] = rng.integers(0, 2, (7, 4))
    return page


def _gradient(rng: np.random.Generator) -> Picture:
    u, v = _grid()
    return np.asarray(u * rng.uniform(-1, 1) + v * rng.uniform(-1, 1))


def _film(rng: np.random.Generator) -> Picture:
    return cxr_phantom(int(rng.integers(1 << 30)), SIDE, SIDE).image


NEGATIVES: dict[str, Callable[[np.random.Generator], Picture]] = {
    "noise": lambda rng: rng.random((SIDE, SIDE)),
    "texture of a photograph": _texture,
    "gradient": _gradient,
    "text": _text,
    "skull": _skull,
    "limb": _limb,
    "hand": _hand,
    "lateral view": _lateral,
    "chest upside down": lambda rng: np.rot90(_film(rng), 2),
    "chest on its right side": lambda rng: np.rot90(_film(rng), 1),
    "chest on its left side": lambda rng: np.rot90(_film(rng), 3),
    "chest in wrong polarity": lambda rng: 1 - _film(rng),
    "half a chest": lambda rng: _film(rng)[:, : SIDE // 2],
    "abdomen": lambda rng: _film(rng)[3 * SIDE // 4 :],
}


@pytest.mark.parametrize("kind", NEGATIVES)
def test_what_is_no_upright_frontal_chest_is_refused(kind: str) -> None:
    for seed in range(20):
        image = prepare_radiograph(NEGATIVES[kind](np.random.default_rng(seed)), 192)
        assert not_frontal_chest(image) != "", seed


def test_a_flat_exposure_is_refused() -> None:
    assert not_frontal_chest(np.full((64, 64), 7)) == "the image has no contrast"


def test_ct_slices_are_refused() -> None:
    volume = ct_phantom(3, shape=(24, 96, 96)).hu
    assert all(not_frontal_chest(plane) for plane in volume)


def test_a_torchxrayvision_plane_spans_its_range_over_the_centred_square() -> None:
    image = np.tile(np.arange(448, dtype=np.uint16), (300, 1))  # the square is columns 74..373
    plane = prepare_xrv(image, 30)
    assert plane.shape == (30, 30) and plane.dtype == np.float32
    expected = (2 * (74 + 10 * np.arange(30) + 4.5) / 447 - 1) * 1024
    np.testing.assert_allclose(plane, np.tile(expected, (30, 1)), atol=1)
    assert set(np.unique(prepare_xrv(np.full((50, 40), 9), 16))) == {-1024}


# --- through the engine

Task = Callable[..., EngineTask]


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalModelEngine]:
    made = LocalModelEngine("cxr-findings", EngineSettings(model="demo-cxr-findings", options={"threads": 1}))
    yield made
    made.close()


def test_a_hand_with_the_header_of_a_chest_is_not_scored(
    engine: LocalModelEngine, tmp_path: Path, task_for: Task
) -> None:
    chest = write_cxr(tmp_path / "chest.dcm", 4, rows=SIDE, columns=SIDE, view="PA")
    hand = write_cxr(tmp_path / "hand.dcm", 5, rows=SIDE, columns=SIDE, view="PA", photometric="MONOCHROME2")
    ds = pydicom.dcmread(hand.path)
    ds.PixelData = (_hand(np.random.default_rng(1)) * 1000).astype(np.uint16).tobytes()
    ds.save_as(hand.path)
    values = engine.run(task_for([chest.path, hand.path]), lambda: None).values
    found = {value.sop_instance_uid: value for value in values if isinstance(value, Findings)}
    assert all(item.confidence is not None for item in found[chest.sop_instance_uid].items)
    refused = found[hand.sop_instance_uid]
    assert {(item.presence, item.confidence) for item in refused.items} == {(Presence.UNDETERMINED, None)}
    assert any("not assessed" in note and "two dark lungs" in note for note in refused.notes)


CORPUS = os.environ.get("DICOM_NODE_CORPUS")


@pytest.mark.skipif(not CORPUS, reason="DICOM_NODE_CORPUS is not set: no real radiographs")
def test_real_frontal_films_pass_and_others_do_not() -> None:
    root = Path(str(CORPUS))
    real = root / "mlmed+torchxrayvision/tests"
    passing = {
        *root.glob("DIAGNijmegen+rse-panimg/**/cxr.dcm"),
        *real.glob("1.2.276.0.7230010.3.1.4.8323329.6904.*.dcm"),
    }
    # a film whose header says MONOCHROME1 and whose pixels say otherwise; an animal from the side
    refused = {real / "Fake_MONOHR1.dcm", root / "ImagingDataCommons+highdicom/data/test_files/dx_image.dcm"}
    assert len(passing) == 2
    for path in (*passing, *refused):
        ds = pydicom.dcmread(path)
        image = ds.pixel_array.astype(np.float32)
        image = image.max() - image if ds.PhotometricInterpretation == "MONOCHROME1" else image
        assert (not_frontal_chest(prepare_radiograph(image, 192)) == "") == (path in passing), path.name
