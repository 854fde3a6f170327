"""Surfaces, read back with a reader of binary STL written here: the same solid in the same place, and named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.model import Origin, StoredInstance
from dicom_node.results.seg import SegEncoder
from dicom_node.results.stl import StlEncoder
from dicom_node.values import LabelVolume, Mesh, ResultContext, Segment

STL_STORAGE = "1.2.840.10008.5.1.4.1.1.104.3"
CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32)
# each face twice, counter-clockwise seen from outside
FACES = (
    (0, 1, 3, 0, 3, 2),
    (4, 6, 7, 4, 7, 5),
    (0, 4, 5, 0, 5, 1),
    (2, 3, 7, 2, 7, 6),
    (0, 2, 6, 0, 6, 4),
    (1, 5, 7, 1, 7, 3),
)


@pytest.fixture
def box(organs: tuple[Segment, ...]) -> Callable[..., Mesh]:
    """A box from `low` to `high`, mm."""

    def build(low: tuple[float, ...] = (-20, 10.5, 3), high: tuple[float, ...] = (10, 30, 43), **more: Any) -> Mesh:
        vertices = np.array(low, np.float32) + CORNERS * (np.array(high) - np.array(low)).astype(np.float32)
        triangles = np.array(FACES, np.uint32).reshape(-1, 3)
        told = {"title": "Right kidney", "segments": organs[2:3]} | more
        return Mesh(vertices=vertices, triangles=triangles, **told)

    return build


def _read_stl(content: bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Corners (n, 3, 3) and normals (n, 3) of binary STL: 80 bytes, a count, 50 bytes a triangle."""
    assert not content.startswith(b"solid")
    count = int.from_bytes(content[80:84], "little")
    assert len(content) == 84 + 50 * count
    rows = np.frombuffer(content[84:], np.uint8).reshape(count, 50)
    numbers = np.ascontiguousarray(rows[:, :48]).view("<f4").reshape(count, 4, 3)
    assert not rows[:, 48:].any()
    return numbers[:, 1:], numbers[:, 0]


def _volume(corners: npt.NDArray[np.float32]) -> float:
    a, b, c = (corners[:, i].astype(float) for i in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def test_the_solid_that_is_read_has_the_volume_the_place_and_the_outside_of_the_mesh(
    box: Callable[..., Mesh],
    ct_series: Callable[..., list[Dataset]],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    (made,) = StlEncoder().encode([box()], ct_series(), context, [])
    made = reread(made)
    corners, normals = _read_stl(made.EncapsulatedDocument[: made.EncapsulatedDocumentLength])
    assert _volume(corners) == pytest.approx(30 * 19.5 * 40)
    np.testing.assert_array_equal(corners.min(axis=(0, 1)), [-20, 10.5, 3])
    np.testing.assert_array_equal(corners.max(axis=(0, 1)), [10, 30, 43])
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    middle = np.array([-5, 20.25, 23])
    assert (np.einsum("ij,ij->i", corners.mean(axis=1) - middle, normals) > 0).all()


def test_the_header_tells_what_stl_does_not(
    box: Callable[..., Mesh],
    ct_series: Callable[..., list[Dataset]],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    organs: tuple[Segment, ...],
) -> None:
    images = ct_series()
    (made,) = StlEncoder().encode([box(segments=organs[2:])], images, context, [])
    made = reread(made)
    assert (made.SOPClassUID, made.Modality, made.MIMETypeOfEncapsulatedDocument) == (STL_STORAGE, "M3D", "model/stl")
    assert made.FrameOfReferenceUID == images[0].FrameOfReferenceUID
    assert made.MeasurementUnitsCodeSequence[0].CodeValue == "mm"
    assert made.BurnedInAnnotation == "NO" and b"Doe" not in made.EncapsulatedDocument
    assert made.ConceptNameCodeSequence[0].CodeMeaning == "CT 3D CAM model"
    assert (made.PatientID, str(made.PatientName), made.StudyInstanceUID) == (
        *("P-0815", "Doe^Jane"),
        images[0].StudyInstanceUID,
    )
    found = [item for item in made.ContentSequence if item.ValueType == "CODE"]
    assert [item.ConceptCodeSequence[0].CodeValue for item in found] == ["64033007", "64033007"]
    sides = [item.ContentSequence[-1].ConceptCodeSequence[0].CodeMeaning for item in found]
    assert sides == ["Right", "Left"]
    derivation = made.DerivationAlgorithmSequence[0]
    assert (derivation.AlgorithmName, derivation.AlgorithmVersion) == ("demo-model", "1.2.0")
    assert made.ContributingEquipmentSequence[0].DeviceUID == context.provenance.device_uid


def test_a_surface_refers_to_every_image_it_was_made_from_and_shares_the_tracking_uid_of_its_segment(
    box: Callable[..., Mesh],
    ct_series: Callable[..., list[Dataset]],
    labels: Callable[..., Any],
    volume_of: Callable[..., LabelVolume],
    context: ResultContext,
) -> None:
    images = ct_series()
    (made,) = StlEncoder().encode([box()], images, context, [])
    uids = {str(image.SOPInstanceUID) for image in images}
    assert {item.ReferencedSOPInstanceUID for item in made.SourceInstanceSequence} == uids
    (series,) = made.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == images[0].SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == uids
    (seg,) = SegEncoder().encode([volume_of(images, labels(images))], images, context, [])
    (kidney,) = (segment for segment in seg.SegmentSequence if segment.SegmentLabel == "Right kidney")
    tracking = [item.UID for code in made.ContentSequence for item in code.get("ContentSequence", []) if "UID" in item]
    assert tracking == [kidney.TrackingUID]


def test_equal_arguments_give_equal_bytes_in_whatever_order_the_images_come_and_another_run_another_object(
    box: Callable[..., Mesh],
    ct_series: Callable[..., list[Dataset]],
    context: ResultContext,
    written: Callable[[Dataset], Path],
) -> None:
    images = ct_series()
    meshes = [box(), box(high=(20, 31, 44), title="Another")]
    first = StlEncoder().encode(meshes, images, context, [])
    again = StlEncoder().encode(meshes, list(reversed(images)), context, [])
    assert [written(made).read_bytes() for made in first] == [written(made).read_bytes() for made in again]
    assert len({made.SOPInstanceUID for made in first}) == 2 == len({made.InstanceNumber for made in first})
    assert len({made.SeriesInstanceUID for made in first}) == 1
    (other, _) = StlEncoder().encode(meshes, images, replace(context, run_key="run 2"), [])
    assert other.SOPInstanceUID != first[0].SOPInstanceUID and other.SeriesInstanceUID != first[0].SeriesInstanceUID


def test_a_demonstration_says_so_and_a_surface_names_those_of_the_run_before(
    box: Callable[..., Mesh],
    ct_series: Callable[..., list[Dataset]],
    context: ResultContext,
    product_context: ResultContext,
) -> None:
    images = ct_series()
    earlier = [
        StoredInstance(
            sop_class_uid=sop_class,
            sop_instance_uid=f"1.2.3.{number}",
            study_instance_uid=str(images[0].StudyInstanceUID),
            series_instance_uid="1.2.3",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            path="",
            data_set_offset=0,
            data_set_length=0,
            sha256="",
            origin=Origin.PRODUCED,
        )
        for number, sop_class in enumerate((STL_STORAGE, "1.2.840.10008.5.1.4.1.1.66.4"), start=1)
    ]
    followed = replace(context, predecessors=tuple(earlier))
    (made,) = StlEncoder().encode([box(notes=("holes closed",))], images, followed, [])
    (study,) = made.PredecessorDocumentsSequence
    told = [item.ReferencedSOPInstanceUID for item in study.ReferencedSeriesSequence[0].ReferencedSOPSequence]
    assert told == ["1.2.3.1"]
    assert made.SeriesDescription.startswith("AI DEMONSTRATION") and made.DocumentTitle.startswith("AI DEMONSTRATION")
    assert made.ContentSequence[0].TextValue.endswith("not for clinical use. holes closed")
    (made,) = StlEncoder().encode([box()], images, product_context, [])
    assert made.DocumentTitle == "AI: Right kidney" and "PredecessorDocumentsSequence" not in made
    assert [item.ValueType for item in made.ContentSequence] == ["CODE"]


def test_what_is_no_surface_in_one_place_is_an_error(
    box: Callable[..., Mesh], ct_series: Callable[..., list[Dataset]], context: ResultContext
) -> None:
    images, mesh = ct_series(), box()
    nowhere = mesh.vertices.copy()
    nowhere[3, 1] = np.nan
    for wrong, message in (
        (replace(mesh, triangles=mesh.triangles + 1), "none of the 8 vertices"),
        (replace(mesh, triangles=mesh.triangles[:0]), "no triangles"),
        (replace(mesh, triangles=mesh.triangles.astype(float)), "no whole numbers"),
        (replace(mesh, vertices=mesh.vertices[:, :2]), "expected n x 3"),
        (replace(mesh, vertices=nowhere), "not finite"),
        (replace(mesh, segments=()), "encloses no structure"),
    ):
        with pytest.raises(EncodingError, match=message):
            StlEncoder().encode([wrong], images, context, [])
    with pytest.raises(EncodingError, match="FrameOfReferenceUID"):
        StlEncoder().encode([mesh], [*images, replace_frame(images[0])], context, [])
    assert StlEncoder().encode([], images, context, []) == []


def replace_frame(image: Dataset) -> Dataset:
    """The image in another frame of reference."""
    other = Dataset()
    other.update(image)
    other.SOPInstanceUID, other.FrameOfReferenceUID = "1.2.3.4", "1.2.3.5"
    return other


@pytest.mark.parametrize("modality", ["CT", "MR", "IO"])
def test_foreign_validators_find_nothing_wrong(
    modality: str,
    box: Callable[..., Mesh],
    ct_series: Callable[..., list[Dataset]],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    no_errors: Callable[[Path], list[str]],
) -> None:
    images = ct_series()
    for image in images:
        image.Modality = modality
    (made,) = StlEncoder().encode([box(notes=("holes closed",))], images, context, [])
    assert no_errors(written(made)) == []
