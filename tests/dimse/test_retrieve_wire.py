"""C-GET and C-MOVE over the wire with getscu and movescu."""

import logging
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from dicom_node.config import DeliverySettings
from dicom_node.dimse.files import send_files
from dicom_node.model import Destination

EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
CT, STUDY_ROOT_GET = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.2.2.3"


@pytest.fixture
def files(make_file: Callable[..., Path]) -> list[Path]:
    """Three files of one study."""
    study = {"StudyInstanceUID": "1.2.826.0.1.3680043.10.1", "SeriesInstanceUID": "1.2.826.0.1.3680043.10.2"}
    return [make_file(pixels=64, **study) for _ in range(3)]


def store(dcmtk: Callable[..., Any], port: int, paths: list[Path], *options: str) -> None:
    """C-STORE these."""
    dcmtk("storescu", *options, "-aec", "DICOM_NODE", "127.0.0.1", port, *paths)


def study_of(path: Path) -> list[str]:
    """The keys that name the file's study, as dcmtk's words."""
    uid = dcmread(path, stop_before_pixels=True).StudyInstanceUID
    return ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={uid}"]


@pytest.fixture
def storage_scp(tool: Callable[[str], str], free_port: Callable[[], int], tmp_path: Path) -> Iterator[Any]:
    """`storage_scp(*options)`: a running storescp; (port, folder it stores in)."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> tuple[int, Path]:
        folder, port = tmp_path / f"scp-{len(running)}", free_port()
        folder.mkdir()
        running.append(
            subprocess.Popen(
                [tool("storescp"), *options, "-aet", "ARCHIVE", "-od", str(folder), str(port)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return port, folder
            time.sleep(0.02)
        raise AssertionError("storescp did not listen")

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=10)


def destination(port: int, name: str = "ARCHIVE") -> dict[str, Any]:
    """Settings with that one destination."""
    return {
        "destinations": {"archive": {"ae_title": name, "host": "127.0.0.1", "port": port}},
        "delivery": {"connect_timeout_s": 2.0, "response_timeout_s": 10.0},
    }


def test_getscu_gets_the_bytes_that_were_stored(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], files: list[Path], tmp_path: Path, data_set_bytes: Any
) -> None:
    node = serve()
    store(dcmtk, node.port, files)
    (tmp_path / "got").mkdir()
    output = dcmtk(
        *("getscu", "-v", "-S", "+B", "-od", tmp_path / "got", "-aec", "DICOM_NODE", *study_of(files[0])),
        *("127.0.0.1", node.port),
    ).stdout
    assert "Completed Suboperations : 3" in output
    received = {dcmread(path, stop_before_pixels=True).SOPInstanceUID: path for path in (tmp_path / "got").iterdir()}
    assert {uid: data_set_bytes(path) for uid, path in received.items()} == {
        path.stem: data_set_bytes(path) for path in files
    }
    assert ("get", 0) in node.counted.answered


def test_a_requester_that_takes_another_syntax_gets_the_object_re_encoded(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], make_file: Callable[..., Path], tmp_path: Path
) -> None:
    node = serve()
    path = make_file(syntax=IMPLICIT, pixels=64)
    store(dcmtk, node.port, [path], "-xi")
    (tmp_path / "got").mkdir()
    dcmtk(
        *("getscu", "-S", "+B", "-od", tmp_path / "got", "-aec", "DICOM_NODE", *study_of(path)),
        *("127.0.0.1", node.port),
    )
    (got,) = (tmp_path / "got").iterdir()
    received, sent = dcmread(got), dcmread(path)
    assert received.file_meta.TransferSyntaxUID == EXPLICIT
    assert received == sent
    assert node.catalog.index.instance(path.stem).transfer_syntax_uid == IMPLICIT


@pytest.mark.parametrize(
    ("keys", "status"),
    [
        (["-k", "QueryRetrieveLevel=FRAME", "-k", "StudyInstanceUID=1.2"], "0xa900"),
        (["-k", "QueryRetrieveLevel=STUDY"], "0xa900"),
        (["-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3.4"], "0x0000"),
    ],
)
def test_the_final_status_of_a_get_that_sends_nothing(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], keys: list[str], status: str, tmp_path: Path
) -> None:
    node = serve()
    output = dcmtk(
        "getscu", "-d", "-S", "-od", tmp_path, "-aec", "DICOM_NODE", *keys, "127.0.0.1", node.port, check=False
    ).stdout
    assert status in output.lower()
    assert node.counted.answered == [("get", int(status, 16))]


def test_a_get_without_an_scp_role_fails_and_the_log_says_exactly_that(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    raw_peer: Any,
    files: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = serve()
    store(dcmtk, node.port, files)
    peer = raw_peer(node.port)
    peer.associate([(1, STUDY_ROOT_GET, [IMPLICIT]), (3, CT, [EXPLICIT])])
    study = dcmread(files[0], stop_before_pixels=True).StudyInstanceUID
    uid = study.encode() + b"\0" * (len(study) % 2)
    identifier = b"\x08\0\x52\0\x06\0\0\0STUDY \x20\0\x0d\0" + len(uid).to_bytes(4, "little") + uid
    request = {"CommandField": 0x10, "AffectedSOPClassUID": STUDY_ROOT_GET, "Priority": 0, "CommandDataSetType": 0}
    with caplog.at_level(logging.WARNING, logger="dicom_node"):
        peer.send_command(1, identifier, MessageID=1, **request)
        response = peer.read_command()
    assert (response.Status, response.NumberOfFailedSuboperations) == (0xA702, 3)
    assert response.ErrorComment == "no SCP role proposed for storage"
    _, failed = peer.read_pdu()
    assert all(path.stem.encode() in failed for path in files)
    messages = [record.message for record in caplog.records]
    assert "C-GET cannot send: the requester proposed no SCP role for any storage SOP class" in messages


def test_movescu_moves_to_a_configured_destination(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    storage_scp: Any,
    files: list[Path],
    data_set_bytes: Any,
) -> None:
    port, folder = storage_scp("+B")
    node = serve(**destination(port))
    store(dcmtk, node.port, files)
    dcmtk("movescu", "-S", "-aem", "ARCHIVE", "-aec", "DICOM_NODE", *study_of(files[0]), "127.0.0.1", node.port)
    received = {dcmread(path, stop_before_pixels=True).SOPInstanceUID: path for path in folder.iterdir()}
    assert {uid: data_set_bytes(path) for uid, path in received.items()} == {
        path.stem: data_set_bytes(path) for path in files
    }


@pytest.mark.parametrize(
    ("words", "port", "status"),
    [(["-aem", "NOBODY"], 104, 0xA801), (["-aem", "ARCHIVE"], 1, 0xA702)],
    ids=["unknown", "unreachable"],
)
def test_a_move_to_nowhere_ends_with_the_status_for_it(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], files: list[Path], words: list[str], port: int, status: int
) -> None:
    node = serve(**destination(port))
    store(dcmtk, node.port, files)
    dcmtk(*("movescu", "-S", *words, "-aec", "DICOM_NODE", *study_of(files[0]), "127.0.0.1", node.port), check=False)
    node.counted.wait_for(lambda c: any(service == "move" for service, _ in c.answered))
    assert ("move", status) in node.counted.answered


def test_an_object_the_destination_cannot_take_is_one_counted_failure(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    storage_scp: Any,
    make_file: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    study = {"StudyInstanceUID": "1.2.826.0.1.3680043.10.7"}
    good, private = make_file(**study), make_file(**study, SOPClassUID="1.3.6.1.4.1.9999.1")
    port, folder = storage_scp()
    node = serve(unknown_sop_classes=True, **destination(port))
    sent: list[int | None] = []
    send_files(
        [good, private],
        Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=node.port),
        lambda path, status, error: sent.append(status),
        settings=DeliverySettings(),
        calling_ae_title="TEST",
    )
    assert sent == [0, 0]
    with caplog.at_level(logging.WARNING, logger="dicom_node"):
        output = dcmtk(
            *("movescu", "-d", "-S", "-aem", "ARCHIVE", "-aec", "DICOM_NODE", *study_of(good)),
            *("127.0.0.1", node.port),
            check=False,
        ).stdout
    assert ("move", 0xB000) in node.counted.answered
    assert "FailedSOPInstanceUIDList" in output
    assert private.stem in output
    assert len(list(folder.iterdir())) == 1
    (record,) = [record for record in caplog.records if record.message == "sub-operation failed"]
    assert vars(record)["reason"] == "no presentation context was accepted for its SOP class"


def test_a_cancelled_move_stops_and_says_so(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    storage_scp: Any,
    make_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dicom_node.dimse.retrieval.PENDING_S", 0.0)  # movescu counts responses
    study = {"StudyInstanceUID": "1.2.826.0.1.3680043.10.8"}
    paths = [make_file(**study) for _ in range(40)]
    port, folder = storage_scp()
    node = serve(**destination(port))
    store(dcmtk, node.port, paths)
    dcmtk(
        *("movescu", "--cancel", "2", "-S", "-aem", "ARCHIVE", "-aec", "DICOM_NODE", *study_of(paths[0])),
        *("127.0.0.1", node.port),
        check=False,
    )
    node.counted.wait_for(lambda c: any(service == "move" for service, _ in c.answered))
    assert ("move", 0xFE00) in node.counted.answered
    assert len(list(folder.iterdir())) < len(paths)
