"""Every value an engine may answer with goes through a real worker and its real encoder into the catalog."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from dicom_node.model import JobState
from dicom_node.plugins import encoder_class, encoder_kinds
from dicom_node.values import (
    AnnotationGroup,
    Annotations,
    Code,
    Document,
    EngineResult,
    GraphicType,
    Mesh,
    Picture,
    Provenance,
    Quantities,
    Quantity,
    ResultValue,
    Segment,
    SlideLabels,
)

SLIDE, OTHER = "1.2.3.1.1", "1.2.3.1.2"
TISSUE = Code(value="85756007", scheme="SCT", meaning="Tissue")
TUMOUR = Segment(number=3, key="tumour", label="Tumour", category=TISSUE, type=TISSUE)
PROVENANCE = Provenance(
    name="outside", version="2", manufacturer="m", device_uid="2.25.7", weights_sha256="", config_sha256=""
)


def _slide(bench: Any, uid: str) -> Dataset:
    origin, shared, measures = Dataset(), Dataset(), Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = "1", "2"
    measures.PixelSpacing, measures.SliceThickness = [0.0005, 0.0005], 0.004
    shared.PixelMeasuresSequence = [measures]
    made: Dataset = bench.dataset(
        uid,
        Modality="SM",
        FrameOfReferenceUID="1.2.3.9",
        TotalPixelMatrixRows=40,
        TotalPixelMatrixColumns=60,
        ImageOrientationSlide=[0, -1, 0, -1, 0, 0],
        TotalPixelMatrixOriginSequence=[origin],
        SharedFunctionalGroupsSequence=[shared],
    )
    return made


def _values() -> dict[str, tuple[ResultValue, str]]:
    """By name: the value, and the modality of what becomes of it."""
    square = np.array([[1.0, 1.0], [5.0, 1.0], [5.0, 5.0]])
    group = AnnotationGroup(label="n", category=TISSUE, type=TISSUE, graphic_type=GraphicType.POLYGON, shapes=(square,))
    vertices = np.eye(4, 3, dtype=np.float32)
    triangles = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], np.uint32)
    percent = Code(value="%", scheme="UCUM", meaning="Percent")
    return {
        "labels": (
            SlideLabels(labels=np.full((4, 6), 3, np.uint8), sop_instance_uid=SLIDE, segments=(TUMOUR,)),
            "SEG",
        ),
        "numbers": (
            Quantities(sop_instance_uids=(SLIDE,), items=(Quantity(code=TISSUE, value=0.25, unit=percent),)),
            "SR",
        ),
        "surface": (Mesh(vertices=vertices, triangles=triangles, title="Tooth", segments=(TUMOUR,)), "M3D"),
        "picture": (Picture(pixels=np.zeros((2, 2), np.uint8), sop_instance_uid=SLIDE, title="Heat"), "OT"),
        "document": (Document(pdf=b"%PDF-1.4", sop_instance_uids=(SLIDE,), title="Report"), "DOC"),
        "annotations": (Annotations(sop_instance_uid=SLIDE, groups=(group,)), "ANN"),
    }


@pytest.fixture
def answered(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """What becomes of an answer with those values: the instances in sending order."""

    def do(*values: ResultValue, results: tuple[str, ...] = encoder_kinds()) -> list[Any]:
        bench.receive(_slide(bench, SLIDE), _slide(bench, OTHER))
        bench.encoders = [encoder_class(kind)() for kind in encoder_kinds()]
        monkeypatch.setattr(bench.engine, "run", lambda *_: EngineResult(values=values, provenance=PROVENANCE))
        (job_id,) = bench.route(bench.plan(results=results))
        assert bench.worker().run_once("w") is True
        job = bench.queue.job(job_id)
        assert job.state is JobState.DONE, job.error
        return list(bench.queue.job_results(job.id))

    return do


@pytest.mark.parametrize("name", ["labels", "numbers", "surface", "picture", "document", "annotations"])
def test_each_value_becomes_what_a_destination_and_the_archive_get(
    name: str, answered: Callable[..., list[Any]], bench: Any
) -> None:
    value, modality = _values()[name]
    results = [instance.modality for instance in answered(value)]
    assert set(results) == {modality}
    assert len(results) == (2 if name == "labels" else 1)  # as bits and as a label map
    (delivery,) = bench.queue.deliveries()
    assert [item.instance.modality for item in delivery.items] == results
    assert not [activity for activity in bench.queue.open_studies() if activity.pending_series]  # nothing to analyse


def test_together_they_are_encoded_in_one_order_and_only_what_the_rule_asks_for(
    answered: Callable[..., list[Any]],
) -> None:
    values = [value for value, _ in _values().values()]
    found = answered(*reversed(values), results=("ann", "seg", "sc", "sr", "stl"))
    assert [instance.modality for instance in found] == ["SEG", "SR", "M3D", "OT", "ANN"]


@pytest.mark.parametrize(("name", "images"), [("surface", {SLIDE, OTHER}), ("picture", {SLIDE}), ("document", {SLIDE})])
def test_only_the_images_a_value_speaks_of_are_read_and_for_a_surface_the_series(
    name: str, images: set[str], answered: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    for kind in ("stl", "sc", "pdf"):
        encoder = encoder_class(kind)

        def seen(self: Any, values: Any, sources: Any, *rest: Any, encode: Any = encoder.encode) -> Any:
            read.update(str(source.SOPInstanceUID) for source in sources)
            return encode(self, values, sources, *rest)

        monkeypatch.setattr(encoder, "encode", seen)
    answered(_values()[name][0])
    assert read == images
