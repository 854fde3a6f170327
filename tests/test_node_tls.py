"""The node as processes with DICOM over TLS, and what keeps it from starting."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

Tool = Callable[[str], str]
BARE: dict[str, Any] = {"engines": {}, "jobs": {"workers": 0}}


def certify(openssl: str, folder: Path, days: int) -> dict[str, str]:
    """A `tls` block: a certificate that is its own authority, for whoever calls and whoever is called."""
    certificate, key = folder / "node.pem", folder / "node.key"
    words = (
        *("req", "-x509", "-nodes", "-days", str(days), "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", f"{key}.new", "-out", certificate),
    )
    subprocess.run([openssl, *map(str, words)], check=True, capture_output=True, timeout=60)
    os.chmod(f"{key}.new", 0o600)
    os.replace(f"{key}.new", key)
    return {"certificate": str(certificate), "key": str(key), "ca": str(certificate)}


@pytest.fixture
def block(tool: Tool, tmp_path: Path) -> dict[str, str]:
    """A `tls` block that holds for 40 days."""
    return certify(tool("openssl"), tmp_path, 40)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small CT."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID, ds.Modality = "1.2.3.4", "1.2.3.4.5", "P1", "CT"
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 2, 2, 16, 16, 15
    ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 0, 1, "MONOCHROME2"
    ds.PixelData = bytes(8)
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    return tmp_path / "image.dcm"


def metric(node: Any, name: str, **labels: str) -> float:
    """The sum of the samples with these labels among theirs."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(node.get("/metrics")[1])
        for sample in family.samples
        if sample.name == f"dicom_node_{name}" and labels.items() <= sample.labels.items()
    )


def days_left(node: Any) -> float:
    """Of the node's certificate, as /metrics tells."""
    return (metric(node, "tls_certificate_expiry_timestamp_seconds", certificate="tls") - time.time()) / 86400


def test_a_node_speaks_tls_and_nothing_else_and_takes_in_new_certificates(
    running_node: Callable[..., Any],
    tool: Tool,
    block: dict[str, str],
    image: Path,
    tmp_path: Path,
    wait_for: Callable[..., None],
) -> None:
    node = running_node(tls=block, receivers=2, **BARE)
    assert f"127.0.0.1:{node.dicom_port} over TLS" in node.ready_line
    where = f"127.0.0.1:{node.dicom_port}/DICOM_NODE"
    assert "1 of 1 files stored" in node.command("send", str(image), "--to", where, "--tls").stdout
    wait_for(lambda: days_left(node) > 0, 10.0, "the metric")
    assert 39 < days_left(node) < 41

    certify(tool("openssl"), tmp_path, 5)
    wait_for(lambda: days_left(node) < 6, 15.0, "the first receiver to show the new certificate")
    in_force = '"changed TLS files are in force"'
    wait_for(lambda: node.tail().count(in_force) == 2, 15.0, "the second receiver to show it")
    fetched = node.command("fetch", "1.2.3.4", "--from", where, "--tls", "--into", str(tmp_path / "got"))
    assert "1 files in" in fetched.stdout
    assert "a TLS certificate ends soon: replace its files" in node.tail()


def test_plain_and_tls_side_by_side_and_delivery_over_tls(
    running_node: Callable[..., Any], block: dict[str, str], image: Path, wait_for: Callable[..., None], free_port: Any
) -> None:
    port = free_port()
    itself = {"ae_title": "DICOM_NODE", "host": "127.0.0.1", "port": port, "tls": True}
    node = running_node(
        tls={**block, "port": port},
        destinations={"PACS": itself},
        rules_dir=str(rules_for(image.parent)),
        completion={"quiet_s": 0.1},
        **BARE,
    )
    assert f"and, over TLS, on 127.0.0.1:{port}" in node.ready_line
    assert f"over TLS {port}," in node.command("status").stdout
    assert f"ok    tls.port: 127.0.0.1:{port} takes connections" in node.command("doctor", check=False).stdout
    stored = node.command("send", str(image), "--to", f"127.0.0.1:{node.dicom_port}/DICOM_NODE")
    assert "1 of 1 files stored" in stored.stdout
    wait_for(lambda: metric(node, "deliveries_total", outcome="sent") == 1, 30.0, "the delivery")


def rules_for(folder: Path) -> Path:
    """Rules that send every CT to PACS."""
    rules = folder / "send-rules"
    rules.mkdir()
    (rules / "send.yaml").write_text(
        'rule: send\ndescription: For the test.\nwhen:\n  - Modality in ["CT"]\nsend: {to: [PACS], what: source}\n'
    )
    return rules


def test_a_node_whose_key_others_may_read_does_not_start(
    running_node: Callable[..., Any], block: dict[str, str]
) -> None:
    os.chmod(block["key"], 0o644)
    node = running_node(tls=block, wait=False, **BARE)
    assert node.process.wait(30) != 0
    assert "has mode 0644, expected 0600 or 0640: run `chmod 600" in node.tail()
    checked = node.command("config", "check", check=False)
    assert checked.returncode != 0 and "has mode 0644" in checked.stderr


def test_the_command_line_loads_no_tls_where_none_is_configured() -> None:
    code = "import sys, dicom_node.cli, dicom_node.commands, dicom_node.supervisor; print('ssl' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "False"
