"""A Clara Train AIAA server for tests: the contract of its pages and of its clients, with a threshold for a model.

Written from the vendor's pages for 3.x and 4.1 and from what its clients send and parse, not from the adapter.
By hand: `python -m tests.engines.servers.aiaa --port 5000 [--generation 3.x]`; `PUT /_misbehave?next=WORD` makes the
next inference or mask2polygon go wrong: drop, unavailable, error, slow, partial, expired (440, every session
forgotten), other-grid, nowhere, mirrored, turned, probabilities, nothing, cropped, other-polygons, no-file, garbage,
said-no (status 200, success false), huge (announces what it does not send), traversal (a part that is called a path).
"""

import argparse
import json
import re
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import nibabel
import numpy as np

NIFTI: Any = nibabel.Nifti1Image
SOFT, BRIGHT = 40, 200  # spleen from here, aorta from there
LABELS = ["spleen", "aorta"]
POINTS_AT_LEAST = 6
CONFIG = {"version": "1", "type": "segmentation", "labels": LABELS, "description": "thresholds"}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "clara_spleen": {"type": "segmentation", "labels": LABELS, "description": "thresholds", "version": "1"},
    "clara_annotation": {
        "type": "annotation",
        "labels": ["spleen"],
        "description": "extreme points",
        "version": "2",
        "padding": 20.0,
        "roi": [32, 24, 12],
    },
    "clara_deepgrow": {"type": "deepgrow", "labels": [], "description": "clicks", "version": "1", "deepgrow": "3D"},
    "clara_covid": {"type": "classification", "labels": ["covid", "other"], "description": "", "version": "3"},
    "clara_pipe": {"type": "pipeline", "labels": ["spleen", "aorta"], "description": "", "version": "1"},
}
FINDINGS = {"covid": 0.9, "other": 0.25}


@dataclass(frozen=True)
class Part:
    """One part of multipart/form-data."""

    name: str
    filename: str
    body: bytes


@dataclass(frozen=True)
class Request:
    """One request as it came; `body` undecoded."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    parts: tuple[Part, ...]

    def part(self, *names: str) -> Part | None:
        """The first of those names."""
        return next((part for part in self.parts if part.name in names), None)


class Refused(Exception):
    """The request is answered with this status and text."""

    def __init__(self, status: int, body: bytes = b"", content_type: str = "text/html") -> None:
        super().__init__(status)
        self.status, self.body, self.content_type = status, body, content_type


def failed(status: int, kind: str, message: str) -> Refused:
    """As the server tells what went wrong."""
    told = {"error": {"message": [message], "type": kind}, "success": False}
    return Refused(status, json.dumps(told).encode() + b"\n", "application/json")


@dataclass
class AiaaServer:
    """Listens on 127.0.0.1; `requests` has all of them in order, `sessions` the files put."""

    port: int = 0
    generation: str = "4.1"
    admin_closed: bool = False
    more_shift: float = 0.0
    requests: list[Request] = field(default_factory=list)
    sessions: dict[str, bytes] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    seen_points: list[Any] = field(default_factory=list)
    slow_s: float = 2.0

    def __post_init__(self) -> None:
        """Bind; `__enter__` answers."""
        self.models: dict[str, Mapping[str, Any]] = dict(MODELS)
        self.configs = {name: dict(CONFIG) for name in self.models}
        self._next: list[str] = []
        self._guard = threading.Lock()
        self.stopping = threading.Event()
        handler = type("Bound", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "AiaaServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def misbehave(self, *words: str) -> None:
        """The next inferences go wrong like this, one after the other."""
        with self._guard:
            self._next += words

    def next_word(self) -> str:
        """How this one goes wrong; '' when it does not."""
        with self._guard:
            return self._next.pop(0) if self._next else ""

    def paths(self) -> list[str]:
        """Method and path of each request; session ids as ID."""
        return [f"{one.method} {re.sub('^/session/.+', '/session/ID', one.path)}" for one in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: AiaaServer

    def do_GET(self) -> None:
        """And every other method."""
        try:
            request = self._read()
            self.owner.requests.append(request)
            self._answer(request)
        except Refused as refused:
            self._send(refused.status, refused.body, refused.content_type)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _read(self) -> Request:
        unknown_length = self.headers.get("Transfer-Encoding") or "Content-Length" not in self.headers
        if unknown_length and self.command not in ("GET", "DELETE"):
            self.close_connection = True
            raise Refused(500, b"chunk headers were taken for content")
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        url = urlsplit(self.path)
        content_type = self.headers.get("Content-Type", "")
        return Request(
            method=self.command,
            path=unquote(url.path),
            query={key: values[-1] for key, values in parse_qs(url.query).items()},
            headers={key.lower(): value for key, value in self.headers.items()},
            body=body,
            parts=_parts(body, content_type) if content_type.startswith("multipart/form-data") else (),
        )

    def _answer(self, request: Request) -> None:
        path = request.path
        if path == "/_misbehave":
            self.owner.misbehave(request.query["next"])
            return self._json({})
        if path.startswith("/admin/model/"):
            return self._admin(request, path.removeprefix("/admin/model/"))
        if path == "/v1/models" and request.method == "GET":
            return self._models(request.query)
        if path == "/session/" and request.method == "PUT":
            return self._put_session(request)
        if path.startswith("/session/"):
            return self._session(request, path.removeprefix("/session/"))
        if path == "/v1/mask2polygon" and request.method == "POST":
            return self._mask2polygon(request)
        if path == "/v1/fixpolygon" and request.method == "POST":
            return self._fixpolygon(request)
        if path in ("/v1/segmentation", "/v1/dextr3d", "/v1/deepgrow", "/v1/inference") and request.method == "POST":
            return self._infer(request, path.removeprefix("/v1/"))
        raise Refused(404, b"<html><body>404 Not Found</body></html>")

    # --- models

    def _models(self, query: Mapping[str, str]) -> None:
        found = [{"name": name, **model} for name, model in self.owner.models.items()]
        if "model" in query:
            one = next((model for model in found if model["name"] == query["model"]), None)
            if one is None:
                raise failed(500, "AIAAException", "Model not found")
            return self._json(one)
        wanted = query.get("type"), query.get("label")
        return self._json(
            [
                model
                for model in found
                if wanted[0] in (None, model["type"]) and (wanted[1] is None or wanted[1] in model["labels"])
            ]
        )

    def _admin(self, request: Request, model: str) -> None:
        owner = self.owner
        if owner.admin_closed:
            raise Refused(403)
        if request.method == "PATCH" and owner.generation != "3.x":
            raise failed(405, "MethodNotAllowed", "The method is not allowed for the requested URL.")
        if request.method == "PUT":
            config, data = request.part("config"), request.part("data")
            if config is None or (data is None and model not in owner.models):
                raise failed(500, "AIAAException", "config and data are needed")
            told = json.loads(config.body)
            owner.configs[model] = told
            owner.models[model] = {key: told.get(key) for key in ("type", "labels", "description", "version")}
            return self._json({"message": "loaded"})
        if model not in owner.models:
            raise failed(404, "AIAAException", "Model not found")
        if request.method == "PATCH":
            owner.configs[model] = json.loads(request.body)
            return self._json({})
        if request.method == "DELETE":
            del owner.models[model], owner.configs[model]
            return self._json({})
        return self._json(owner.configs[model])

    # --- sessions

    def _put_session(self, request: Request) -> None:
        expiry = int(request.query.get("expiry", "0")) or 3600
        if request.parts:
            file = request.part("image")
            if file is None:
                raise failed(500, "AIAAException", "no image")
            content = file.body
        else:
            content = _fetched(json.loads(request.body)["dicom"])  # whatever its content type says
        session = str(uuid.uuid4())
        self.owner.sessions[session] = content
        self._json({"session_id": session, "expiry": expiry})

    def _session(self, request: Request, session: str) -> None:
        if session not in self.owner.sessions:
            raise failed(440, "AIAAException", "Session expired")
        if request.method == "DELETE":
            del self.owner.sessions[session]
        self._json({"session_id": session})

    # --- inference

    def _infer(self, request: Request, api: str) -> None:
        word = self.owner.next_word()
        if word == "drop":
            self.close_connection = True
            return None
        if word == "unavailable":
            raise Refused(503)
        if word == "expired":
            self.owner.sessions.clear()
        if word == "slow":
            self.owner.stopping.wait(self.owner.slow_s)
        if word == "said-no":
            return self._json({"error": {"message": ["SECRET-7"], "type": "ValueError"}, "success": False})
        model = self.owner.models.get(request.query.get("model", ""))
        if word == "error" or model is None:
            raise failed(500, "ValueError", "SECRET-7 went wrong")
        params = json.loads(getattr(request.part("params"), "body", b"{}"))
        file = self._input(request)
        if model["type"] == "classification":
            return self._both(None, FINDINGS, word)
        painted = self._painted(file, word, api, params)
        told = {"crop": [[0, 4], [0, 4], [0, 3]]} if word == "cropped" else {}
        if request.query.get("output") == "image" and word != "cropped":
            return self._file(painted, word)
        return self._both(painted, told, word)

    def _input(self, request: Request) -> bytes:
        if "session_id" in request.query:
            if request.query["session_id"] not in self.owner.sessions:
                raise failed(440, "AIAAException", "Session expired")
            return self.owner.sessions[request.query["session_id"]]
        file = request.part("image", "datapoint")
        if file is None or not file.filename:
            raise failed(500, "AIAAException", "no image")
        return file.body

    def _painted(self, file: bytes, word: str, api: str, params: Mapping[str, Any]) -> bytes:
        image = _load(file)
        values, affine = np.asarray(image.dataobj), image.affine
        if word == "nothing":
            values = np.full_like(values, SOFT - 1)
        if word == "garbage":
            return b"\x1f\x8bnot a volume"
        labels = np.zeros(values.shape, np.uint8)
        labels[values >= SOFT] = 1
        if api in ("dextr3d", "deepgrow"):
            labels = self._clicked(api, params, labels)
        else:
            labels[values >= BRIGHT] = 2
        return _saved(labels, affine, word)

    def _clicked(self, api: str, params: Mapping[str, Any], labels: Any) -> Any:
        """What is soft, in the box of extreme points, or on the slices with a foreground point and no background."""
        told = self._points(params, "points" if api == "dextr3d" else "foreground")
        if api == "dextr3d" and len(told) < POINTS_AT_LEAST:
            raise failed(500, "ValueError", "six points")
        background = [] if api == "dextr3d" else self._points(params, "background")
        self.owner.seen_points.append((told, background))
        out = np.zeros_like(labels)
        if api == "deepgrow":
            for _, _, k in told:
                out[:, :, k] = labels[:, :, k]
            for i, j, k in background:
                out[i, j, k] = 0
            return out
        low, high = np.min(told, axis=0), np.max(told, axis=0) + 1
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        out[box] = labels[box]
        return out

    def _points(self, params: Mapping[str, Any], key: str) -> list[list[int]]:
        told = params[key]
        if isinstance(told, str):
            if self.owner.generation != "3.x":
                raise failed(500, "ValueError", "invalid literal")  # what 4.x says to the text form
            told = json.loads(told)
        elif self.owner.generation == "3.x":
            raise failed(500, "TypeError", "the JSON object must be str")
        return [[int(part) for part in point] for point in told]

    # --- polygons

    def _mask2polygon(self, request: Request) -> None:
        file, params = request.part("image", "datapoint"), request.part("params")
        if file is None or params is None:
            raise failed(500, "AIAAException", "no image")
        try:
            json.loads(params.body)["more_points"]
        except ValueError:
            raise failed(500, "JSONDecodeError", "params") from None
        word = self.owner.next_word()
        mask = np.asarray(_load(file.body).dataobj) != 0
        slices = [_outlines(mask[:, :, k]) for k in range(mask.shape[2])]
        if word == "other-polygons":
            slices = slices[::-1]
        self._json(slices)

    def _fixpolygon(self, request: Request) -> None:
        params, file = request.part("params"), request.part("image", "datapoint")
        if params is None or file is None:
            raise failed(500, "AIAAException", "no image")
        told = json.loads(params.body)
        if told["dimension"] == 2:
            if not file.body.startswith(b"\x89PNG"):
                raise failed(500, "ValueError", "no picture")
            shift = self.owner.more_shift
            poly = [[[x + shift, y] for x, y in polygon] for polygon in told["poly"]]
            return self._both(None, {"poly": poly}, "")
        image = _load(file.body)
        if len(told["poly"]) != image.shape[2] or not told["poly"][told["slice_index"]][told["polygon_index"]]:
            raise failed(500, "ValueError", "slice")  # in 3D they are those of all slices
        return self._file(_saved(np.asarray(image.dataobj).astype(np.uint8), image.affine, ""), "")

    # --- sending

    def _file(self, content: bytes, word: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Disposition", 'attachment; filename="../../tmp1.nii.gz"')
        self.send_header("Content-Length", str(1 << 50 if word == "huge" else len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if word in ("partial", "huge") else content)
        self.close_connection = self.close_connection or word in ("partial", "huge")

    def _both(self, content: bytes | None, params: Any, word: str) -> None:
        """A text part `params`, and the file, which must have a file name."""
        boundary = uuid.uuid4().hex
        body = f'--{boundary}\r\nContent-Disposition: form-data; name="params"\r\n\r\n{json.dumps(params)}\r\n'.encode()
        if content is not None and word != "no-file":
            name = "../../../tmp/evil.nii.gz" if word == "traversal" else "result.nii.gz"
            head = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\nContent-Type: application/gzip'
            body += f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        if word == "partial":
            body = body[: len(body) // 2]
        self._send(200, body, f"multipart/form-data; boundary={boundary}")

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _parts(body: bytes, content_type: str) -> tuple[Part, ...]:
    """RFC 7578, as far as a client sends it."""
    boundary = b"--" + content_type.partition("boundary=")[2].strip('"').encode()
    found = []
    for piece in body.split(boundary)[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        texts = {}
        for item in head.decode().split("\r\n")[0].split(";")[1:]:
            key, _, value = item.strip().partition("=")
            texts[key] = value.strip('"')
        found.append(Part(texts.get("name", ""), texts.get("filename", ""), content.removesuffix(b"\r\n")))
    return tuple(found)


def _load(content: bytes) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.nii.gz")
        path.write_bytes(content)
        image: Any = nibabel.load(path)
        return NIFTI(np.asarray(image.dataobj), image.affine)


def _saved(labels: Any, affine: Any, word: str) -> bytes:
    """A NIfTI file, right unless told otherwise."""
    image = NIFTI(labels, affine)
    if word == "probabilities":
        image = NIFTI(labels.astype(np.float32) / 3, affine)
    elif word == "nowhere":
        image = NIFTI(labels, np.eye(4))
    elif word == "mirrored":
        image = NIFTI(labels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    elif word == "turned":
        image = nibabel.as_closest_canonical(image)  # type: ignore[no-untyped-call]
    elif word == "other-grid":
        image = NIFTI(labels[::2, ::2], affine @ np.diag([2.0, 2.0, 1.0, 1.0]))
    elif word == "cropped":
        image = NIFTI(labels[:4, :4, :3], affine)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.nii.gz")
        nibabel.save(image, path)
        return path.read_bytes()


def _outlines(mask: Any) -> list[list[list[int]]]:
    """A polygon around each run of equal columns: [column, row] of its corner pixels. Only for what has no holes."""
    polygons: list[list[list[int]]] = []
    columns = mask.shape[0]
    i = 0
    while i < columns:
        rows = np.flatnonzero(mask[i])
        if not len(rows):
            i += 1
            continue
        end = i
        while end + 1 < columns and np.array_equal(mask[end + 1], mask[i]):
            end += 1
        first, last = int(rows[0]), int(rows[-1])
        polygons.append([[i, first], [end, first], [end, last], [i, last]])
        i = end + 1
    return polygons


def _fetched(dicom: Mapping[str, Any]) -> bytes:
    """The series by C-GET from the node that is named, as one volume."""
    from pydicom.dataset import Dataset
    from pynetdicom import AE, build_role, evt
    from pynetdicom.sop_class import CTImageStorage, PatientRootQueryRetrieveInformationModelGet  # type: ignore

    images: list[Any] = []
    try:
        socket.create_connection((dicom["server_address"], dicom["server_port"]), 5).close()
    except OSError:
        raise failed(500, "AIAAException", "cannot connect") from None

    def keep(event: Any) -> int:
        ds = event.dataset
        ds.file_meta = event.file_meta
        images.append(ds)
        return 0x0000

    ae = AE(ae_title="AIAA")
    ae.add_requested_context(PatientRootQueryRetrieveInformationModelGet)
    ae.add_requested_context(CTImageStorage)
    association = ae.associate(
        dicom["server_address"],
        dicom["server_port"],
        ae_title=dicom["ae_title"],
        ext_neg=[build_role(CTImageStorage, scp_role=True)],
        evt_handlers=[(evt.EVT_C_STORE, keep)],
    )
    if not association.is_established:
        raise failed(500, "AIAAException", "cannot connect")
    query = Dataset()
    query.QueryRetrieveLevel, query.PatientID = dicom["query_level"], dicom["patient_id"]
    if dicom["query_level"] in ("STUDY", "SERIES"):
        query.StudyInstanceUID = dicom["study_uid"]
    if dicom["query_level"] == "SERIES":
        query.SeriesInstanceUID = dicom["series_uid"]
    statuses = [status for status, _ in association.send_c_get(query, PatientRootQueryRetrieveInformationModelGet)]
    association.release()
    images = [ds for ds in images if ds.SeriesInstanceUID == dicom["series_uid"]]
    if not images or statuses[-1].Status != 0x0000:
        raise failed(500, "AIAAException", "nothing was fetched")
    return _stacked(images)


def _stacked(images: list[Any]) -> bytes:
    across = np.array(images[0].ImageOrientationPatient[:3], float)
    down = np.array(images[0].ImageOrientationPatient[3:], float)
    normal = np.cross(across, down)
    images.sort(key=lambda ds: float(np.dot(np.array(ds.ImagePositionPatient, float), normal)))
    places = [np.array(ds.ImagePositionPatient, float) for ds in images]
    rows_mm, columns_mm = (float(mm) for mm in images[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * columns_mm, down * rows_mm
    affine[:3, 2], affine[:3, 3] = (places[-1] - places[0]) / (len(places) - 1), places[0]
    planes = [ds.pixel_array.T * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in images]
    values = np.stack(planes, axis=2).astype(np.int16)
    return _saved(values, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, "")


def main() -> None:
    """Until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--generation", choices=("3.x", "4.1"), default="4.1")
    arguments = parser.parse_args()
    with AiaaServer(port=arguments.port, generation=arguments.generation) as server:
        sys.stdout.write(f"AIAA test server at {server.url}\n")
        sys.stdout.flush()
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
