"""Series headers as rules and geometry get them."""

import struct
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import InvalidInstance, StorageError
from dicom_node.model import Origin, SeriesHeader, StoredInstance
from dicom_node.pipeline.headers_of import DISTINCT_MAX, read_series_header
from dicom_node.store.rows import packed_header, unpacked_header

IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
SERIES = "1.2.3.1"


@pytest.fixture
def read(bench: Any, kit: ModuleType) -> Any:
    """`read(*datasets, syntax=...)`: receive them, read their header back."""

    def reading(*datasets: Dataset, **how: Any) -> SeriesHeader:
        bench.receive(*datasets, **how)
        return read_series_header(bench.queue.series_instances(kit.STUDY, SERIES))

    return reading


def test_values_are_distinct_in_order_and_json_ready(bench: Any, read: Any) -> None:
    item = Dataset()
    item.CodeValue, item.CodeMeaning = "R-10202", "frontal"
    one = bench.dataset(
        "1.2.3.1.1", ImageType=["ORIGINAL", "PRIMARY"], KVP="120.5", SliceLocation=2.5, ViewCodeSequence=[item],
        ImagePositionPatient=[0, 0, 2.5], InstitutionName="",
    )  # fmt: skip
    two = bench.dataset(
        "1.2.3.1.2", ImageType=["ORIGINAL", "PRIMARY"], KVP="120.5", SliceLocation=5, WindowCenter=[1, 2]
    )
    header = read(one, two)
    assert header.values["Modality"] == ("CT",)
    assert header.values["ImageType"] == (["ORIGINAL", "PRIMARY"],)
    assert header.values["SliceLocation"] == (2.5, 5.0)
    assert header.values["KVP"] == (120.5,)
    assert header.values["InstanceNumber"] == (1, 2)
    assert header.values["ViewCodeSequence"] == ([{"CodeValue": "R-10202", "CodeMeaning": "frontal"}],)
    assert header.missing_in == {"ViewCodeSequence": 1, "WindowCenter": 1, "ImagePositionPatient": 1}
    assert "InstitutionName" not in header.values  # empty everywhere
    assert header.instance_count == 2
    first, second = header.geometry
    assert first == {
        "SOPInstanceUID": "1.2.3.1.1",
        "SOPClassUID": one.SOPClassUID,
        "InstanceNumber": 1,
        "ImagePositionPatient": [0.0, 0.0, 2.5],
        "Rows": 2,
        "Columns": 2,
        "ImageType": ["ORIGINAL", "PRIMARY"],
    }
    assert "ImagePositionPatient" not in second
    assert unpacked_header(SERIES, packed_header(header)) == header


def test_what_is_bulk_or_private_is_left_out(bench: Any, read: Any) -> None:
    ds = bench.dataset("1.2.3.1.1", RedPaletteColorLookupTableData=b"\0" * 64, ImageComments="x" * 5000)
    ds.TextValue = "y" * 100_000  # longer than is read at all
    ds.add_new(0x00091010, "LO", "private")
    frame = Dataset()
    frame.FrameOfReferenceUID = "1.2"
    ds.PerFrameFunctionalGroupsSequence = [frame] * 3
    header = read(ds)
    absent = {
        "PixelData",
        "RedPaletteColorLookupTableData",
        "ImageComments",
        "PerFrameFunctionalGroupsSequence",
        "TextValue",
        "",
    }
    assert not absent & set(header.values)


def test_of_many_values_some_are_kept_and_all_are_counted(bench: Any, read: Any) -> None:
    header = read(*(bench.dataset(f"1.2.3.1.{number}") for number in range(1, DISTINCT_MAX + 7)))
    assert header.values["InstanceNumber"] == tuple(range(1, DISTINCT_MAX + 1))
    assert header.distinct_counts["InstanceNumber"] == DISTINCT_MAX + 6
    assert len(header.geometry) == DISTINCT_MAX + 6
    assert "Modality" not in header.distinct_counts


@pytest.mark.parametrize("syntax", [IMPLICIT, BIG_ENDIAN, DEFLATED])
def test_every_encoding_gives_the_same_header(bench: Any, read: Any, syntax: str) -> None:
    header = read(bench.dataset("1.2.3.1.1", KVP="120"), syntax=syntax)
    assert header.values["KVP"] == (120.0,)
    assert header.values["Rows"] == (2,)


def test_text_is_decoded_by_its_character_set(bench: Any, read: Any) -> None:
    latin = bench.dataset("1.2.3.1.1", SpecificCharacterSet="ISO_IR 100", SeriesDescription="Schädel")
    unicode = bench.dataset("1.2.3.1.2", SpecificCharacterSet="ISO_IR 192", SeriesDescription="Schädel")
    assert read(latin, unicode).values["SeriesDescription"] == ("Schädel",)


def test_a_number_that_is_none_is_kept_as_text(bench: Any, read: Any) -> None:
    ds = bench.dataset("1.2.3.1.1", KVP="120")
    element = pydicom.dataelem.DataElement(0x00180060, "LO", "n/a")
    ds[0x00180060] = element
    ds[0x00180060].VR = "LO"
    header = read(ds)
    assert header.values["KVP"] == ("n/a",)


def test_a_standard_attribute_sent_as_unknown_is_read_by_its_own_type(
    bench: Any, kit: ModuleType, tmp_path: Path
) -> None:
    explicit = kit.encoded(bench.dataset("1.2.3.1.1", KVP="120 "))
    unknown = explicit.replace(b"\x18\x00\x60\x00DS\x04\x00", b"\x18\x00\x60\x00UN\x00\x00\x04\x00\x00\x00")
    assert unknown != explicit
    file = tmp_path / "un"
    file.write_bytes(unknown)
    stored = StoredInstance(
        sop_class_uid=kit.CT,
        sop_instance_uid="1.2.3.1.1",
        study_instance_uid=kit.STUDY,
        series_instance_uid=SERIES,
        transfer_syntax_uid=kit.EXPLICIT,
        path=str(file),
        data_set_offset=0,
        data_set_length=len(unknown),
        sha256="",
        origin=Origin.RECEIVED,
    )
    assert read_series_header([stored]).values["KVP"] == (120.0,)


def test_a_missing_or_broken_file_is_an_error_that_names_the_instance(bench: Any, kit: ModuleType) -> None:
    bench.receive(bench.dataset("1.2.3.1.1"))
    (instance,) = bench.queue.series_instances(kit.STUDY, SERIES)
    path = Path(instance.path)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[: instance.data_set_offset] + b"\x08\x00\x16\x00??" + b"\xff" * 9)
    with pytest.raises(InvalidInstance, match=r"1\.2\.3\.1\.1"):
        read_series_header([instance])
    path.unlink()
    with pytest.raises(StorageError, match=r"1\.2\.3\.1\.1"):
        read_series_header([instance])
    with pytest.raises(InvalidInstance):
        read_series_header([])


def test_the_header_of_every_corpus_series_can_be_read(corpus: Path) -> None:
    series: dict[str, list[StoredInstance]] = defaultdict(list)
    for path in corpus.rglob("*"):
        stored = _stored(path) if path.is_file() else None
        if stored is not None:
            series[stored.series_instance_uid].append(stored)
    assert len(series) > 100
    for instances in series.values():
        header = read_series_header(instances)
        assert header.instance_count == len(instances)
        assert unpacked_header(header.series_instance_uid, packed_header(header)) == header


def _stored(path: Path) -> StoredInstance | None:
    """A file as the archive would give it, None when it is no complete Part-10 file."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return None
        try:
            meta = pydicom.filereader._read_file_meta_info(file)
            offset = file.tell()
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            return StoredInstance(
                sop_class_uid=str(meta.MediaStorageSOPClassUID),
                sop_instance_uid=str(ds.SOPInstanceUID),
                study_instance_uid="",
                series_instance_uid=str(ds.SeriesInstanceUID),
                transfer_syntax_uid=str(meta.TransferSyntaxUID),
                path=str(path),
                data_set_offset=offset,
                data_set_length=path.stat().st_size - offset,
                sha256="",
                origin=Origin.RECEIVED,
            )
        except (AttributeError, KeyError, ValueError, NotImplementedError, EOFError, struct.error):
            return None
