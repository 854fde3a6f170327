"""Why a model does not take a series: the attribute and what is wanted, never what somebody typed into the header."""

from typing import Any

import numpy as np
import pydicom
import pytest

from dicom_node.geometry import VolumeGeometry
from dicom_node.model import SeriesHeader
from dicom_node.models.manifest import GeometryBlock, OneOfBlock, SelectBlock
from dicom_node.models.selection import select_geometry, select_image, select_series

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


def _stack(*steps: float) -> VolumeGeometry:
    """Slices at 0 and `steps` mm apart, pixels of 1 mm."""
    positions = (0.0, *np.cumsum(steps).tolist())
    return VolumeGeometry(
        sop_instance_uids=tuple(f"1.2.{k}" for k in range(len(positions))),
        affine=np.diag([2.0, 1.0, 1.0, 1.0]),
        spacing_mm=(2.0, 1.0, 1.0),
        shape=(len(positions), 8, 8),
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        frame_of_reference_uid="1.2",
        left_out={},
        positions_mm=positions,
        regular=False,
    )


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([2.0] * 5 + [6.0] + [2.0] * 5, ()),
        ([2.0] * 5 + [4.0] * 4, ("voxels of 4.00 mm, the model takes at most 3 mm",)),
    ],
    ids=["a gap", "a coarse part"],
)
def test_a_gap_is_no_coarse_spacing_but_a_coarse_part_is(steps: list[float], says: tuple[str, ...]) -> None:
    select = SelectBlock(modality=("CT",), geometry=GeometryBlock(max_spacing_mm=3.0, regular="repair"))
    assert select_geometry(select, _stack(*steps)).reasons == says
