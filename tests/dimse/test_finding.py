"""C-FIND as SCU: which objects a destination has, asked of the node's own servers, of dcmtk's wire, and of Orthanc."""

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind

from dicom_node.config import DeliverySettings
from dicom_node.dimse import finding
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


Answers = Callable[[Dataset], Iterator[tuple[int, Dataset | None]]]


@pytest.fixture
def answering() -> Iterator[Callable[[Answers], Destination]]:
    """`answering(answers)`: a destination, pynetdicom's own, that answers queries like that."""
    with ExitStack() as stack:

        def start(answers: Answers) -> Destination:
            ae = AE(ae_title="PACS")
            ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
            handlers = [(evt.EVT_C_FIND, lambda event: answers(event.identifier))]
            server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
            stack.callback(server.shutdown)
            return at(server.socket.getsockname()[1], "PACS")

        yield start


def match(sop_instance_uid: str, **keys: str) -> tuple[int, Dataset]:
    found = Dataset()
    found.QueryRetrieveLevel = "IMAGE"
    found.SOPInstanceUID = sop_instance_uid
    for keyword, value in keys.items():
        setattr(found, keyword, value)
    return 0xFF00, found


def test_who_ignores_the_keys_is_believed_only_what_is_of_that_series(answering: Any) -> None:
    def everything(asked_for: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        yield match("1.1", **SERIES)
        yield match("1.2", **SERIES | {"StudyInstanceUID": "1.2.3"})
        yield match("1.3", **SERIES | {"SeriesInstanceUID": "1.2.3"})
        yield match("1.4")  # not said of which
        yield match("")

    assert asked(finder(), answering(everything), SERIES["SeriesInstanceUID"]) == {"1.1", "1.4"}


def test_an_answer_that_is_cut_off_says_nothing(answering: Any) -> None:
    def half(asked_for: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        yield match("1.1", **SERIES)
        yield 0xA700, None

    with pytest.raises(DeliveryUnavailable, match="A700H"):
        asked(finder(), answering(half))


@pytest.mark.parametrize(("bound", "why"), [("MOST_MATCHES", "more than 1 matches"), ("FIND_S", "after 1 s")])
def test_an_answer_without_end_is_not_waited_for(
    answering: Any, bound: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, bound, 1)
    given_up = threading.Event()

    def endless(asked_for: Dataset) -> Iterator[tuple[int, Dataset | None]]:
        number = 0
        while not given_up.wait(0.1):
            number += 1
            yield match(f"1.{number}", **SERIES)

    try:
        with pytest.raises(DeliveryUnavailable, match=why):
            asked(finder(), answering(endless))
    finally:
        given_up.set()


@pytest.mark.peers
def test_orthanc_says_what_it_has(
    orthanc: Callable[..., Any], free_port: Callable[[], int], dcmtk: Callable[..., Any], make_file: Callable[..., Path]
) -> None:
    http, dicom = free_port(), free_port()
    orthanc(http, dicom, free_port())
    paths = [make_file(pixels=16, **SERIES) for _ in range(3)] + [make_file(pixels=16, **MORE)]
    dcmtk("storescu", "-aec", "ORTHANC", "127.0.0.1", dicom, *paths[1:])
    assert asked(finder(), at(dicom, "ORTHANC")) == {path.stem for path in paths[1:]}
