"""Every text of a patient's images is a canary: none is seen in a log, a metric, a file's name or what commands print.

The images are taken, refused, routed, failed by an engine that is not there and by rules that stumble over them, sent
to an engine that speaks DICOM and answers, delivered and delivered in vain, asked for, and looked over by fsck; HTTP
asks for its token meanwhile. The audit trail tells which patient by the Patient ID, and nothing else of anybody.
"""

import copy
import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import generate_uid

from dicom_node.demo.phantom_dicom import write_cxr

TOKEN = "5c" * 32
GIVEN_UP = 'dicom_node_dead_letters{kind="delivery"} '
TEXTS = {"LO", "LT", "PN", "SH", "ST", "UC", "UT"}
ADDED = (
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientAddress", "PatientComments", "PatientTelephoneNumbers"),
    *("OtherPatientIDs", "OtherPatientNames", "PatientMotherBirthName", "MedicalRecordLocator", "Occupation"),
    *("AdditionalPatientHistory", "ReferringPhysicianName", "RequestingPhysician", "PerformingPhysicianName"),
    *("NameOfPhysiciansReadingStudy", "OperatorsName", "AccessionNumber", "StudyID", "StudyDescription"),
    *("SeriesDescription", "ImageComments", "InstitutionName", "InstitutionAddress", "StationName", "ProtocolName"),
    *("RequestedProcedureDescription", "AdmissionID", "CountryOfResidence", "MilitaryRank", "EthnicGroup"),
)
RULES = {
    "box": "rule: to-the-box\nwhen: ['Modality == \"DX\"']\n"
    "run: {engine: box, results: [sr]}\nsend: {to: [KEEPS], what: both}\n",
    "engine": "rule: to-nobody\nwhen: ['Modality == \"DX\"', 'PatientName != \"x\"']\n"
    "run: {engine: gone, results: [sr]}\nsend: {to: [PACS], what: both}\n",
    "error": "rule: stumbles\nwhen: ['int(PatientID) > 3 && double(StudyDescription) > 1.0']\n"
    "run: {engine: gone, results: [sr]}\n",
}


class Canaries:
    """Puts one of its own into every text of a data set."""

    def __init__(self) -> None:
        self.sung: list[str] = []

    def _next(self) -> str:
        self.sung.append(f"CNRY{len(self.sung):04d}Q")
        return self.sung[-1]

    def fill(self, ds: Dataset) -> None:
        for keyword in ADDED:
            if keyword not in ds:
                setattr(ds, keyword, "")
        ds.PatientBirthDate = "19230411"
        nested = Dataset()
        nested.PatientID, nested.IssuerOfPatientID = "", ""
        ds.OtherPatientIDsSequence = [nested]
        ds.add_new(0x00110010, "LO", "")
        ds.add_new(0x00111001, "LT", "")
        self._sing(ds)

    def _sing(self, ds: Dataset) -> None:
        for element in ds:
            if element.VR == "SQ":
                for item in element.value:
                    self._sing(item)
            elif element.VR in TEXTS:
                element.value = f"{self._next()}^{self._next()}" if element.VR == "PN" else self._next()

    def heard(self, text: str) -> list[str]:
        return [one for one in (*self.sung, "19230411") if one in text]


def _saved(ds: Dataset, path: Path, **values: Any) -> Path:
    """A copy under UIDs of its own, with values that are none of their VRs."""
    ds = copy.deepcopy(ds)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in values.items():
            tag = tag_for_keyword(keyword)
            assert tag is not None
            ds[tag] = RawDataElement(Tag(tag), dictionary_VR(tag), len(value), value.encode(), 0, False, True)
        ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def entity() -> Iterator[Callable[..., Any]]:
    """`entity(title, **more)`: an AE that takes what it is sent, and may answer (`tests/engines/servers`)."""
    name = "contract_server_dicom_engine"
    path = Path(__file__).parents[1] / "engines" / "servers" / "dicom_engine.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    with ExitStack() as stack:
        yield lambda title, **more: stack.enter_context(module.DicomEngineServer(title, **more))


@pytest.mark.timeout(240)
def test_no_text_of_a_patient_is_seen_outside_the_archive_and_the_catalog(
    running_node: Callable[..., Any],
    storescu: Callable[..., subprocess.CompletedProcess[str]],
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    wait_for: Callable[..., None],
    entity: Callable[..., Any],
    tmp_path: Path,
) -> None:
    token = tmp_path / "http.token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    rules = tmp_path / "rules"
    rules.mkdir()
    for name, text in RULES.items():
        (rules / f"{name}.yaml").write_text(text)
    nobody, dicom_port = free_port(), free_port()
    here = {"host": "127.0.0.1"}
    keeps, box = entity("KEEPS"), entity("AI_BOX", node=("127.0.0.1", dicom_port, "DICOM_NODE"), automatic=["sr"])
    node = running_node(
        dicom_port=dicom_port,
        audit={},
        rules_dir=str(rules),
        log_level="DEBUG",
        http_token_file=str(token),
        metrics_port=0,
        completion={"quiet_s": 0.2, "quiet_after_fault_s": 0.2},
        destinations={
            "PACS": {"ae_title": "PACS", "port": nobody, **here},
            "KEEPS": {"ae_title": "KEEPS", "port": keeps.port, **here},
        },
        engines={
            "gone": {
                "kind": "monai_label", "model": "m", "timeout_s": 5,
                "options": {"base_url": f"http://127.0.0.1:{nobody}"},
            },
            "box": {"kind": "dicom", "options": {
                "ae_title": "AI_BOX", "port": box.port, "count": 1, "quiet_s": 0.5, "poll_s": 0.5, **here
            }},
        },
        jobs={"workers": 2, "max_attempts": 1, "backoff_s": 0.1, "deadline_s": 60},
        delivery={"backoff_s": 0.1, "breaker_probe_s": 0.5, "connect_timeout_s": 5, "give_up_after_s": 3},
    )  # fmt: skip
    canaries = Canaries()
    source = write_cxr(tmp_path / "film.dcm", 810002)
    film = pydicom.dcmread(tmp_path / "film.dcm")
    canaries.fill(film)
    patient_ids = {str(film.PatientID), "CNRYOTHER"}
    odd = {"StudyDate": "CNRYDATE", "InstanceNumber": "CNRYNUMBER  ", "ContentTime": "CNRYTIME"}
    canaries.sung += ["CNRYDATE", "CNRYNUMBER", "CNRYTIME"]
    folder = tmp_path / "send"
    folder.mkdir()
    film.save_as(folder / "film.dcm")
    for keyword, value in odd.items():
        storescu(node, _saved(film, folder / f"{keyword}.dcm", **{keyword: value}))
    assert storescu(node, folder / "film.dcm").returncode == 0
    facts = json.loads((node.data_dir / "run" / "supervisor.json").read_text())["facts"]
    there = f"http://127.0.0.1:{facts['metrics_port']}"

    def is_through() -> bool:
        """One delivery given up, image and answer delivered. A study of two identities would wait for a person."""
        page = _get(f"{there}/metrics", TOKEN)[1]
        is_given_up = GIVEN_UP in page and GIVEN_UP + "0.0" not in page
        return is_given_up and {"DX", "SR"} <= {ds.Modality for ds in keeps.received}

    wait_for(is_through, 120, f"the study to be sent, answered and given up; log: {node.log}")
    film.PatientName = canaries.sung[0] + "^OTHER"  # the same UID with other content, and another identity
    film.PatientID = "CNRYOTHER"
    canaries.sung.append("CNRYOTHER")
    film.save_as(folder / "film.dcm")
    storescu(node, folder / "film.dcm")
    cut = folder / "cut.dcm"
    cut.write_bytes((folder / "film.dcm").read_bytes()[:2000])
    storescu(node, cut)
    for words in (["-k", "PatientName=CNRY0000Q*"], ["-k", "StudyDate=CNRYDATE"], ["-k", "PatientID=CNRYOTHER"]):
        asked = [
            "-S",
            "-aec",
            "DICOM_NODE",
            "127.0.0.1",
            str(node.dicom_port),
            "-k",
            "QueryRetrieveLevel=STUDY",
            *words,
        ]
        subprocess.run([tool("findscu"), *asked], capture_output=True, timeout=60, check=False)

    # what HTTP says to whom
    assert _get(f"{there}/metrics")[0] == 401 and _get(f"{there}/ready", "f" * 64)[0] == 401
    assert _get(f"{there}/ping")[0] == 200 and node.get("/ping")[0] == 200 and node.get("/metrics")[0] == 404
    told = {"metrics": _get(f"{there}/metrics", TOKEN)[1], "ready": _get(f"{there}/ready", TOKEN)[1]}
    assert 'dicom_node_http_refusals_total{reason="token"} 1.0' in told["metrics"]
    with urllib.request.urlopen(f"http://127.0.0.1:{node.http_port}/ping", timeout=10) as answer:
        assert TOKEN not in str(answer.headers)
    for words in (["status"], ["fsck"], ["timeline", source.study_instance_uid], ["audit", "verify"]):
        ran = node.command(*words, check=False)
        told[" ".join(words)] = ran.stdout + ran.stderr
    assert node.stop() == 0
    told["log"] = node.log.read_text()
    told["file names"] = "\n".join(str(path.relative_to(node.data_dir)) for path in node.data_dir.rglob("*"))
    told["signs of life"] = "\n".join(path.read_text() for path in (node.data_dir / "run").glob("*.json"))

    assert len(canaries.sung) > 40 and source.study_instance_uid in told["log"]
    assert {where: canaries.heard(text) for where, text in told.items() if canaries.heard(text)} == {}
    audited = "".join(path.read_text() for path in (node.data_dir / "audit").rglob("*") if path.is_file())
    assert set(canaries.heard(audited)) == patient_ids
    told["audit trail"] = audited
    assert not [where for where, text in told.items() if TOKEN in text]
    kept = b"".join(path.read_bytes() for path in (node.data_dir / "archive").rglob("*.dcm"))
    assert canaries.sung[0].encode() in kept  # they were there to be seen


def _get(url: str, token: str = "") -> tuple[int, str]:
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()
