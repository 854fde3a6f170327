"""C-FIND as SCU: which objects a destination has, asked of the node's own servers, of dcmtk's wire, and of Orthanc."""

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.config import DeliverySettings
from dicom_node.dimse.finding import DimseFinder
from dicom_node.dimse.wires import open_link
from dicom_node.errors import DeliveryUnavailable
from dicom_node.model import Destination

SERIES = {"StudyInstanceUID": "1.2.826.0.1.3680043.10.31", "SeriesInstanceUID": "1.2.826.0.1.3680043.10.32"}
MORE = {**SERIES, "SeriesInstanceUID": "1.2.826.0.1.3680043.10.33"}
QUICK = DeliverySettings(response_timeout_s=5, connect_timeout_s=5)


def finder(wire: Any = "own") -> DimseFinder:
    return DimseFinder(QUICK, "DICOM_NODE", open_link(wire))


def at(port: int, ae_title: str = "DICOM_NODE") -> Destination:
    return Destination(name="PACS", ae_title=ae_title, host="127.0.0.1", port=port)


def asked(found_by: DimseFinder, destination: Destination, *series: str) -> frozenset[str] | None:
    beats: list[None] = []
    return found_by.find_instances(
        destination,
        SERIES["StudyInstanceUID"],
        series or (SERIES["SeriesInstanceUID"], MORE["SeriesInstanceUID"]),
        lambda: beats.append(None),
    )


def test_a_second_node_says_what_it_has(
    serve: Callable[..., Any], wire: Any, dcmtk: Callable[..., Any], make_file: Callable[..., Path]
) -> None:
    node = serve()
    assert asked(finder(wire), at(node.port)) == frozenset()
    paths = [make_file(**SERIES), make_file(**SERIES), make_file(**MORE), make_file()]
    dcmtk("storescu", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *paths)
    assert asked(finder(wire), at(node.port)) == {path.stem for path in paths[:3]}
    assert asked(finder(wire), at(node.port), MORE["SeriesInstanceUID"]) == {paths[2].stem}


def test_who_takes_no_queries_is_told_from_who_does_not_answer(
    tool: Callable[[str], str], free_port: Callable[[], int], wait_for: Any, tmp_path: Path
) -> None:
    port = free_port()
    with pytest.raises(DeliveryUnavailable):
        asked(finder(), at(port))
    storescp = subprocess.Popen([tool("storescp"), "-od", str(tmp_path), str(port)])  # takes no queries
    try:

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(listens, 20, "storescp")
        assert asked(finder(), at(port)) is None
    finally:
        storescp.terminate()
        storescp.wait(timeout=10)


@pytest.mark.peers
def test_orthanc_says_what_it_has(
    orthanc: Callable[..., Any], free_port: Callable[[], int], dcmtk: Callable[..., Any], make_file: Callable[..., Path]
) -> None:
    http, dicom = free_port(), free_port()
    orthanc(http, dicom, free_port())
    paths = [make_file(pixels=16, **SERIES) for _ in range(3)] + [make_file(pixels=16, **MORE)]
    dcmtk("storescu", "-aec", "ORTHANC", "127.0.0.1", dicom, *paths[1:])
    assert asked(finder(), at(dicom, "ORTHANC")) == {path.stem for path in paths[1:]}
