"""A data set whose beginning lies as one before is read the same as if it were the first."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom.filereader import _read_file_meta_info, read_preamble

from dicom_node import headers
from dicom_node.errors import InvalidInstance
from dicom_node.headers import scan
from dicom_node.model import InstanceHeader
from dicom_node.shapes import MAX_SHAPES, Shapes

EXPLICIT, BIG, JPEG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.70"
DataSet = Callable[..., bytes]
Seen = tuple[InstanceHeader, list[str]] | str


def look(body: bytes, syntax: str) -> Seen:
    """The header and the order of its attributes, or why there is none."""
    try:
        header = scan(memoryview(body), syntax, max_inflated_header_bytes=1 << 20)
    except InvalidInstance as exc:
        return str(exc)
    return header, list(header.attributes)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, str], Seen]:
    """As `look`, with nothing remembered."""

    def looked(body: bytes, syntax: str) -> Seen:
        with monkeypatch.context() as patch:
            patch.setattr(headers, "_shapes", Shapes())
            return look(body, syntax)

    return looked


def learn(body: bytes, syntax: str) -> None:
    for _ in range(3):
        look(body, syntax)


def changed(body: bytes, chance: random.Random) -> bytes:
    """Some bytes among the first are others: heads, lengths or values."""
    damaged = bytearray(body)
    for _ in range(chance.randrange(1, 4)):
        damaged[chance.randrange(min(len(body), 9000))] = chance.choice([0, 1, 2, 8, 0x20, 0x31, 0xFF, 0xFE, 0x7F])
    return bytes(damaged)


@pytest.mark.parametrize(("syntax", "form"), [(EXPLICIT, {}), (BIG, {"little": False}), (JPEG, {})])
def test_what_is_remembered_changes_nothing_whatever_comes(
    data_set: DataSet, alone: Callable[[bytes, str], Seen], syntax: str, form: dict[str, bool]
) -> None:
    chance = random.Random(20261121)
    body = data_set(PatientName="Doe^Jane", StudyDescription="thorax", PixelData=b"\0" * 64, **form)
    learn(body, syntax)
    assert look(body, syntax) == alone(body, syntax)
    for _ in range(1500):
        learn(body, syntax)
        damaged = changed(body, chance)
        assert look(damaged, syntax) == alone(damaged, syntax)


def corpus_files(corpus: Path) -> Iterator[tuple[bytes, str]]:
    for path in sorted(corpus.rglob("*.dcm")):
        if path.stat().st_size > 400_000:
            continue
        with path.open("rb") as file:
            try:
                read_preamble(file, False)
                syntax = str(_read_file_meta_info(file).TransferSyntaxUID)
            except Exception:  # noqa: BLE001 - no Part-10 file
                continue
            yield file.read(), syntax


@pytest.mark.filterwarnings("ignore")
def test_every_corpus_file_is_read_the_same_again_and_damaged(
    corpus: Path, alone: Callable[[bytes, str], Seen]
) -> None:
    chance, count = random.Random(20261122), 0
    for body, syntax in corpus_files(corpus):
        first = alone(body, syntax)
        learn(body, syntax)
        assert look(body, syntax) == first
        for _ in range(6 if body else 0):
            damaged = changed(body, chance)
            assert look(damaged, syntax) == alone(damaged, syntax)
        count += 1
    assert count > 300


def test_a_slice_that_differs_in_values_only_is_not_walked_again(
    data_set: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "_shapes", Shapes())
    learn(data_set(SOPInstanceUID="1.2.3", InstanceNumber="1", PixelData=b"\0" * 64), EXPLICIT)
    walked: list[int] = []
    element = headers._Walk._element

    def counted(walk: headers._Walk, stack: list[headers._Frame], position: int) -> int:
        walked.append(position)
        return element(walk, stack, position)

    monkeypatch.setattr(headers._Walk, "_element", counted)
    seen = look(data_set(SOPInstanceUID="1.2.4", InstanceNumber="2", PixelData=b"\0" * 64), EXPLICIT)
    assert isinstance(seen, tuple)
    assert seen[0].sop_instance_uid == "1.2.4" and seen[0].attributes["InstanceNumber"] == "2"
    assert len(walked) == 1, "only the pixel data"


def test_what_is_remembered_has_a_bound() -> None:
    shapes = Shapes()
    for length in range(3 * MAX_SHAPES):
        shapes.find(length, True, b"")
    assert len(shapes._known) <= MAX_SHAPES
