"""A MONAI Label server for tests: the REST contract as its clients meet it, with a threshold for a model.

Written from the contract alone (GET /info/, POST /infer/{model}, PUT / GET / DELETE /session/), not from the adapter.
By hand: `python -m tests.engines.servers.monai_label --port 8000`; `PUT /_misbehave?next=WORD` makes it do wrong once:
drop, unavailable, error, slow, partial, expired (forgets every session), other-grid, nowhere, mirrored, probabilities,
turned, nrrd, nothing, unfit (422).
"""

import argparse
import json
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
from urllib.parse import parse_qs, urlsplit

import nibabel
import numpy as np

LABELS = {"spleen": 1, "aorta": 2, "lesion_xy": 3}  # the last: nobody has a code for it, and it is never found
NIFTI: Any = nibabel.Nifti1Image
SOFT, BRIGHT = 40, 200  # spleen from here, aorta from there
MODELS: Mapping[str, Any] = {
    "threshold": {"type": "segmentation", "labels": LABELS, "dimension": 3, "description": "thresholds", "config": {}},
    "deepgrow_2d": {"type": "deepgrow", "labels": [], "dimension": 2, "description": "clicks", "config": {}},
}
INFO = {"name": "MONAILabel - Tests", "description": "", "version": "0.8.5", "labels": LABELS, "models": MODELS}


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


class Refused(Exception):
    """The request is answered with this status and text."""

    def __init__(self, status: int, body: bytes, content_type: str) -> None:
        super().__init__(status)
        self.status, self.body, self.content_type = status, body, content_type


def detail(status: int, text: str) -> Refused:
    """As FastAPI tells what it noticed."""
    return Refused(status, json.dumps({"detail": text}).encode(), "application/json")


def broken() -> Refused:
    """As it answers whatever it did not foresee: no cause."""
    return Refused(500, b"Internal Server Error", "text/plain; charset=utf-8")


@dataclass
class MonaiLabelServer:
    """Listens on 127.0.0.1; `requests` has all of them in order, `sessions` the files put."""

    port: int = 0
    token: str = ""
    requests: list[Request] = field(default_factory=list)
    sessions: dict[str, bytes] = field(default_factory=dict)
    slow_s: float = 2.0

    def __post_init__(self) -> None:
        """Bind; `__enter__` answers."""
        self._next: list[str] = []
        self._guard = threading.Lock()
        self.working = threading.Lock()
        self.stopping = threading.Event()
        handler = type("Bound", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "MonaiLabelServer":
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
        """Method and path of each request."""
        return [f"{request.method} {request.path}" for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: MonaiLabelServer

    def do_GET(self) -> None:
        """And every other method."""
        try:
            request = self._read()
            self.owner.requests.append(request)
            if request.path == "/_misbehave":
                self.owner.misbehave(request.query["next"])
                return self._json({})
            with self.owner.working:  # an inference runs where requests are taken: nobody is answered meanwhile
                self._answer(request)
        except Refused as refused:
            self._send(refused.status, refused.body, refused.content_type)

    do_POST = do_PUT = do_DELETE = do_GET

    def _read(self) -> Request:
        if self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise detail(400, "chunked bodies are not read")  # the parser takes chunk headers for content
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        url = urlsplit(self.path)
        content_type = self.headers.get("Content-Type", "")
        return Request(
            method=self.command,
            path=url.path,
            query={key: values[-1] for key, values in parse_qs(url.query).items()},
            headers={key.lower(): value for key, value in self.headers.items()},
            body=body,
            parts=_parts(body, content_type) if content_type.startswith("multipart/form-data") else (),
        )

    def _answer(self, request: Request) -> None:
        if (
            self.owner.token
            and request.headers.get("authorization", "").lower() != f"bearer {self.owner.token}".lower()
        ):
            raise detail(401, "Could not validate credentials")
        if request.path == "/info/" and request.method == "GET":
            return self._json(INFO)
        if request.path == "/session/" and request.method == "PUT":
            return self._put_session(request)
        if request.path.startswith("/session/"):
            return self._session(request, request.path.removeprefix("/session/"))
        if request.path.startswith("/infer/") and request.method == "POST":
            return self._infer(request, request.path.removeprefix("/infer/"))
        raise detail(404, "Not Found")

    # --- sessions

    def _put_session(self, request: Request) -> None:
        files = [part for part in request.parts if part.name == "files"]
        if not files:
            raise detail(422, "field required: files")
        expiry = min(int(request.query.get("expiry", "0")) or 3600, 3600)
        session = str(uuid.uuid4())
        self.owner.sessions[session] = files[0].body
        self._json({"session_id": session, "session_info": {"id": session, "expiry": expiry}})

    def _session(self, request: Request, session: str) -> None:
        if session not in self.owner.sessions:
            raise detail(404, f"Session ({session}) Not Found")
        if request.method == "DELETE":
            del self.owner.sessions[session]
        self._json({"id": session})

    # --- inference

    def _infer(self, request: Request, model: str) -> None:
        word = self.owner.next_word()
        if word == "drop":
            self.close_connection = True
            return
        if word == "expired":
            self.owner.sessions.clear()
        if word == "unavailable":
            raise Refused(503, b"", "text/html")
        if word == "unfit":
            raise detail(422, "this image is not for this model")
        if word == "slow":
            self.owner.stopping.wait(self.owner.slow_s)
        file = self._input(request)
        params = json.loads(next((part.body for part in request.parts if part.name == "params"), b"{}"))
        if word == "error" or model not in MODELS or file is None or not isinstance(params, dict):
            raise broken()
        painted = self._painted(file, word, params.get("result_extension", ".nii.gz"))
        if request.query.get("output") != "image":
            raise broken()  # nothing else is asked of this one
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Disposition", 'attachment; filename="../../tmp1234.nii.gz"')  # not to be followed
        self.send_header("Content-Length", str(len(painted)))
        self.end_headers()
        self.wfile.write(painted[: len(painted) // 2] if word == "partial" else painted)
        self.close_connection = self.close_connection or word == "partial"

    def _input(self, request: Request) -> bytes | None:
        if "session_id" in request.query:
            return self.owner.sessions.get(request.query["session_id"])
        files = [part for part in request.parts if part.name == "file" and part.filename.endswith(".nii.gz")]
        return files[0].body if files else None

    def _painted(self, file: bytes, word: str, extension: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "in.nii.gz"), Path(folder, "out.nii.gz")
            source.write_bytes(file)
            image: Any = nibabel.load(source)
            values, affine = np.asarray(image.dataobj), image.affine
            if word == "nothing":
                values = np.full_like(values, SOFT - 1)
            if word == "nrrd" or extension == ".nrrd":
                return _nrrd(_thresholded(values), affine)
            nibabel.save(_misplaced(_thresholded(values), affine, word), target)
            return target.read_bytes()

    # --- sending

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


def _thresholded(values: Any) -> Any:
    labels = np.zeros(values.shape, np.uint8)
    labels[values >= SOFT] = LABELS["spleen"]
    labels[values >= BRIGHT] = LABELS["aorta"]
    return labels


def _misplaced(labels: Any, affine: Any, word: str) -> Any:
    """A NIfTI image, right unless told otherwise."""
    if word == "probabilities":
        return NIFTI(labels.astype(np.float32) / 3, affine)
    if word == "nowhere":
        return NIFTI(labels, np.eye(4))
    if word == "mirrored":
        return NIFTI(labels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    image = NIFTI(labels, affine)
    if word == "turned":
        turned: Any = nibabel.as_closest_canonical(image)  # type: ignore[no-untyped-call]
        return turned
    if word == "other-grid":  # every other column, row; the place of what is left stays right
        return NIFTI(labels[::2, ::2], affine @ np.diag([2.0, 2.0, 1.0, 1.0]))
    return image


def _nrrd(labels: Any, affine: Any) -> bytes:
    sizes = " ".join(map(str, labels.shape))
    vectors = " ".join("(" + ",".join(repr(float(x)) for x in affine[:3, a]) + ")" for a in range(3))
    header = (
        f"NRRD0004\ntype: uint8\ndimension: 3\nspace: right-anterior-superior\nsizes: {sizes}\n"
        f"space directions: {vectors}\nkinds: domain domain domain\nencoding: raw\n"
        f"space origin: ({','.join(repr(float(x)) for x in affine[:3, 3])})\n\n"
    )
    voxels: bytes = labels.tobytes(order="F")
    return header.encode() + voxels


def main() -> None:
    """Until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", default="")
    arguments = parser.parse_args()
    with MonaiLabelServer(port=arguments.port, token=arguments.token) as server:
        sys.stdout.write(f"MONAI Label test server at {server.url}\n")
        sys.stdout.flush()
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
