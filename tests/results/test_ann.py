"""Annotations, read back by highdicom, which writes them its own way: the same shapes in the same places."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from highdicom.ann import MicroscopyBulkSimpleAnnotations
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.results.ann import AnnEncoder
from dicom_node.values import AnnotationGroup, Annotations, GraphicType, ResultContext, Segment

# dciodvfy of 2022 finds fault with this attribute where it is not, and so in everybody's 2D annotations
ARTEFACT = "CommonZCoordinateValue(006a,0010)> - Only valid for AnnotationCoordinateType of 3D"

Shapes = tuple[npt.NDArray[np.float64], ...]


@pytest.fixture
def group(tissues: tuple[Segment, ...]) -> Callable[..., AnnotationGroup]:
    """A group of tumour annotations."""

    def build(kind: GraphicType, shapes: Shapes, **more: Any) -> AnnotationGroup:
        told: dict[str, Any] = {"label": "Tumour", "category": tissues[0].category, "type": tissues[0].type} | more
        return AnnotationGroup(graphic_type=kind, shapes=shapes, **told)

    return build


def _shapes(count: int, points: tuple[int, int], whole: bool = False) -> Shapes:
    random = np.random.default_rng(3)
    made = (random.uniform(10, 890, (int(random.integers(*points)), 2)) for _ in range(count))
    return tuple(np.round(shape) if whole else shape for shape in made)


def _on(image: Dataset, *groups: AnnotationGroup, notes: tuple[str, ...] = ()) -> Annotations:
    return Annotations(sop_instance_uid=str(image.SOPInstanceUID), groups=groups, notes=notes)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("kind", "points"),
    [(GraphicType.POINT, (1, 2)), (GraphicType.POLYLINE, (2, 9)), (GraphicType.POLYGON, (3, 12))],
)
def test_highdicom_reads_the_very_coordinates(
    kind: GraphicType,
    points: tuple[int, int],
    whole: bool,
    group: Callable[..., AnnotationGroup],
    slide: Callable[..., Dataset],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image, shapes = slide(), _shapes(40, points, whole)
    sure = tuple(np.linspace(0, 1, 40))
    (made,) = AnnEncoder().encode([_on(image, group(kind, shapes, confidences=sure))], [image], context, [])
    (read,) = MicroscopyBulkSimpleAnnotations.from_dataset(reread(made)).AnnotationGroupSequence
    assert read.graphic_type.value == kind.value and read.number_of_annotations == 40
    for shape, found in zip(shapes, read.get_graphic_data("2D"), strict=True):
        np.testing.assert_array_equal(found, shape)
    assert ("PointCoordinatesData" in read) == whole  # single precision only where it loses nothing
    names, values, units = read.get_measurements()
    assert (names[0].value, units[0].value) == ("111012", "%")
    np.testing.assert_allclose(values[:, 0], 100 * np.array(sure), rtol=1e-6)


def test_the_object_says_which_slide_which_algorithm_and_what_was_found(
    group: Callable[..., AnnotationGroup],
    slide: Callable[..., Dataset],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image = slide()
    found = group(GraphicType.POINT, _shapes(3, (1, 2)))
    none = group(GraphicType.POLYGON, (), label="Necrosis")
    (made,) = AnnEncoder().encode([_on(image, none, found, notes=("clipped",))], [image], context, [])
    made = reread(made)
    assert (made.SOPClassUID, made.Modality) == ("1.2.840.10008.5.1.4.1.1.91.1", "ANN")
    assert (made.AnnotationCoordinateType, made.PixelOriginInterpretation) == ("2D", "VOLUME")
    assert made.ReferencedImageSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == image.SeriesInstanceUID
    (told,) = made.AnnotationGroupSequence
    assert (told.AnnotationGroupNumber, told.AnnotationGroupLabel) == (1, "Tumour")
    assert told.AnnotationGroupGenerationType == "AUTOMATIC"
    algorithm = told.AnnotationGroupAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("demo-model", "1.2.0")
    assert told.AnnotationPropertyTypeCodeSequence[0].CodeValue == "108369006"
    assert "not for clinical use" in told.AnnotationGroupDescription
    assert made.ContentDescription == "clipped; 0 Necrosis, 3 Tumour"
    assert (made.PatientID, made.ContainerIdentifier) == ("P-0815", "S-24-7")
    assert made.SpecimenDescriptionSequence[0].SpecimenUID == image.SpecimenDescriptionSequence[0].SpecimenUID
    assert made.SeriesDescription.startswith("AI DEMONSTRATION")


def test_equal_arguments_give_equal_bytes_and_another_run_other_uids(
    group: Callable[..., AnnotationGroup],
    slide: Callable[..., Dataset],
    context: ResultContext,
    written: Callable[[Dataset], Path],
) -> None:
    image = slide()
    told = _on(image, group(GraphicType.POLYGON, _shapes(5, (3, 9))), group(GraphicType.POINT, _shapes(2, (1, 2))))
    first, again = (AnnEncoder().encode([told], [image], context, [])[0] for _ in range(2))
    assert written(first).read_bytes() == written(again).read_bytes()
    (other,) = AnnEncoder().encode([told], [image], replace(context, run_key="run 2"), [])
    uids = [item.AnnotationGroupUID for made in (first, other) for item in made.AnnotationGroupSequence]
    assert len({*uids, first.SOPInstanceUID, other.SOPInstanceUID}) == 6


def test_what_is_no_annotation_of_the_slide_is_an_error(
    group: Callable[..., AnnotationGroup],
    slide: Callable[..., Dataset],
    radiograph: Callable[..., Dataset],
    context: ResultContext,
) -> None:
    image = slide(rows=900, columns=1300)
    corner = np.array([[1.0, 2.0], [5.0, 2.0], [5.0, 9.0]])
    polygon, point = GraphicType.POLYGON, GraphicType.POINT
    for wrong, message in (
        (group(polygon, (corner[:2],)), "a POLYGON of"),
        (group(polygon, (np.vstack([corner[:2], corner[:1]]),)), "fewer than three points"),
        (group(polygon, (np.hstack([corner, corner]),)), "a POLYGON of"),
        (group(point, (corner[:2],)), "several points"),
        (group(polygon, (corner * np.nan,)), "not finite"),
        (
            group(polygon, (corner, corner + np.array([1300, 0]))),
            "outside the 1300 x 900",
        ),  # rows and columns exchanged
        (group(polygon, (corner + np.array([0, 900]),)), "outside the 1300 x 900"),
        (group(polygon, (corner,), confidences=(0.5, 0.5)), "2 confidences of 1"),
        (group(polygon, (corner,), confidences=(1.5,)), "not all within 0 to 1"),
    ):
        with pytest.raises(EncodingError, match=message):
            AnnEncoder().encode([_on(image, wrong)], [image], context, [])
    sticking_out = _on(image, group(polygon, (corner - 3,)))
    assert len(AnnEncoder().encode([sticking_out], [image], context, [])) == 1
    flat = radiograph()
    with pytest.raises(EncodingError, match="it is no slide"):
        AnnEncoder().encode([_on(flat, group(polygon, (corner,)))], [flat], context, [])
    with pytest.raises(EncodingError, match="no source for the image"):
        AnnEncoder().encode([_on(slide(), group(polygon, (corner,)))], [image], context, [])
    assert AnnEncoder().encode([_on(image, group(polygon, ()))], [image], context, []) == []


def test_a_polygon_that_says_its_first_point_again_is_written_without_it(
    group: Callable[..., AnnotationGroup],
    slide: Callable[..., Dataset],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
) -> None:
    image, (one, two, three) = slide(), _shapes(3, (4, 9))
    closed = (one, np.vstack([two, two[:1]]), three)
    (made,) = AnnEncoder().encode([_on(image, group(GraphicType.POLYGON, closed))], [image], context, [])
    (read,) = MicroscopyBulkSimpleAnnotations.from_dataset(reread(made)).AnnotationGroupSequence
    for shape, found in zip((one, two, three), read.get_graphic_data("2D"), strict=True):
        np.testing.assert_array_equal(found, shape)


def test_a_hundred_thousand_shapes_are_no_burden(
    group: Callable[..., AnnotationGroup], slide: Callable[..., Dataset], context: ResultContext
) -> None:
    image = slide(rows=100_000, columns=100_000)
    shapes = tuple(np.random.default_rng(1).uniform(0, 1e5, (100_000, 1, 2)))
    (made,) = AnnEncoder().encode([_on(image, group(GraphicType.POINT, shapes))], [image], context, [])
    assert len(made.AnnotationGroupSequence[0].DoublePointCoordinatesData) == 16 * 100_000


@pytest.mark.parametrize("kind", list(GraphicType))
def test_foreign_validators_find_nothing_wrong_but_what_is_not_there(
    kind: GraphicType,
    group: Callable[..., AnnotationGroup],
    slide: Callable[..., Dataset],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    no_errors: Callable[[Path], list[str]],
) -> None:
    image, points = slide(), {GraphicType.POINT: (1, 2)}.get(kind, (4, 9))
    told = _on(image, group(kind, _shapes(3, points), confidences=(0.1, 0.2, 0.3)))
    (made,) = AnnEncoder().encode([told], [image], context, [])
    assert "CommonZCoordinateValue" not in made.AnnotationGroupSequence[0]
    assert [error for error in no_errors(written(made)) if not error.endswith(ARTEFACT)] == []
