"""An Engine API for tests: token server, jobs, presigned storage, polling and webhook, as the vendor's pages have them.

Written from the pages (quick start, authentication, input and output files, error handling), not from the adapter. Its
"segmentation" is a box in the middle of the images it was sent, and a mask of the bright voxels. By hand:
`python -m tests.engines.servers.relu --port 8700`; `POST /_misbehave?what=WORD[&times=N]` makes it do wrong:

    submit: drop-submit, crash-submit, busy-submit, garbage-submit, no-urls, refuse-submit
    upload: expired-upload, busy-upload           notify: drop-notify, notify-by-post, told-before
    poll: busy-poll, crash-poll, unknown-job, pages (the other spelling), commas, garbage-poll, no-success
    results: unsuccessful, missing, failed, all-missing, all-failed, silent, ras, nowhere, truncated, wrong-size,
             draco, other-grid, nowhere-grid, expired-result, twice
    any: refuse-token (all tokens given until now are void), token-refused, token-crash
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import sys
import tempfile
import threading
import urllib.request
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import nibabel
import numpy as np
import pydicom

NIFTI: Any = nibabel.Nifti1Image
VERSION = "24.06"
AUDIENCE, CLIENT, SECRET = "virtualpatientengine.com", "clinic-7", "s3cret"
BRIGHT = 200
FACES = [(0, 2, 1), (0, 3, 2), (4, 5, 6), (4, 6, 7), (0, 1, 5), (0, 5, 4)]
FACES += [(1, 2, 6), (1, 6, 5), (2, 3, 7), (2, 7, 6), (3, 0, 4), (3, 4, 7)]


@dataclass
class Job:
    """One job there. `extension` of the images, `body` as it was asked for."""

    id: str
    body: Mapping[str, Any]
    extension: str
    data: bytes = b""
    started: int = 0
    notified: int = 0


@dataclass(frozen=True)
class Asked:
    """One request as it came, without its body."""

    method: str
    path: str
    headers: Mapping[str, str]
    length: int


class Volume:
    """The images of a job: values (slice, row, column) and their affine in LPS."""

    def __init__(self, data: bytes, extension: str) -> None:
        if extension == ".zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                self.names = archive.namelist()
                found = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in self.names]
        else:
            self.names, found = ["one.dcm"], [pydicom.dcmread(io.BytesIO(data))]
        self.headers = found
        first = found[0]
        row, column = np.array(first.ImageOrientationPatient[:3]), np.array(first.ImageOrientationPatient[3:])
        normal = np.cross(row, column)
        found = sorted(found, key=lambda ds: float(np.dot(normal, ds.ImagePositionPatient)))
        start, end = (np.array(ds.ImagePositionPatient, float) for ds in (found[0], found[-1]))
        self.affine = np.eye(4)
        self.affine[:3, 0] = (end - start) / max(len(found) - 1, 1)
        self.affine[:3, 1] = column * float(first.PixelSpacing[0])
        self.affine[:3, 2] = row * float(first.PixelSpacing[1])
        self.affine[:3, 3] = start
        self.values = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in found])

    def box(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Eight corners in LPS: the middle of the volume, a quarter of it from each side."""
        k, r, c = (np.array((0.25, 0.75)) * (count - 1) for count in self.values.shape)
        corners = [(k[z], r[y], c[x], 1.0) for z in (0, 1) for y, x in ((0, 0), (0, 1), (1, 1), (1, 0))]
        return np.asarray((self.affine @ np.array(corners).T).T[:, :3])


def mesh_file(corners: np.ndarray[Any, np.dtype[np.float64]], extension: str) -> bytes:
    """The box as a surface that faces outwards: binary STL, ASCII PLY or OBJ."""
    if extension == ".stl":
        facets = b"".join(struct.pack("<12fH", 0, 0, 0, *corners[list(face)].reshape(-1).tolist(), 0) for face in FACES)
        return b"solid but binary".ljust(80, b"\0") + struct.pack("<I", len(FACES)) + facets
    if extension == ".ply":
        head = "ply\nformat ascii 1.0\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
        head += "element face 12\nproperty list uchar int vertex_indices\nend_header\n"
        lines = [" ".join(map(repr, map(float, corner))) for corner in corners]
        return (head + "\n".join([*lines, *(f"3 {a} {b} {c}" for a, b, c in FACES)]) + "\n").encode()
    lines = ["v " + " ".join(map(repr, map(float, corner))) for corner in corners]
    return "\n".join([*lines, *(f"f {a + 1} {b + 1} {c + 1}" for a, b, c in FACES), ""]).encode()


class EngineApi:
    """The engine: API and token server on one port, presigned storage on another."""

    def __init__(self, port: int = 0, *, generic: bool = False, polls: int = 1, hosts: str = "127.0.0.1") -> None:
        """`generic`: a version 2, with /generic-job. `polls`: how often a started job is asked about in vain."""
        self.generic, self.polls = generic, polls
        self.jobs: dict[str, Job] = {}
        self.asked: list[Asked] = []
        self.stored: list[Asked] = []
        self.tokens: set[str] = set()
        self.token_requests: list[Mapping[str, Any]] = []
        self.life_s = 86400
        self.forgets_uploads = False  # the end of an upload that was told is unknown from then on
        self.answers_after_s = 0.0  # a new job
        self.webhooks: list[int] = []
        self.served: dict[str, bytes] = {}
        self.stopping = threading.Event()
        self._wrong: list[str] = []
        self._guard = threading.Lock()
        self._waited: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        self._api = self._server(hosts, port, ApiHandler)
        self._store = self._server(hosts, 0, StoreHandler)
        self.host = hosts

    def _server(self, host: str, port: int, kind: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer((host, port), type("Bound", (kind,), {"owner": self}))
        server.daemon_threads = True
        return server

    @property
    def root(self) -> str:
        """Of the API, without its version."""
        return f"http://{self.host}:{self._api.server_address[1]}"

    @property
    def url(self) -> str:
        """The base URL a client is given."""
        return f"{self.root}/{VERSION}"

    @property
    def store_url(self) -> str:
        """Of the presigned storage."""
        return f"http://{self.host}:{self._store.server_address[1]}"

    def __enter__(self) -> EngineApi:
        for server in (self._api, self._store):
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in (self._api, self._store):
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join(timeout=10)

    def misbehave(self, what: str, times: int = 1) -> None:
        """Do it wrong that way, so many times."""
        with self._guard:
            self._wrong += [what] * times

    def wrong(self, *words: str) -> str:
        """The first of `words` that is due, used up; '' for none."""
        with self._guard:
            for word in words:
                if word in self._wrong:
                    self._wrong.remove(word)
                    return word
        return ""

    # --- counts

    @property
    def started(self) -> list[Job]:
        """Jobs that ever began to run, one entry for each beginning."""
        return [job for job in self.jobs.values() for _ in range(job.started)]

    # --- jobs

    def create(self, body: Mapping[str, Any]) -> tuple[Job, dict[str, Any]]:
        """POST /job. Raises ValueError for a body that is none."""
        images = body["inputFiles"]["cbct"]
        if images["extension"] not in (".dcm", ".zip") or not body["outputFiles"]:
            raise ValueError
        job = Job(str(uuid.uuid4()), body, images["extension"])
        self.jobs[job.id] = job
        answer: dict[str, Any] = {"jobId": job.id}
        if "downloadUrl" in images:
            fetch = threading.Thread(target=self._fetch, args=(job, images["downloadUrl"]), daemon=True)
            self._threads.append(fetch)
            fetch.start()
            return job, answer
        put, told = f"{self.store_url}/in/{job.id}?signature=abc", f"{self.url}/finish?jobId={job.id}&key=k"
        answer["presignedUploadUrl"] = {"cbct": {"presignedUploadUrl": put, "notifyFinishUploadUrl": told}}
        if self.wrong("pages"):
            answer["presignedUploadUrl"] = {"cbct": {"uploadUrl": put, "notifyUrl": told}}
        return job, answer

    def _fetch(self, job: Job, url: str) -> None:
        # what was withdrawn, also while it is fetched, cannot be had, and the job never runs
        with suppress(OSError, HTTPException):
            with urllib.request.urlopen(url, timeout=20) as answer:
                job.data = answer.read()
            self.start(job)

    def start(self, job: Job) -> None:
        """All images are there."""
        job.started += 1
        hook = job.body.get("finishWebhook")
        if hook:
            request = urllib.request.Request(hook, data=b'{"success": true}', method="POST")
            with urllib.request.urlopen(request, timeout=20) as answer:
                self.webhooks.append(answer.status)

    def result(self, job: Job) -> dict[str, Any] | None:
        """The body of a finished job, None while it runs."""
        if not job.started:
            return None
        self._waited[job.id] = self._waited.get(job.id, 0) + 1
        if self._waited[job.id] <= self.polls:
            return None
        wrong = self.wrong(*_RESULTS)
        ordered = job.body["outputFiles"]
        volume = Volume(job.data, job.extension)
        files: dict[str, list[dict[str, Any]]] = {}
        for key, orders in ordered.items():
            for number, order in enumerate(orders):
                files.setdefault(key, []).append(self._file(key, order, number, volume, wrong, job))
        if wrong == "twice":
            files["meshes"].append(dict(files["meshes"][0]))
        if wrong == "silent":
            files = {key: entries[1:] for key, entries in files.items()}
        return {"success": wrong not in ("unsuccessful",), "jobId": job.id, "outputFiles": files}

    def _file(
        self, key: str, order: Mapping[str, Any], number: int, volume: Volume, wrong: str, job: Job
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"extension": order["extension"], "structures": order["structures"]}
        if (wrong in ("missing", "failed") and number == 0) or wrong in ("all-missing", "all-failed"):
            return told | {"status": wrong.removeprefix("all-").capitalize()}
        data = self._mesh(order, number, volume, wrong) if key == "meshes" else _mask(order, volume, wrong)
        name = f"/out/{job.id}/{key}-{number}"
        self.served[name] = data[:-20] if wrong == "truncated" else data
        size = len(self.served[name]) + (7 if wrong == "wrong-size" else 0)
        return told | {"status": "Available", "size": size, "url": f"{self.store_url}{name}?signature=xyz"}

    def _mesh(self, order: Mapping[str, Any], number: int, volume: Volume, wrong: str) -> bytes:
        corners = volume.box() + number * np.array((0.2, 0.0, 0.0))
        if wrong == "ras":
            corners = corners * (-1, -1, 1)
            return mesh_file(corners, order["extension"])
        if wrong == "nowhere":
            corners = corners + 400
        if wrong == "draco":
            return b"DRACO\x02\x02" + bytes(64)
        return mesh_file(corners, order["extension"])


_RESULTS = (
    *("unsuccessful", "missing", "failed", "all-missing", "all-failed", "silent", "ras", "nowhere", "truncated"),
    *("wrong-size", "draco", "other-grid", "nowhere-grid", "twice"),
)


def _mask(order: Mapping[str, Any], volume: Volume, wrong: str) -> bytes:
    labels = (volume.values >= BRIGHT).astype(np.uint8)
    affine = np.diag((-1.0, -1.0, 1.0, 1.0)) @ volume.affine
    if wrong == "other-grid":
        labels, affine = labels[::2], affine @ np.diag((2.0, 1.0, 1.0, 1.0))
    if wrong == "nowhere-grid":
        affine[:3, 3] += 900
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mask{order['extension']}"
        nibabel.save(NIFTI(labels, affine), path)
        return path.read_bytes()


class Handler(BaseHTTPRequestHandler):
    """What both have in common."""

    protocol_version = "HTTP/1.1"
    owner: EngineApi

    def body(self) -> bytes:
        """Of the request; chunked ones are not taken, as S3 does not."""
        if self.headers.get("transfer-encoding"):
            return b""
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def send(self, status: int, body: bytes = b"", headers: Iterable[tuple[str, str]] = ()) -> None:
        """Answer."""
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def drop(self) -> None:
        """The answer is lost."""
        self.close_connection = True

    def asked(self, length: int) -> Asked:
        """This request."""
        headers = {key.lower(): value for key, value in self.headers.items()}
        return Asked(self.command, self.path, headers, length)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class StoreHandler(Handler):
    """Presigned URLs: no authentication but the signature, and refused with any, as S3 does."""

    def do_PUT(self) -> None:
        """Images of a job."""
        body = self.body()
        self.owner.stored.append(self.asked(len(body)))
        parts = urlsplit(self.path)
        job = self.owner.jobs.get(parts.path.removeprefix("/in/"))
        wrong = self.owner.wrong("expired-upload", "busy-upload")
        if wrong == "busy-upload":
            self.send(503)
        elif wrong or job is None or parts.query != "signature=abc":
            self.send(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        elif self.headers.get("authorization"):
            self.send(400, b"<Error>Only one auth mechanism allowed</Error>")
        else:
            job.data = body
            self.send(200)

    def do_GET(self) -> None:
        """A result."""
        self.owner.stored.append(self.asked(0))
        parts = urlsplit(self.path)
        data = self.owner.served.get(parts.path)
        if self.owner.wrong("expired-result") or data is None or parts.query != "signature=xyz":
            self.send(403)
        elif self.headers.get("authorization"):
            self.send(400)
        else:
            self.send(200, data)


class ApiHandler(Handler):
    """Tokens, jobs, notifications, polls."""

    def do_POST(self) -> None:
        """Token, job, notification in the other spelling, or an order to misbehave."""
        body = self.body()
        parts = urlsplit(self.path)
        if parts.path == "/_misbehave":
            order = parse_qs(parts.query)
            self.owner.misbehave(order["what"][0], int(order.get("times", ["1"])[0]))
            self.send(204)
            return
        self.owner.asked.append(self.asked(len(body)))
        if parts.path == "/oauth/token":
            self._token(body)
        elif not self._authorized():
            return
        elif parts.path == f"/{VERSION}/" + ("generic-job" if self.owner.generic else "job"):
            self._job(body)
        elif parts.path == f"/{VERSION}/finish":
            self._finish(parts.query)
        else:
            self.send(404)

    def do_PUT(self) -> None:
        """The end of an upload."""
        body = self.body()
        self.owner.asked.append(self.asked(len(body)))
        parts = urlsplit(self.path)
        if not self._authorized():
            return
        if parts.path != f"/{VERSION}/finish" or self.owner.wrong("notify-by-post"):
            self.send(404)
        else:
            self._finish(parts.query)

    def do_GET(self) -> None:
        """Whether a job is done."""
        self.owner.asked.append(self.asked(0))
        parts = urlsplit(self.path)
        if not self._authorized():
            return
        if parts.path != f"/{VERSION}/pollJobResults":
            self.send(404)
            return
        wrong = self.owner.wrong("busy-poll", "crash-poll", "unknown-job", "garbage-poll")
        job = self.owner.jobs.get(parse_qs(parts.query).get("jobId", [""])[0])
        if wrong in ("busy-poll", "crash-poll"):
            self.send(503 if wrong == "busy-poll" else 500, headers=[("Retry-After", "0")])
        elif job is None or wrong == "unknown-job":
            self.send(404)
        elif wrong == "garbage-poll":
            self.send(200, b"<html>hello</html>")
        else:
            told = self.owner.result(job)
            if told is None:
                self.send(202, b'{"message": "PROCESSING"}')
                return
            if self.owner.wrong("no-success"):
                del told["success"]
            self.send(200, self._spelled(told))

    def _spelled(self, told: dict[str, Any]) -> bytes:
        if self.owner.wrong("pages"):
            for entries in told["outputFiles"].values():
                for entry in entries:
                    if entry["status"] == "Available":
                        entry |= {"status": "Success", "downloadUrl": entry.pop("url")}
        text = json.dumps(told)
        return (text.replace("]", ",]").replace("}", ",}") if self.owner.wrong("commas") else text).encode()

    def _authorized(self) -> bool:
        if self.owner.wrong("refuse-token"):
            self.owner.tokens.clear()
        if self.headers.get("authorization", "").removeprefix("Bearer ") in self.owner.tokens:
            return True
        self.send(401, b'{"message": "Unauthorized"}')
        return False

    def _token(self, body: bytes) -> None:
        wrong = self.owner.wrong("token-refused", "token-crash")
        kind = self.headers.get("content-type", "")
        asked = (
            json.loads(body) if "json" in kind else {key: value[0] for key, value in parse_qs(body.decode()).items()}
        )
        self.owner.token_requests.append(asked)
        if wrong == "token-crash":
            self.send(500)
            return
        known = (asked.get("client_id"), asked.get("client_secret"), asked.get("audience")) == (
            CLIENT,
            SECRET,
            AUDIENCE,
        )
        if wrong or not known or asked.get("grant_type") != "client_credentials":
            self.send(401, b'{"error": "access_denied", "error_description": "Unauthorized"}')
            return
        token = uuid.uuid4().hex
        self.owner.tokens.add(token)
        told = {"access_token": token, "token_type": "Bearer", "expires_in": self.owner.life_s}
        self.send(200, json.dumps(told).encode(), [("Content-Type", "application/json")])

    def _job(self, body: bytes) -> None:
        wrong = self.owner.wrong(
            "drop-submit", "crash-submit", "busy-submit", "garbage-submit", "no-urls", "refuse-submit"
        )
        if wrong in ("crash-submit", "busy-submit", "refuse-submit"):
            self.send({"crash-submit": 500, "busy-submit": 503, "refuse-submit": 400}[wrong])
            return
        try:
            _, told = self.owner.create(json.loads(body))
        except (ValueError, KeyError, TypeError):
            self.send(400, b'{"message": "bad job"}')
            return
        self.owner.stopping.wait(self.owner.answers_after_s)
        if wrong == "drop-submit":
            self.drop()
        elif wrong == "garbage-submit":
            self.send(200, b"<html>ok</html>")
        elif wrong == "no-urls":
            self.send(200, json.dumps({"jobId": told["jobId"]}).encode())
        else:
            self.send(200, json.dumps(told).replace("}}", ",}}").encode())  # with the commas of the page

    def _finish(self, query: str) -> None:
        job = self.owner.jobs.get(parse_qs(query).get("jobId", [""])[0])
        wrong = self.owner.wrong("drop-notify", "told-before")
        if job is None or not job.data:
            self.send(400)
            return
        job.notified += 1
        if job.started or wrong == "told-before":
            self.send(404 if self.owner.forgets_uploads else 409)
            return
        self.owner.start(job)
        if wrong == "drop-notify":
            self.drop()
        else:
            self.send(200)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--generic", action="store_true", help="a version 2: /generic-job")
    arguments = parser.parse_args()
    with EngineApi(arguments.port, generic=arguments.generic, polls=3) as server:
        sys.stdout.write(f"{server.url} {server.root}/oauth/token {CLIENT} {SECRET} {AUDIENCE}\n")
        sys.stdout.flush()
        try:
            server.stopping.wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
