"""Pictures, read back by pydicom and by dcmtk: the same pixels, and nobody can take them for an acquired image."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.results.sc import ScEncoder
from dicom_node.values import Picture, ResultContext

Pixels = npt.NDArray[np.uint8]
SHAPES = [(5, 7), (5, 7, 3), (64, 48), (64, 48, 3)]  # an odd number of bytes, and an even one


def _pixels(shape: tuple[int, ...]) -> Pixels:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def _picture(image: Dataset, pixels: Any, **more: Any) -> Picture:
    return Picture(pixels=pixels, sop_instance_uid=str(image.SOPInstanceUID), title="Heat map", **more)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pixels_are_the_engines_for_pydicom_and_for_dcmtk(
    shape: tuple[int, ...],
    radiograph: Callable[..., Dataset],
    context: ResultContext,
    reread: Callable[[Dataset], Dataset],
    written: Callable[[Dataset], Path],
    tool: Callable[[str], str],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    image, pixels = radiograph(), _pixels(shape)
    (made,) = ScEncoder().encode([_picture(image, pixels)], [image], context, [])
    np.testing.assert_array_equal(reread(made).pixel_array, pixels)
    shown = tmp_path / "shown.pnm"
    check = run(tool("dcm2pnm"), "+op", written(made), shown)
    assert check.returncode == 0, check.stderr
    content = shown.read_bytes()
    np.testing.assert_array_equal(np.frombuffer(content[-pixels.size :], np.uint8).reshape(shape), pixels)


def test_every_text_says_that_it_is_not_for_diagnosis_and_what_it_was_made_from(
    radiograph: Callable[..., Dataset], context: ResultContext, product_context: ResultContext
) -> None:
    image = radiograph()
    (made,) = ScEncoder().encode([_picture(image, _pixels((5, 7)), notes=("resized",))], [image], context, [])
    assert (made.SOPClassUID, made.Modality) == ("1.2.840.10008.5.1.4.1.1.7", "OT")
    assert list(made.ImageType) == ["DERIVED", "SECONDARY"]
    for text in (made.SeriesDescription, made.ImageComments, made.DerivationDescription):
        assert "not for diagnosis" in text
    assert made.SeriesDescription == "AI DEMONSTRATION: Picture, not for diagnosis, demo-model 1.2.0"
    assert "not for clinical use" in made.ImageComments and made.ImageComments.endswith("resized")
    assert made.DerivationDescription.startswith("Heat map. ")
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == image.SOPInstanceUID
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == image.SeriesInstanceUID
    assert (made.PatientID, made.StudyInstanceUID) == ("P-0815", image.StudyInstanceUID)
    assert made.ContributingEquipmentSequence[0].ManufacturerModelName == "demo-model"
    (made,) = ScEncoder().encode([_picture(image, _pixels((5, 7)))], [image], product_context, [])
    assert "DEMONSTRATION" not in made.SeriesDescription and "not for diagnosis" in made.SeriesDescription


@pytest.mark.parametrize("burned_in", ["YES", "NO", None, "?"])
def test_burned_in_annotation_is_what_the_image_says_and_never_guessed(
    burned_in: str | None, radiograph: Callable[..., Dataset], context: ResultContext
) -> None:
    image = radiograph()
    if burned_in:
        image.BurnedInAnnotation = burned_in
    (made,) = ScEncoder().encode([_picture(image, _pixels((5, 7)))], [image], context, [])
    assert made.get("BurnedInAnnotation") == (burned_in if burned_in in ("YES", "NO") else None)


def test_a_picture_lies_as_its_image_only_if_it_has_the_images_matrix_and_stays_lossy(
    radiograph: Callable[..., Dataset], context: ResultContext
) -> None:
    image = radiograph()
    image.Rows, image.Columns, image.PatientOrientation, image.Laterality = 5, 7, ["L", "F"], "R"
    image.LossyImageCompression, image.LossyImageCompressionRatio = "01", 8
    (same,) = ScEncoder().encode([_picture(image, _pixels((5, 7)))], [image], context, [])
    (other,) = ScEncoder().encode([_picture(image, _pixels((6, 7)))], [image], context, [])
    assert list(same.PatientOrientation) == ["L", "F"] and not other.PatientOrientation
    assert (same.Laterality, same.BodyPartExamined) == ("R", "CHEST")
    assert (same.LossyImageCompression, same.LossyImageCompressionRatio) == ("01", 8)


def test_equal_arguments_give_equal_bytes_and_each_picture_its_own_uid(
    radiograph: Callable[..., Dataset], context: ResultContext, written: Callable[[Dataset], Path]
) -> None:
    image = radiograph()
    pictures = [_picture(image, _pixels((5, 7, 3))), _picture(image, _pixels((9, 9)))]
    first, again = (ScEncoder().encode(pictures, [image], context, []) for _ in range(2))
    assert [written(made).read_bytes() for made in first] == [written(made).read_bytes() for made in again]
    assert len({made.SOPInstanceUID for made in first}) == 2
    (other, _) = ScEncoder().encode(pictures, [image], replace(context, run_key="run 2"), [])
    assert other.SOPInstanceUID != first[0].SOPInstanceUID


def test_what_is_no_picture_about_a_source_is_an_error(
    radiograph: Callable[..., Dataset], context: ResultContext
) -> None:
    image = radiograph()
    for pixels in (_pixels((5, 7)).astype(np.uint16), _pixels((5, 7, 4)), _pixels((0, 7)), _pixels((65536, 1))):
        with pytest.raises(EncodingError, match="picture"):
            ScEncoder().encode([_picture(image, pixels)], [image], context, [])
    with pytest.raises(EncodingError, match="no source for the image"):
        ScEncoder().encode([_picture(radiograph(), _pixels((5, 7)))], [image], context, [])
    assert ScEncoder().encode([], [image], context, []) == []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bare", [False, True])
def test_foreign_validators_find_nothing_wrong(
    shape: tuple[int, ...],
    bare: bool,
    radiograph: Callable[..., Dataset],
    context: ResultContext,
    written: Callable[[Dataset], Path],
    no_errors: Callable[[Path], list[str]],
) -> None:
    image = radiograph()
    if bare:
        del image.BodyPartExamined, image.PatientBirthDate, image.StudyID, image.AccessionNumber
        image.PatientSex = "U"
    (made,) = ScEncoder().encode([_picture(image, _pixels(shape))], [image], context, [])
    assert no_errors(written(made)) == []
