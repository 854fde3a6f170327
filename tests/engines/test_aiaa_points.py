"""Points out of structured reports and key object selections, as voxels of the volume that is sent."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence as DicomSequence

from dicom_node.engines._aiaa_options import PointOptions
from dicom_node.engines._aiaa_points import Points, points_for
from dicom_node.errors import EngineRejected
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import Origin, StoredInstance

SHAPE = (6, 12, 16)  # slices, rows, columns
FRAME, SR, SR_3D, KOS = (
    "1.2.3.5",
    "1.2.840.10008.5.1.4.1.1.88.33",
    "1.2.840.10008.5.1.4.1.1.88.34",
    "1.2.840.10008.5.1.4.1.1.88.59",
)
BACKGROUND, TARGET = ("99X", "BG"), ("99X", "FG")


def _geometry() -> VolumeGeometry:
    """Oblique: a mistaken axis or sign moves a point by voxels."""
    rng = np.random.default_rng(5)
    frame, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    frame[:, 2] = np.cross(frame[:, 0], frame[:, 1])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = 2.5 * frame[:, 2], 0.8 * frame[:, 1], 0.7 * frame[:, 0]
    affine[:3, 3] = (-12.0, 31.0, 250.0)
    return VolumeGeometry(
        sop_instance_uids=tuple(f"1.2.9.{k}" for k in range(SHAPE[0])),
        affine=affine,
        spacing_mm=(2.5, 0.8, 0.7),
        shape=SHAPE,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        frame_of_reference_uid=FRAME,
        left_out={},
    )


GEOMETRY = _geometry()


def _place(column: float, row: float, slice_: float) -> list[float]:
    """Where in the patient that voxel is, mm."""
    return [float(x) for x in (GEOMETRY.affine @ (slice_, row, column, 1.0))[:3]]


def _name(scheme: str, value: str) -> Sequence[Dataset]:
    code = Dataset()
    code.CodingSchemeDesignator, code.CodeValue, code.CodeMeaning = scheme, value, value
    return [code]


def _scoord3d(*voxels: Sequence[float], kind: str = "MULTIPOINT", frame: str = FRAME, **more: Any) -> Dataset:
    item = Dataset()
    item.RelationshipType, item.ValueType, item.GraphicType = "CONTAINS", "SCOORD3D", kind
    item.GraphicData = [mm for voxel in voxels for mm in _place(*voxel)]
    item.ReferencedFrameOfReferenceUID = frame
    for keyword, value in more.items():
        setattr(item, keyword, value)
    return item


def _scoord(*pairs: tuple[float, float], image: str, kind: str = "MULTIPOINT", **more: Any) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", image
    source = Dataset()
    source.RelationshipType, source.ValueType, source.ReferencedSOPSequence = "SELECTED FROM", "IMAGE", [reference]
    item = Dataset()
    item.RelationshipType, item.ValueType, item.GraphicType = "CONTAINS", "SCOORD", kind
    item.GraphicData = [part for pair in pairs for part in pair]
    item.ContentSequence = [source]
    for keyword, value in more.items():
        setattr(item, keyword, value)
    return item


def _container(*items: Dataset, name: tuple[str, str] = ("DCM", "126010")) -> Dataset:
    made = Dataset()
    made.RelationshipType, made.ValueType, made.ConceptNameCodeSequence = "CONTAINS", "CONTAINER", _name(*name)
    made.ContentSequence = list(items)
    return made


@pytest.fixture
def document(tmp_path: Path) -> Callable[..., StoredInstance]:
    """`document(*items, time="120000", ...)`: a stored report with that content."""

    def make(
        *items: Dataset,
        sop_class: str = SR_3D,
        time: str = "120000",
        origin: Origin = Origin.RECEIVED,
        deflated: bool = False,
        title: tuple[str, str] = ("DCM", "113000"),
    ) -> StoredInstance:
        number = len(list(tmp_path.iterdir()))
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = sop_class, f"1.2.7.{number}"
        ds.ContentDate, ds.ContentTime, ds.ValueType = "20260102", time, "CONTAINER"
        ds.ConceptNameCodeSequence, ds.ContentSequence = _name(*title), list(items)
        buffer = DicomBytesIO()
        buffer.is_implicit_VR, buffer.is_little_endian = False, True
        write_dataset(buffer, ds)
        raw = buffer.getvalue()
        if deflated:
            packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
            raw = packer.compress(raw) + packer.flush()
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(b"meta" + raw)
        return StoredInstance(
            sop_class_uid=sop_class,
            sop_instance_uid=str(ds.SOPInstanceUID),
            study_instance_uid="1.2.3",
            series_instance_uid="1.2.7",
            transfer_syntax_uid="1.2.840.10008.1.2.1.99" if deflated else "1.2.840.10008.1.2.1",
            path=str(path),
            data_set_offset=4,
            data_set_length=len(raw),
            sha256="",
            origin=origin,
            modality="SR",
        )

    return make


def _found(*documents: StoredInstance, **options: Any) -> Points:
    block = PointOptions(**{"source": "sr", **options})
    return points_for(block, GEOMETRY, lambda: documents, lambda: None)


def test_points_in_the_patient_are_voxels_of_the_volume(document: Any) -> None:
    voxels = [(3, 2, 1), (15, 11, 5), (0, 0, 0)]
    report = document(_container(_scoord3d(*voxels)), _scoord3d((7.4, 8.4, 2.4), kind="POINT"))
    found = _found(report)
    assert found.foreground == (*voxels, (7, 8, 2)) and found.background == ()
    assert report.sop_instance_uid in found.note


def test_points_on_an_image_count_from_the_corner_of_its_first_pixel(document: Any) -> None:
    # PS3.3 C.18.6.1.1: 0.5, 0.5 is the centre of the first pixel, columns, rows the far corner
    report = document(_scoord((0.5, 0.5), (0.0, 0.0), (3.9, 2.1), (16.0, 12.0), image="1.2.9.4"), sop_class=SR)
    assert _found(report).foreground == ((0, 0, 4), (0, 0, 4), (3, 2, 4), (15, 11, 4))


def test_points_on_other_images_in_other_frames_and_other_graphics_are_passed_over(document: Any) -> None:
    report = document(
        _scoord((1, 1), image="1.2.8.8"),
        _scoord3d((1, 1, 1), frame="1.9"),
        _scoord3d((1, 1, 1), (2, 2, 2), kind="POLYLINE"),
        _scoord3d((4, 4, 4), kind="POINT"),
    )
    assert _found(report).foreground == ((4, 4, 4),)


def test_the_concept_of_a_point_or_of_what_holds_it_says_what_it_is(document: Any) -> None:
    report = document(
        _container(_container(_scoord3d((1, 1, 1))), name=BACKGROUND),
        _scoord3d((2, 2, 2), ConceptNameCodeSequence=_name(*BACKGROUND)),
        _scoord3d((3, 3, 3), ConceptNameCodeSequence=_name(*TARGET)),
        _scoord3d((4, 4, 4)),
    )
    found = _found(report, background_concepts=[[*BACKGROUND, "Background"]])
    assert (found.foreground, found.background) == (((3, 3, 3), (4, 4, 4)), ((1, 1, 1), (2, 2, 2)))
    found = _found(report, concepts=[TARGET])
    assert (found.foreground, found.background) == (((3, 3, 3),), ())


def test_the_newest_report_with_points_on_these_images_counts(document: Any) -> None:
    reports = [
        document(_scoord3d((1, 1, 1)), time="100000"),
        document(_scoord3d((2, 2, 2)), time="120000"),
        document(_scoord3d((3, 3, 3)), time="110000"),
        document(_scoord3d((4, 4, 4), frame="1.9"), time="130000"),
        document(_scoord3d((99, 1, 1)), time="140000"),  # beside these images
        document(_scoord3d((5, 5, 5)), time="150000", origin=Origin.PRODUCED),  # the node's own
    ]
    assert _found(*reports).foreground == ((2, 2, 2),)
    assert _found(*reversed(reports)).foreground == ((2, 2, 2),)


def _selection(document: Any, *reports: StoredInstance, **more: Any) -> StoredInstance:
    items = []
    for report in reports:
        reference = Dataset()
        reference.ReferencedSOPClassUID = report.sop_class_uid
        reference.ReferencedSOPInstanceUID = report.sop_instance_uid
        item = Dataset()
        item.RelationshipType, item.ValueType, item.ReferencedSOPSequence = "CONTAINS", "COMPOSITE", [reference]
        items.append(item)
    made: StoredInstance = document(*items, sop_class=KOS, **more)
    return made


def test_a_selection_that_rejects_what_it_refers_to_chooses_nothing(document: Any) -> None:
    report = document(_scoord3d((1, 1, 1)))
    rejected = _selection(document, report, title=("DCM", "113001"))
    with pytest.raises(EngineRejected, match="key object selection"):
        _found(report, rejected, source="kos")
    assert _found(report, rejected, _selection(document, report), source="kos").foreground == ((1, 1, 1),)


def test_an_image_may_be_referred_to_inside_the_report(document: Any) -> None:
    library = _scoord((1, 1), image="1.2.9.3").ContentSequence[0]
    reference = Dataset()
    reference.RelationshipType, reference.ReferencedContentItemIdentifier = "SELECTED FROM", [1, 1, 1]
    point = _scoord((4.5, 5.5), image="1.2.9.0")
    point.ContentSequence = [reference]
    wrong = _scoord((4.5, 5.5), image="1.2.9.0")
    astray = Dataset()
    astray.RelationshipType, astray.ReferencedContentItemIdentifier = "SELECTED FROM", [1, 9, 0]
    wrong.ContentSequence = [astray]
    assert _found(document(_container(library), point, wrong)).foreground == ((4, 5, 3),)


def test_items_another_implementation_wrote_are_read(document: Any) -> None:
    from highdicom.sr import CodedConcept, ImageContentItem, Scoord3DContentItem, ScoordContentItem

    name = CodedConcept("111030", "DCM", "Image Region")
    in_patient = Scoord3DContentItem(
        name=name,
        graphic_type="MULTIPOINT",
        graphic_data=np.array([_place(3, 4, 5), _place(6, 7, 2)]),
        frame_of_reference_uid=FRAME,
        relationship_type="CONTAINS",
    )
    on_image = ScoordContentItem(
        name=name, graphic_type="POINT", graphic_data=np.array([[8.5, 9.5]]), relationship_type="CONTAINS"
    )
    source = [
        ImageContentItem(
            name=CodedConcept("111040", "DCM", "Original Source"),
            referenced_sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
            referenced_sop_instance_uid="1.2.9.1",
            relationship_type="SELECTED FROM",
        )
    ]
    on_image.ContentSequence = DicomSequence(source)
    assert _found(document(_container(in_patient, on_image))).foreground == ((3, 4, 5), (6, 7, 2), (8, 9, 1))


def test_a_key_object_selection_says_which_report_counts(document: Any) -> None:
    older, newer = document(_scoord3d((1, 1, 1)), time="100000"), document(_scoord3d((2, 2, 2)), time="110000")
    chosen = _selection(document, older, time="120000")
    assert _found(newer, older, chosen, source="kos").foreground == ((1, 1, 1),)
    later = _selection(document, newer, time="130000")
    assert _found(newer, older, chosen, later, source="kos").foreground == ((2, 2, 2),)
    with pytest.raises(EngineRejected, match="key object selection refers to"):
        _found(newer, older, source="kos")
    images_only = _selection(document, time="140000")
    with pytest.raises(EngineRejected, match="key object selection"):
        _found(newer, images_only, source="kos")


def test_without_points_the_reason_says_what_to_do(document: Any) -> None:
    for documents in ((), (document(_container()),)):
        with pytest.raises(EngineRejected, match=r"no structured report with points.*jobs retry"):
            _found(*documents)
    with pytest.raises(EngineRejected, match="lies beside these images"):
        _found(document(_scoord3d((16.6, 1, 1))))
    with pytest.raises(EngineRejected, match="lies beside its image"):
        _found(document(_scoord((16.1, 1.0), image="1.2.9.4")))


def test_a_deflated_report_is_read_and_one_that_grows_without_end_or_is_broken_is_passed_over(document: Any) -> None:
    good = document(_scoord3d((1, 2, 3)), deflated=True)
    assert _found(good).foreground == ((1, 2, 3),)
    broken = document(_scoord3d((4, 4, 4)), time="130000")
    Path(broken.path).write_bytes(b"\0" * 40)
    bomb = document(_scoord3d((4, 4, 4)), time="140000", deflated=True)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    Path(bomb.path).write_bytes(b"meta" + packer.compress(b"\0" * (40 << 20)) + packer.flush())
    gone = document(_scoord3d((4, 4, 4)), time="150000")
    Path(gone.path).unlink()
    assert _found(good, broken, bomb, gone).foreground == ((1, 2, 3),)


def test_a_report_of_any_depth_and_values_of_any_kind_end(document: Any) -> None:
    deep = _scoord3d((1, 1, 1))
    for _ in range(100):
        deep = _container(deep)
    odd = _scoord3d((1, 1, 1))
    odd.GraphicData = [float("nan")] * 3
    ragged = _scoord3d((1, 1, 1))
    ragged.GraphicData = [1.0, 2.0]
    with pytest.raises(EngineRejected, match="no structured report"):
        _found(document(deep, odd, ragged))
    many = document(_scoord3d(*[(1, 1, 1)] * 900), _scoord3d(*[(1, 1, 1)] * 900))
    with pytest.raises(EngineRejected, match="more than 1000 points"):
        _found(many)


def test_configured_points_must_be_voxels_of_the_series() -> None:
    block = PointOptions(points=((15, 11, 5),), background=((0, 0, 0),))
    found = points_for(block, GEOMETRY, tuple, lambda: None)
    assert (found.foreground, found.background) == (((15, 11, 5),), ((0, 0, 0),))
    for outside in ((16, 0, 0), (0, 12, 0), (0, 0, 6)):
        with pytest.raises(EngineRejected, match="16 x 12 x 6 voxels"):
            points_for(PointOptions(points=(outside,)), GEOMETRY, tuple, lambda: None)
