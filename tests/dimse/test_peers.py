"""Orthanc as the destination of C-MOVE, and as the requester of C-MOVE and C-GET."""

import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

pytestmark = pytest.mark.peers

STUDY = {"StudyInstanceUID": "1.2.826.0.1.3680043.10.21", "SeriesInstanceUID": "1.2.826.0.1.3680043.10.22"}


@pytest.fixture
def pair(serve: Callable[..., Any], orthanc: Callable[..., Any], free_port: Callable[[], int]) -> tuple[Any, Any]:
    """A node and an Orthanc that know each other."""
    http, dicom = free_port(), free_port()
    destination = {"ae_title": "ORTHANC", "host": "127.0.0.1", "port": dicom}
    node = serve(destinations={"orthanc": destination})
    return node, orthanc(http, dicom, node.port)


def kept(peer: Any, folder: Path) -> dict[str, Path]:
    """SOP Instance UID to a file of what Orthanc keeps."""
    found = {}
    folder.mkdir(exist_ok=True)
    for instance in peer.call("/instances"):
        path = folder / instance
        path.write_bytes(peer.file(instance))
        found[str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)] = path
    return found


def test_orthanc_queries_and_retrieves_by_move_and_by_get(
    pair: tuple[Any, Any],
    dcmtk: Callable[..., Any],
    make_file: Callable[..., Path],
    tmp_path: Path,
    data_set_bytes: Any,
) -> None:
    node, peer = pair
    paths = [make_file(pixels=128, PatientName="Orthanc^Test", **STUDY) for _ in range(3)]
    dcmtk("storescu", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *paths)
    sent = {path.stem: data_set_bytes(path) for path in paths}

    dcmtk(
        *("movescu", "-S", "-aem", "ORTHANC", "-aec", "DICOM_NODE", "-k", "QueryRetrieveLevel=STUDY"),
        *("-k", f"StudyInstanceUID={STUDY['StudyInstanceUID']}", "127.0.0.1", node.port),
    )
    assert {uid: data_set_bytes(path) for uid, path in kept(peer, tmp_path / "a").items()} == sent

    forget(peer)
    query = peer.call("/modalities/node/query", {"Level": "Study", "Query": {"PatientName": "orthanc*"}})
    answers = peer.call(f"/queries/{query['ID']}/answers")
    assert len(answers) == 1
    peer.call(f"/queries/{query['ID']}/retrieve", {"TargetAet": "ORTHANC", "Synchronous": True})
    assert {uid: data_set_bytes(path) for uid, path in kept(peer, tmp_path / "b").items()} == sent
    node.counted.wait_for(lambda c: c.answered.count(("move", 0)) == 2)

    if version_of(peer) < (1, 12, 6):
        return  # an older Orthanc retrieves by C-MOVE only
    forget(peer)
    peer.call(
        "/modalities/node/get",
        {"Level": "Study", "Resources": [{"StudyInstanceUID": STUDY["StudyInstanceUID"]}], "Synchronous": True},
    )
    assert {uid: data_set_bytes(path) for uid, path in kept(peer, tmp_path / "c").items()} == sent
    node.counted.wait_for(lambda c: ("get", 0) in c.answered)


def version_of(peer: Any) -> tuple[int, ...]:
    """Orthanc's version."""
    return tuple(int(part) for part in re.findall(r"\d+", str(peer.call("/system")["Version"])))


def forget(peer: Any) -> None:
    """Delete everything Orthanc keeps."""
    for patient in peer.call("/patients"):
        request = urllib.request.Request(f"http://127.0.0.1:{peer.http}/patients/{patient}", method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()
