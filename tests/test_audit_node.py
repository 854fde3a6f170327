"""A whole node that keeps an audit trail: who told what, over a restart, a killed receiver and a change of settings."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import generate_uid

from dicom_node.audit.chain import file_names, parse_line
from dicom_node.cli import main

STUDY = "1.2.3.4"
NAME = "Canary^Never^Told"


def told(folder: Path) -> list[tuple[str, str]]:
    """Event code (type code before it where there is one) and description of each message."""
    found = []
    for name in file_names(folder):
        for line in (folder / name).read_bytes().splitlines(keepends=True)[1:]:
            parsed = parse_line(line)
            assert parsed is not None, line
            text = parsed[3].decode()
            kind = re.search(r'<EventTypeCode csd-code="(\d+)"', text) or re.search(r'<EventID csd-code="(\d+)"', text)
            assert kind is not None
            why = re.search("<EventOutcomeDescription>(.*?)<", text)
            found.append((kind[1], why[1] if why else ""))
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = STUDY, f"{STUDY}.1"
    ds.PatientID, ds.PatientName, ds.Modality = "P1", NAME, "CT"
    ds.Rows = ds.Columns = 4
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = 15, 0, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelData = np.zeros(16, "<u2").tobytes()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    path = tmp_path / "image.dcm"
    ds.save_as(path, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return path


def test_a_node_tells_who_did_what_and_verify_finds_what_is_changed(
    running_node: Callable[..., Any], image: Path, tool: Callable[[str], str], wait_for: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"engines": {}, "jobs": {"workers": 0}, "audit": {"site_id": "HERE"}}
    node = running_node(**settings)
    folder = node.data_dir / "audit"

    def run(*words: object) -> None:
        subprocess.run([tool(str(words[0])), *map(str, words[1:])], check=True, capture_output=True, timeout=60)

    there = ("-aec", "DICOM_NODE", "127.0.0.1", node.dicom_port)
    run("storescu", *there, image)
    run("findscu", "-S", "-k", "QueryRetrieveLevel=STUDY", "-k", f"PatientName={NAME}", *there)
    node.command("rules", "reload")
    node.command("route", STUDY)
    wait_for(lambda: len(told(folder)) >= 7, 30, "all to be told")
    codes = [code for code, _ in told(folder)]
    assert codes[:2] == ["110129", "110120"]  # the first settings, then the start
    assert sorted(codes[2:]) == ["110102", "110103", "110104", "110112", "110131"]
    wait_for(lambda: 'audit_events_total{kind="query",outcome="0"} 1.0' in node.get("/metrics")[1], 20, "the count")
    assert "dicom_node_audit_trail_whole 1.0" in node.get("/metrics")[1]
    os.kill(node.pid("receiver"), signal.SIGKILL)
    wait_for(lambda: any("died" in why for _, why in told(folder)), 30, "the killed receiver to be told")
    assert node.stop() == 0
    assert told(folder)[-1][0] == "110121"
    text = b"".join((folder / name).read_bytes() for name in file_names(folder))
    assert NAME.encode() not in text and b"P1" in text  # no names of patients, but in queries as they came
    assert NAME not in node.log.read_text()

    settings["max_associations"] = 77
    again = running_node(**settings)
    assert ("110129", "settings differ from the last start: max_associations") in told(folder)
    verified = again.command("audit", "verify")
    assert re.search(r"\d+ lines in 1 files, none changed; head \d+:[0-9a-f]{64}", verified.stdout)
    wait_for(lambda: told(folder)[-1][0] == "110101", 20, "that somebody looked")
    assert re.search(
        r"ok +audit trail: \d+ lines in 1 files, none changed", again.command("doctor", check=False).stdout
    )
    again.stop()

    name = file_names(folder)[-1]
    lines = (folder / name).read_bytes().splitlines(keepends=True)
    (folder / name).write_bytes(b"".join(lines[:-2]))
    assert "WRONG audit trail: audit-000000000001.log:" in again.command("doctor", check=False).stdout
    broken = again.command("audit", "verify", check=False)
    assert broken.returncode == 2
    assert "are gone: 2 at the end of the trail" in broken.stderr


def test_verify_of_a_copy_names_file_and_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dicom_node.audit.chain import Chain

    chain = Chain(tmp_path / "copy", file_bytes=1 << 20)
    chain.append([("t", b"<m>%d</m>" % n) for n in range(5)])
    head = chain.head
    chain.close()
    monkeypatch.chdir(tmp_path)
    words = ["audit", "verify", "--folder", str(tmp_path / "copy")]
    assert main([*words, "--anchor", f"{head.sequence}:{head.hash}"]) == 0
    path = tmp_path / "copy" / file_names(tmp_path / "copy")[0]
    path.write_bytes(path.read_bytes().replace(b"<m>2<", b"<m>7<"))
    assert main(words) == 2
    assert f"{path.name}:4: line 3 is not what was written" in capfd.readouterr().err
    assert main([*words, "--anchor", "x"]) == 2
    assert main(["audit", "verify", "--folder", str(tmp_path / "none")]) == 2


def test_settings_are_kept_as_digests_only(tmp_path: Path) -> None:
    from dicom_node.config import NodeConfig
    from dicom_node.trails import SETTINGS_SEEN, changed_settings

    made = {"data_dir": str(tmp_path), "destinations": {"PACS": {"ae_title": "SECRETLY", "host": "h", "port": 104}}}
    assert changed_settings(NodeConfig.model_validate(made)) == ["(first start with an audit trail)"]
    assert changed_settings(NodeConfig.model_validate(made)) == []
    kept = (tmp_path / SETTINGS_SEEN).read_text()
    assert "SECRETLY" not in kept and "destinations.PACS.ae_title" in json.loads(kept)
    made["destinations"]["PACS"]["port"] = 105  # type: ignore[index]
    assert changed_settings(NodeConfig.model_validate(made)) == ["destinations.PACS.port"]
