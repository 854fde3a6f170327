"""A LeapAI CXR v1 server for tests: its documentation acted out, with scores somebody chose for a network.

Written from the vendor's pages alone, not from the adapter. By hand:
`python -m tests.engines.servers.leapai --port 8500 --mount /share/in=/tmp/share` prints a token; `/share/in` is what
requests call the folder `/tmp/share`. `POST /_misbehave {"what": WORD, "times": N}` makes it do wrong: drop, slow,
partial, garbage, unavailable, failure, failure-undocumented, warning, crash, patient, no-folder, other-image,
no-findings, spelling, contradiction, twice, no-data, old-version, bad-confidence, html-401; of heatmaps and reports:
other-shape, bomb, no-png, grey, alpha, bad-report, no-report; of bulk: skip, skip-all, half, link, bulk-crash,
no-images.
"""

import argparse
import base64
import hashlib
import hmac
import json
import struct
import sys
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError

KEY = b"a key only the vendor has, 32 bytes or more"
DAYS = 30
SCORES: Mapping[str, float] = {
    "Tuberculosis": 0.04,
    "Cardiomegaly": 0.91,
    "Pleural Thickening": 0.12,
    "Pleural Effusion": 0.73,
    "Pneumothorax": 0.01,
    "Consolidation": 0.5,
    "Atelectasis": 0.49,
    "Nodule/Mass": 0.22,
    "Fibrosis": 0.08,
    "Infiltration": 0.61,
    "Calcification": 0.03,
}
PDF = b"%PDF-1.4\n1 0 obj <</Type /Catalog>> endobj\ntrailer <</Root 1 0 R>>\n%%EOF\n"


def png(columns: int, rows: int, channels: int = 3, level: int = 200) -> bytes:
    """A PNG of one colour, 8 bits: grey (1), RGB (3) or RGBA (4)."""
    kind = {1: 0, 3: 2, 4: 6}[channels]
    line = b"\0" + bytes([level]) * (columns * channels)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", columns, rows, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(line * rows)) + chunk(b"IEND", b"")
    )


def heatmap(ds: pydicom.Dataset, wrong: str) -> bytes:
    """As large as the image, unless it goes wrong."""
    columns, rows = int(ds.Columns), int(ds.Rows)
    if wrong == "bomb":
        return png(1, 1)[:16] + struct.pack(">II", 60000, 60000) + png(1, 1)[24:]
    if wrong == "no-png":
        return b"GIF89a" + bytes(64)
    if wrong == "other-shape":
        return png(columns, rows // 2)
    return png(columns, rows, {"grey": 1, "alpha": 4}.get(wrong, 3))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def issue(expires_at: float, key: bytes = KEY) -> str:
    """A JWT (HS256) that ends at that second since 1970."""
    head = _b64(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    signed = f"{head}.{_b64(json.dumps({'sub': 'hospital', 'exp': int(expires_at)}).encode())}"
    return f"{signed}.{_b64(hmac.new(key, signed.encode(), hashlib.sha256).digest())}"


class Refused(Exception):
    """Answered with this status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Seen:
    """A request that reached the network: what was asked, the headers it came with, and the file as it lay there."""

    request: Mapping[str, Any]
    headers: Mapping[str, str]
    file: bytes


@dataclass
class LeapAi:
    """The server. `mounts` maps a folder as requests call it to the folder it is; `bearer` wants that word first."""

    mounts: Mapping[str, Path]
    port: int = 0
    bearer: bool = False
    version: str = "1.4.2"
    seen: list[Seen] = field(default_factory=list)
    asked: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._wrong: list[str] = []
        self._guard = threading.Lock()
        self.stopping = threading.Event()
        handler = type("Bound", (Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LeapAi":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def misbehave(self, what: str, times: int = 1) -> None:
        """Do it wrong that way, so many times."""
        with self._guard:
            self._wrong += [what] * times

    def wrong(self) -> str:
        """How the next inference goes wrong, '' when it does not."""
        with self._guard:
            return self._wrong.pop(0) if self._wrong else ""

    # --- what the documentation says

    def authenticate(self, value: str | None) -> None:
        """Raises Refused."""
        if not value:
            raise Refused(401, "Token missing")
        if self.bearer:
            value = value.removeprefix("Bearer ") if value.startswith("Bearer ") else ""
        parts = value.split(".")
        try:
            signature = hmac.new(KEY, f"{parts[0]}.{parts[1]}".encode(), hashlib.sha256).digest()
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "==="))
            if not hmac.compare_digest(_b64(signature), parts[2]):
                raise ValueError
        except (ValueError, IndexError):
            raise Refused(401, "Invalid token") from None
        if claims["exp"] < time.time():
            raise Refused(401, "Token expired")

    def infer(self, request: Any, headers: Mapping[str, str], wrong: str = "") -> Mapping[str, Any]:
        """Data of a single inference. Raises Refused."""
        request = request if isinstance(request, dict) else {}
        if "input_image_path" not in request:
            raise Refused(400, "input_image_path is required in the request")
        if "save_to_disk" not in request:
            raise Refused(400, "save_to_disk is required in the request")
        path = self._there(request["input_image_path"])
        if not path.is_file():
            raise Refused(400, f"Input image path does not exist: {request['input_image_path']}")
        if path.suffix != ".dcm":
            raise Refused(400, f"Requested image is not a DICOM file: {request['input_image_path']}")
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            own = str(ds.get("PatientID", ""))
        except (InvalidDicomError, OSError, ValueError) as exc:
            raise Refused(400, f"Invalid DICOM image, unable to fetch patient ID: {exc}") from None
        if "patient_id" in request and not (isinstance(request["patient_id"], str) and request["patient_id"].strip()):
            raise Refused(400, f"Invalid patient_id: '{request['patient_id']}' in request body")
        patient = request.get("patient_id") or own
        if not patient:
            raise Refused(400, "Patient ID is empty or None in the DICOM file")
        if not isinstance(request["save_to_disk"], bool):
            raise Refused(400, f"Invalid value for save_to_disk, should be a boolean: {request['save_to_disk']}")
        if request["save_to_disk"] and "output_folder_path" not in request:
            raise Refused(400, "output_folder_path is required in the request when save_to_disk is True")
        self.seen.append(Seen(request=request, headers=headers, file=path.read_bytes()))
        data = self._data(ds, patient)
        if request["save_to_disk"]:
            return self._saved(data, self._there(request["output_folder_path"]), ds, wrong)
        picture = base64.b64encode(heatmap(ds, wrong)).decode()
        return data | {"source_image": picture, "heatmap": picture}

    def bulk(self, request: Any, headers: Mapping[str, str], wrong: str) -> None:
        """Every `.dcm` below a folder; what fails is left out in silence. Raises Refused."""
        request = request if isinstance(request, dict) else {}
        if "input_folder_path" not in request:
            raise Refused(400, "input_folder_path is required in the request")
        folder, out = self._there(request["input_folder_path"]), self._there(request["output_folder_path"])
        if not folder.is_dir():
            raise Refused(400, f"Input folder path does not exist: {request['input_folder_path']}")
        found = sorted(folder.rglob("*.dcm"))
        if not found or wrong == "no-images":
            raise Refused(400, "No Dicom images found in the provided path")
        if wrong == "bulk-crash":
            raise Refused(500, "Bulk inference failed due to an internal error")
        self.seen.append(Seen(request=request, headers=headers, file=b"".join(path.read_bytes() for path in found)))
        if wrong == "skip":
            found = found[1:]
        for path in () if wrong == "skip-all" else found:
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            self._saved(self._data(ds, str(ds.PatientID)), out, ds, wrong)

    def _saved(self, data: dict[str, Any], out: Path, ds: pydicom.Dataset, wrong: str) -> Mapping[str, Any]:
        """Write all of it; the answer has the paths."""
        patient = data["metadata"]["patient_id"]
        there = out / patient
        try:
            there.mkdir(parents=True, exist_ok=True)
        except OSError:
            raise Refused(500, f"Unable to create output folder: {out}") from None
        text = json.dumps(data)
        predictions = there / f"{patient}_predictions.json"
        if wrong == "link":
            (out / "elsewhere.json").write_text(text)
            predictions.symlink_to(out / "elsewhere.json")
        else:
            predictions.write_text(text[: len(text) // 2] if wrong == "half" else text)
        (there / f"{patient}_heatmap.png").write_bytes(heatmap(ds, wrong))
        (there / f"{patient}_source_image.png").write_bytes(heatmap(ds, ""))
        if wrong != "no-report":
            (there / f"{patient}_report.pdf").write_bytes(b"<html>" if wrong == "bad-report" else PDF)
        return data | {name: str(there / f"{patient}_{name}.png") for name in ("source_image", "heatmap")}

    def _data(self, ds: pydicom.Dataset, patient: str) -> dict[str, Any]:
        return {
            "result": "TB Presumptive" if SCORES["Tuberculosis"] >= 0.5 else "Abnormal",
            "findings": [
                {"name": name, "presence": score >= 0.5, "confidence": score} for name, score in SCORES.items()
            ],
            "metadata": {
                "model_version": self.version,
                "patient_id": patient,
                "patient_name": str(ds.get("PatientName", "")),
                "sop_instance_uid": str(ds.SOPInstanceUID),
                "age": str(ds.get("PatientAge", "")),
                "sex": str(ds.get("PatientSex", "")),
            },
        }

    def _there(self, text: Any) -> Path:
        asked = PurePosixPath(str(text).replace("\\", "/"))
        if not isinstance(text, str) or ".." in asked.parts:
            raise Refused(400, f"Invalid path input_image_path: {text}")
        for called, folder in self.mounts.items():
            base = PurePosixPath(called.replace("\\", "/"))
            if asked.is_relative_to(base):
                return folder / asked.relative_to(base)
        return Path("/nonexistent/image.dcm")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    owner: LeapAi

    def do_GET(self) -> None:
        """/ping, outside the envelope and without authentication."""
        self.owner.asked.append(("GET", self.path, dict(self.headers)))
        if self.path == "/ping":
            self._send(200, json.dumps({"status": "ok"}).encode())
        else:
            self._send(404, b"not found")

    def do_POST(self) -> None:
        """An inference, or an order to misbehave."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path == "/_misbehave":
            order = json.loads(body)
            self.owner.misbehave(order["what"], order.get("times", 1))
            self._send(200, b"{}")
            return
        self.owner.asked.append(("POST", self.path, dict(self.headers)))
        try:
            self.owner.authenticate(self.headers.get("authorization"))
            if self.path not in ("/single_inference", "/bulk_inference"):
                self._send(404, b"not found")
                return
            try:
                request = json.loads(body)
            except ValueError:
                raise Refused(415, "Unsupported Media Type: the body is not valid JSON") from None
            wrong = self.owner.wrong() if request else ""
            self._answer(request, wrong)
        except Refused as refused:
            self._envelope(refused.status, "Failure", None, refused.message)

    def _answer(self, request: Any, wrong: str) -> None:
        refusals = {
            "failure": (200, "Single Inference failed due to an internal error"),
            "failure-undocumented": (200, "Mr Doe's picture is odd"),
            "crash": (500, "Single Inference failed due to an internal error"),
            "patient": (400, "Patient ID is empty or None in the DICOM file"),
            "no-folder": (500, "Unable to create output folder: /out"),
        }
        if wrong in refusals:
            raise Refused(*refusals[wrong])
        data: Any = None
        if self.path == "/bulk_inference":
            self.owner.bulk(request, dict(self.headers), wrong)
        else:
            data = dict(self.owner.infer(request, dict(self.headers), wrong))
        if wrong == "drop":
            self.close_connection = True
        elif wrong == "unavailable":
            self._send(503, b"busy")
        elif wrong == "html-401":
            self._send(401, b"<html>proxy</html>")
        elif wrong == "garbage":
            self._send(200, b"<html>hello</html>")
        elif wrong == "slow":
            self.owner.stopping.wait(20)
            self.close_connection = True
        elif wrong == "partial":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b'{"Result": "Succ')
            self.close_connection = True
        elif wrong == "warning":
            self._envelope(200, "Warning", data, "Image quality is low")
        else:
            data = _distorted(data, wrong) if isinstance(data, dict) else None
            self._envelope(200, "Success", data, "Inference completed")

    def _envelope(self, status: int, result: str, data: Any, message: str) -> None:
        self._send(status, json.dumps({"Result": result, "Data": data, "Message": message}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _distorted(data: Any, wrong: str) -> Any:
    """Data, wrong in that way."""
    findings, metadata = data["findings"], data["metadata"]
    if wrong == "no-data":
        return None
    if wrong == "other-image":
        metadata["sop_instance_uid"] = "1.2.3.4.5"
    elif wrong == "old-version":
        metadata["model_version"] = "0.9"
    elif wrong == "no-findings":
        data |= {"findings": [], "result": "Normal"}
    elif wrong == "spelling":
        findings[7]["name"] = "nodule mass"
        findings.append({"name": "Aortic Enlargement", "presence": True, "confidence": 0.8})
    elif wrong == "contradiction":
        findings[1] |= {"presence": False}
    elif wrong == "twice":
        findings.append({"name": "cardio-megaly", "presence": False, "confidence": 0.2})
    elif wrong == "bad-confidence":
        findings[1]["confidence"] = 91
    return data


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8500)
    parser.add_argument("--mount", action="append", default=[], metavar="CALLED=FOLDER")
    parser.add_argument("--bearer", action="store_true")
    arguments = parser.parse_args()
    mounts = {called: Path(folder) for called, _, folder in (mount.partition("=") for mount in arguments.mount)}
    with LeapAi(mounts=mounts, port=arguments.port, bearer=arguments.bearer) as server:
        sys.stdout.write(f"{server.url}\n{issue(time.time() + DAYS * 86400)}\n")
        sys.stdout.flush()
        try:
            server.stopping.wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
