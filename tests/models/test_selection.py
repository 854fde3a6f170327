"""Why a model does not take a series: the attribute and what is wanted, never what somebody typed into the header."""

from typing import Any

import pydicom
import pytest

from dicom_node.model import SeriesHeader
from dicom_node.models.manifest import OneOfBlock, SelectBlock
from dicom_node.models.selection import select_image, select_series

CANARY = "CANARY^JANE"
SELECT = SelectBlock(
    modality=("DX",),
    sop_class=("DigitalXRayImageStorageForPresentation",),
    body_part=OneOfBlock(any=("CHEST",)),
    view=OneOfBlock(any=("PA", "AP")),
)
FITS: dict[str, Any] = {
    "Modality": "DX",
    "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1",
    "BodyPartExamined": "CHEST",
    "ViewPosition": "PA",
}


@pytest.mark.parametrize(
    ("keyword", "says"),
    [
        ("Modality", "Modality is not DX"),
        ("SOPClassUID", "SOP class is not Digital X-Ray Image Storage - For Presentation"),
        ("BodyPartExamined", "Body Part Examined is not CHEST"),
        ("ViewPosition", "the view is not PA or AP"),
    ],
)
def test_a_reason_names_the_attribute_and_what_is_wanted_but_not_what_was_found(keyword: str, says: str) -> None:
    image = {**FITS, keyword: CANARY}
    header = SeriesHeader(
        series_instance_uid="1.2", instance_count=1, values={name: (value,) for name, value in image.items()}
    )
    assert select_image(SELECT, FITS).ok
    assert select_image(SELECT, image).reasons == (says,)
    assert select_series(SELECT, header).reasons == (says,)


def test_a_view_code_that_is_not_known_is_not_repeated() -> None:
    image = {**FITS, "ViewPosition": "", "ViewCodeSequence": [{"CodeValue": CANARY}]}
    assert select_image(SELECT, image).reasons == ("the view is not PA or AP",)


@pytest.mark.parametrize(
    ("code", "fits"), [("816094009", True), ("51185008", True), ("T-D3000", True), ("85562004", False)]
)
def test_a_coded_body_part_is_enough(code: str, fits: bool) -> None:
    region = {"CodeValue": code, "CodingSchemeDesignator": "SRT" if code.startswith("T") else "SCT"}
    image = {**FITS, "BodyPartExamined": "", "AnatomicRegionSequence": [region]}
    assert select_image(SELECT, image).ok is fits
    region_item = pydicom.Dataset()
    for keyword, value in region.items():
        setattr(region_item, keyword, value)
    assert select_image(SELECT, {**image, "AnatomicRegionSequence": [region_item]}).ok is fits
