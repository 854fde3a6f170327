"""Results of every kind on the wire: this node's sender gives them to another node, which keeps and finds them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicom_node.config import DeliverySettings, DestinationSettings
from dicom_node.dimse.contexts import STORAGE_SOP_CLASSES
from dicom_node.dimse.files import send_files
from dicom_node.headers import is_image, scan
from dicom_node.model import Destination
from dicom_node.pipeline.encode import data_set_bytes
from dicom_node.plugins import encoder_class, encoder_kinds
from dicom_node.values import (
    AnnotationGroup,
    Annotations,
    Document,
    GraphicType,
    Mesh,
    Picture,
    Quantities,
    Quantity,
    ResultContext,
    Segment,
    SlideLabels,
)

EXPLICIT_LE = "1.2.840.10008.1.2.1"


@pytest.fixture
def every_kind(
    slide: Callable[..., Dataset], tissues: tuple[Segment, ...], context: ResultContext
) -> dict[str, Dataset]:
    """An object of each kind, all about one slide."""
    image, tissue = slide(), tissues[0]
    uid = str(image.SOPInstanceUID)
    triangles = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]], np.uint32)
    group = AnnotationGroup(
        label="Nuclei",
        category=tissue.category,
        type=tissue.type,
        graphic_type=GraphicType.POINT,
        shapes=(np.array([[3.5, 4.5]]),),
    )
    values = [
        Mesh(vertices=np.eye(4, 3, dtype=np.float32), triangles=triangles, title="Tumour", segments=tissues),
        Picture(pixels=np.zeros((9, 9, 3), np.uint8), sop_instance_uid=uid, title="Heat map"),
        Document(pdf=b"%PDF-1.4\n%%EOF\n", sop_instance_uids=(uid,), title="Report"),
        Annotations(sop_instance_uid=uid, groups=(group,)),
        SlideLabels(labels=np.full((90, 130), 3, np.uint8), sop_instance_uid=uid, segments=tissues),
        Quantities(sop_instance_uids=(uid,), items=(Quantity(code=tissue.type, value=1, unit=tissue.type),)),
    ]
    made: dict[str, Dataset] = {}
    for kind in encoder_kinds():
        (made[kind],) = encoder_class(kind)().encode(values, [image], context, tuple(made.values()))
    return made


def test_the_node_accepts_and_indexes_every_kind_and_takes_none_but_pictures_for_images(
    every_kind: dict[str, Dataset],
) -> None:
    assert len({(made.SeriesInstanceUID, made.SeriesNumber) for made in every_kind.values()}) == len(every_kind)
    for kind, made in every_kind.items():
        assert made.SOPClassUID in STORAGE_SOP_CLASSES
        data = data_set_bytes(made, made.file_meta.TransferSyntaxUID)
        header = scan(memoryview(data), EXPLICIT_LE, max_inflated_header_bytes=2**20)
        assert header.sop_instance_uid == made.SOPInstanceUID
        assert is_image(header) == (kind == "sc")


def test_a_destination_may_name_every_kind() -> None:
    kinds = tuple(kind for kind in encoder_kinds() if kind != "labelmap")  # a SEG as well
    known = DestinationSettings.model_validate({"ae_title": "A", "host": "h", "port": 104, "results": list(kinds)})
    assert known.results == kinds


@pytest.mark.timeout(120)
def test_every_kind_is_sent_stored_unchanged_and_found(
    every_kind: dict[str, Dataset],
    written: Callable[[Dataset], Path],
    running_node: Callable[..., Any],
    tool: Callable[[str], str],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    node = running_node("pacs", engines={}, jobs={"workers": 0})
    files = [written(made) for made in every_kind.values()]
    statuses: dict[Path, int | None] = {}
    send_files(
        files,
        Destination(name="pacs", ae_title="DICOM_NODE", host="127.0.0.1", port=node.dicom_port),
        lambda path, status, error: statuses.update({path: status}),
        settings=DeliverySettings(),
        calling_ae_title="SENDER",
    )
    assert statuses == dict.fromkeys(files, 0)
    study = str(every_kind["seg"].StudyInstanceUID)
    found = tmp_path / "found"
    found.mkdir()
    query = (
        "-k",
        "QueryRetrieveLevel=SERIES",
        "-k",
        f"StudyInstanceUID={study}",
        "-k",
        "Modality",
        "-k",
        "SeriesNumber",
    )
    words = ("-S", "-aet", "SENDER", "-aec", "DICOM_NODE", "-X", "-od", found, *query, "-k", "SeriesInstanceUID")
    check = run(tool("findscu"), *words, "127.0.0.1", str(node.dicom_port))
    assert check.returncode == 0, check.stderr
    answers = {str(told.SeriesInstanceUID): told.Modality for told in map(_read, found.iterdir())}
    assert answers == {str(made.SeriesInstanceUID): made.Modality for made in every_kind.values()}
    kept = [path.read_bytes() for path in node.data_dir.rglob("*.dcm")]
    for made in every_kind.values():
        data = data_set_bytes(made, made.file_meta.TransferSyntaxUID)
        assert any(file.endswith(data) for file in kept), made.Modality


@pytest.mark.peers
@pytest.mark.timeout(120)
def test_orthanc_takes_every_kind_but_label_maps(
    every_kind: dict[str, Dataset],
    written: Callable[[Dataset], Path],
    orthanc: Callable[[int, int, int], Any],
    free_port: Callable[[], int],
) -> None:
    http, dicom = free_port(), free_port()
    peer = orthanc(http, dicom, free_port())
    files = {written(made): kind for kind, made in every_kind.items() if kind != "labelmap"}
    statuses: dict[str, int | None] = {}
    send_files(
        files,
        Destination(name="orthanc", ae_title="ORTHANC", host="127.0.0.1", port=dicom),
        lambda path, status, error: statuses.update({files[path]: status}),
        settings=DeliverySettings(),
        calling_ae_title="SENDER",
    )
    assert statuses == dict.fromkeys(files.values(), 0)
    arrived = {peer.call(f"/instances/{one}/tags?simplify")["SOPInstanceUID"] for one in peer.call("/instances")}
    assert arrived == {str(made.SOPInstanceUID) for kind, made in every_kind.items() if kind != "labelmap"}


def _read(path: Path) -> Dataset:
    return dcmread(path, force=True)
