"""An Aignostics Platform (API v1) for tests: its reference acted out, with outputs somebody made up for a network.

Written from the platform's published reference alone, not from the adapter. It fetches the slide under the URL it is
given and checks size and CRC32C as a real one must. Outputs lie on a store of its own (another port), behind URLs that
are good once. By hand: `python -m tests.engines.servers.aignostics --port 8600` prints its URL, the store's URL and a
token. `POST /_misbehave {"what": WORD, "times": N}` makes it do wrong at the next fitting request:

* a submission: drop (a run is made, no answer), drop-before (no run, no answer), busy (503), crash (a run is made,
  500), quota (402), invalid (422), slow;
* asking after a run: stranger (another run's id), sick (500), garbage (no JSON), mute (silence);
* the list of runs: unsearchable (the filter is not honoured); custom metadata: stale (412); anything: unauthorized;
* a file: expired (the store says 403), expired-400, checksum, partial, deleted (410).
"""

import argparse
import base64
import io
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c
import numpy as np
from PIL import Image

TOKEN = "a-token-of-the-hospital"
WHEN = "2026-03-01T12:00:00Z"
COLOURS = {"Tumor": [255, 0, 0], "Stroma": [0, 255, 0], "Necrosis": [0, 0, 255]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "$defs": {
        "Specimen": {
            "type": "object",
            "required": ["disease", "tissue"],
            "properties": {
                "disease": {"type": "string", "enum": ["LUNG_CANCER", "BREAST_CANCER"]},
                "tissue": {"type": "string", "enum": ["LUNG", "BREAST", "LIVER"]},
            },
            "additionalProperties": False,
        }
    },
    "required": [
        *("specimen", "staining_method", "width_px", "height_px", "resolution_mpp", "media-type"),
        "checksum_base64_crc32c",
    ],
    "properties": {
        "specimen": {"$ref": "#/$defs/Specimen"},
        "staining_method": {"type": "string", "enum": ["H&E"]},
        "width_px": {"type": "integer", "minimum": 1, "maximum": 150000},
        "height_px": {"type": "integer", "minimum": 1, "maximum": 150000},
        "resolution_mpp": {"type": "number", "minimum": 0.125, "maximum": 0.5},
        "media-type": {"type": "string", "enum": ["image/tiff", "application/dicom", "application/zip"]},
        "checksum_base64_crc32c": {"type": "string"},
    },
    "additionalProperties": False,
}


def crc(data: bytes) -> str:
    """Base64 of the big-endian CRC32C."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def tiff(width: int, height: int) -> bytes:
    """A class map in colours: the left half tumor, below it stroma, the rest background."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = COLOURS["Tumor"]
    pixels[height // 2 :, : width // 2] = COLOURS["Stroma"]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF", compression="tiff_deflate")
    return out.getvalue()


def feature(name: str, rings: list[Any], kind: str = "Polygon") -> dict[str, Any]:
    """As QuPath writes it."""
    geometry = {"type": kind, "coordinates": rings}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


@dataclass
class Run:
    """A run with its one slide; `polls` counts how often it was asked after."""

    request: dict[str, Any]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: str = "PENDING"
    reason: str | None = None
    item_reason: str | None = None
    item_output: str = "NONE"
    error_code: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    written: int = 0
    slide: bytes = b""
    polls: int = 0
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def checksum(self) -> str:
        """Of the custom metadata: opaque."""
        return f"{self.written:08x}"


@dataclass
class Aignostics:
    """The platform and its store. A run ends when it was asked after `polls` times; `version` is what it describes."""

    port: int = 0
    polls: int = 1
    runs: dict[str, Run] = field(default_factory=dict)
    seen: list[tuple[str, str, Mapping[str, str], Any]] = field(default_factory=list)
    stored: list[tuple[str, Mapping[str, str]]] = field(default_factory=list)
    schema: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(SCHEMA)))
    inputs: tuple[str, ...] = ("input_slide",)
    ending: str = ""  # of the next runs: "", user-error, system-error, cancelled, cancelled-partial
    outputs: Callable[["Aignostics", Run], list[tuple[str, str, bytes, dict[str, Any]]]] | None = None

    def __post_init__(self) -> None:
        self._wrong: list[str] = []
        self._links: dict[str, tuple[bytes, str]] = {}
        self._guard = threading.Lock()
        self.stopping = threading.Event()
        self._servers = []
        for handler, port in ((Handler, self.port), (StoreHandler, 0)):
            server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (handler,), {"owner": self}))
            server.daemon_threads = True
            self._servers.append(server)
        self.port, self.store_port = (int(server.server_address[1]) for server in self._servers)

    @property
    def url(self) -> str:
        """Its root."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Aignostics":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def misbehave(self, what: str, times: int = 1) -> None:
        """Do it wrong that way, so many times."""
        with self._guard:
            self._wrong += [what] * times

    def wrong(self, *words: str) -> str:
        """Which of these ways comes next, '' for none."""
        with self._guard:
            if self._wrong and self._wrong[0] in words:
                return self._wrong.pop(0)
            return ""

    def asked(self, method: str, path: str) -> int:
        """How often."""
        return sum(1 for one, target, _, _ in self.seen if one == method and re.fullmatch(path, urlsplit(target).path))

    # --- runs

    def invalid(self, request: Any) -> list[dict[str, Any]]:
        """What is wrong with a RunCreationRequest, as a 422 lists it."""
        found = []
        for place in ("application_id", "items"):
            if not request.get(place):
                found.append({"loc": ["body", place], "msg": "Field required", "type": "missing"})
        for number, item in enumerate(request.get("items") or ()):
            for given in item["input_artifacts"]:
                where = ["body", "items", number, "input_artifacts", 0, "metadata"]
                for key in sorted(set(self.schema.get("required", ())) - set(given["metadata"])):
                    found.append({"loc": [*where, key], "msg": "Field required", "type": "missing"})
                for key in sorted(set(given["metadata"]) - set(self.schema["properties"])):
                    found.append({"loc": [*where, key], "msg": "Extra inputs", "type": "extra_forbidden"})
        return found

    def create(self, request: dict[str, Any]) -> Run:
        """A new run."""
        run = Run(request=request, metadata=dict(request.get("custom_metadata") or {}))
        with self._guard:
            self.runs[run.id] = run
        return run

    def work(self, run: Run) -> None:
        """One more poll: it goes on, and at last it fetches the slide and ends."""
        run.polls += 1
        if run.state == "TERMINATED":
            return
        run.state = "PROCESSING" if run.polls <= self.polls else "TERMINATED"
        if run.state != "TERMINATED":
            return
        run.reason, run.item_reason, run.item_output = "ALL_ITEMS_PROCESSED", "SUCCEEDED", "FULL"
        if not self._slide_is_good(run):
            run.item_reason, run.item_output, run.error_code = "USER_ERROR", "NONE", "INPUT.CHECKSUM_MISMATCH"
        elif self.ending == "user-error":
            run.item_reason, run.item_output, run.error_code = "USER_ERROR", "NONE", "INPUT.BAD_SLIDE"
        elif self.ending == "system-error":
            run.item_reason, run.item_output, run.error_code = "SYSTEM_ERROR", "NONE", "MODEL.CRASHED"
        elif self.ending.startswith("cancelled"):
            run.reason, run.item_reason = "CANCELED_BY_SYSTEM", "SKIPPED"
            run.item_output, run.error_code = "NONE", "SCHEDULER.ITEMS_WITH_ERROR_THRESHOLD_REACHED"
        if run.item_output == "FULL" or self.ending == "cancelled-partial":
            self._make(run)

    def _slide_is_good(self, run: Run) -> bool:
        (given,) = run.request["items"][0]["input_artifacts"]
        try:
            with urllib.request.urlopen(given["download_url"], timeout=10) as answer:
                run.slide = answer.read()
        except (urllib.error.URLError, OSError):
            return False
        told = next((value for key, value in given["metadata"].items() if "crc32c" in key), "")
        return bool(told == crc(run.slide))

    def size(self, run: Run) -> tuple[int, int]:
        """Width and height, whatever they are called."""
        told = run.request["items"][0]["input_artifacts"][0]["metadata"]
        return tuple(next(v for k, v in told.items() if k.startswith(side)) for side in ("width", "height"))

    def _make(self, run: Run) -> None:
        made = (self.outputs or default_outputs)(self, run)
        for number, (name, kind, data, more) in enumerate(made):
            last = number == len(made) - 1 and self.ending == "cancelled-partial"
            artifact = {
                "output_artifact_id": str(uuid.uuid4()),
                "name": name,
                "metadata": {"media_type": kind, "checksum_base64_crc32c": crc(data), **more},
                "state": "TERMINATED",
                "termination_reason": "SYSTEM_ERROR" if last else "SUCCEEDED",
                "output": "NONE" if last else "AVAILABLE",
                "error_code": None,
                "error_message": None,
            }
            run.artifacts.append(artifact)
            run.files[artifact["output_artifact_id"]] = data

    def link(self, data: bytes, wrong: str) -> str:
        """A URL on the store, good once."""
        key = uuid.uuid4().hex
        with self._guard:
            self._links[key] = (data, wrong)
        return f"http://127.0.0.1:{self.store_port}/bucket/{key}?X-Signature=secret-{key}"

    def linked(self, key: str) -> tuple[bytes, str] | None:
        """What lies there, the first time."""
        with self._guard:
            return self._links.pop(key, None)


def default_outputs(owner: Aignostics, run: Run) -> list[tuple[str, str, bytes, dict[str, Any]]]:
    """Shapes with a hole and one beyond the slide, a class map of half the size, readouts, a table of cells."""
    width, height = owner.size(run)
    square = [[1, 1], [11, 1], [11, 11], [1, 11], [1, 1]]
    hole = [[3, 3], [3, 5], [5, 5], [5, 3], [3, 3]]
    far = [[width + 50, 1], [width + 60, 1], [width + 60, 9], [width + 50, 1]]
    shapes = {
        "type": "FeatureCollection",
        "features": [
            feature("Tumor", [square, hole]),
            feature("Tumor", [far]),
            feature("Stroma", [[[[20, 20], [30, 20], [25, 30], [20, 20]]]], "MultiPolygon"),
        ],
    }
    table = b"Absolute area TUMOR [mm\xc2\xb2],Relative area TUMOR [%],Cells\n1.25,40.5,1234\n"
    return [
        ("tissue_segmentation:geojson_polygons", "application/geo+json", json.dumps(shapes).encode(), {}),
        ("tissue_qc:tiff_heatmap", "image/tiff", tiff(width // 2, height // 2), {"class_colors": COLOURS}),
        ("readout_generation:slide_readouts", "text/csv", table, {}),
        ("cells:parquet", "application/vnd.apache.parquet", b"PAR1....PAR1", {}),
    ]


class _Base(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: Aignostics

    def reply(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class StoreHandler(_Base):
    """The bucket outputs lie in."""

    def do_GET(self) -> None:
        """A signed URL."""
        self.owner.stored.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        found = self.owner.linked(urlsplit(self.path).path.rpartition("/")[2])
        if found is None or found[1] == "expired":
            self.reply(403, b"<Error>Request has expired</Error>")
            return
        data, wrong = found
        if wrong == "expired-400":
            self.reply(400, b"<Error>ExpiredToken</Error>")
        elif wrong == "checksum":
            self.reply(200, data[:-1] + bytes([data[-1] ^ 1]))
        elif wrong == "partial":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + 100))
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = True
        else:
            self.reply(200, data)


class Handler(_Base):
    """The API, below /api/v1."""

    def do_GET(self) -> None:
        """Every read."""
        self._serve("GET")

    def do_POST(self) -> None:
        """Submit, cancel, and orders to misbehave."""
        self._serve("POST")

    def do_PUT(self) -> None:
        """Custom metadata."""
        self._serve("PUT")

    def do_DELETE(self) -> None:
        """Outputs."""
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(raw) if raw else None
        if self.path == "/_misbehave":
            self.owner.misbehave(body["what"], body.get("times", 1))
            self.reply(200, {})
            return
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.owner.seen.append((method, self.path, headers, body))
        if headers.get("authorization") != f"Bearer {TOKEN}" or self.owner.wrong("unauthorized"):
            self.reply(401, {"detail": "Not authenticated"})
            return
        parts = urlsplit(self.path)
        path = parts.path.removeprefix("/api/v1/") if parts.path.startswith("/api/v1/") else "?"
        words = [unquote(word) for word in path.split("/")]
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if words[0] == "applications" and method == "GET":
            self._applications(words[1:])
        elif words == ["runs"] and method == "POST":
            self._submit(body)
        elif words == ["runs"] and method == "GET":
            self._list(query)
        elif words[0] == "runs" and len(words) > 1:
            run = self.owner.runs.get(words[1])
            if run is None:
                self.reply(404, {"detail": "Run not found"})
            else:
                self._run(method, run, words[2:], body)
        else:
            self.reply(404, {"detail": "Not Found"})

    def _applications(self, words: list[str]) -> None:
        if not words:
            described = {"application_id": "he-tme", "name": "Atlas H&E-TME", "regulatory_classes": ["RUO"]}
            self.reply(200, [{**described, "description": "tumor microenvironment", "latest_version": None}])
        elif words[0] != "he-tme" or words[1:] not in (["versions", "1.0.0"], ["versions", "1.1.0"]):
            self.reply(404, {"detail": "Not Found"})
        else:
            outputs = [{"name": name, "mime_type": "x", "scope": "ITEM"} for name in ("tissue_qc:tiff_heatmap",)]
            inputs = [
                {"name": n, "mime_type": "image/tiff", "metadata_schema": self.owner.schema} for n in self.owner.inputs
            ]
            described = {"version_number": words[2], "changelog": "", "released_at": WHEN}
            self.reply(200, {**described, "input_artifacts": inputs, "output_artifacts": outputs})

    def _submit(self, body: Any) -> None:
        wrong = self.owner.wrong("drop", "drop-before", "busy", "crash", "quota", "invalid", "slow")
        problems = self.owner.invalid(body)
        if wrong == "drop-before":
            self.close_connection = True
        elif wrong == "busy":
            self.reply(503, {"detail": "busy"})
        elif wrong == "quota":
            self.reply(402, {"detail": "Quota exceeded"})
        elif wrong == "invalid":
            self.reply(422, {"detail": [{"loc": ["body", "items", 0], "msg": "Mr Doe", "type": "value_error"}]})
        elif problems:
            self.reply(422, {"detail": problems})
        else:
            run = self.owner.create(body)
            if wrong == "drop":
                self.close_connection = True
            elif wrong == "crash":
                self.reply(500, {"detail": "Internal Server Error"})
            elif wrong == "slow":
                self.owner.stopping.wait(20)
                self.close_connection = True
            else:
                self.reply(201, {"run_id": run.id})

    def _list(self, query: Mapping[str, str]) -> None:
        found = list(self.owner.runs.values())
        path = query.get("custom_metadata", "")
        condition = re.fullmatch(r'(?:\$\.)?(\w+)(?: \? \(@ == "([^"]*)"\))?', path)
        if path and condition is None:
            self.reply(422, {"detail": [{"loc": ["query", "custom_metadata"], "msg": "bad", "type": "value_error"}]})
            return
        if condition is not None and not self.owner.wrong("unsearchable"):
            key, value = condition.groups()
            found = [run for run in found if key in run.metadata and value in (None, run.metadata[key])]
        page, size = int(query.get("page", 1)), int(query.get("page_size", 50))
        if not 5 <= size <= 100 or page < 1:
            self.reply(422, {"detail": []})
            return
        self.reply(200, [self._described(run) for run in found[(page - 1) * size : page * size]])

    def _described(self, run: Run) -> dict[str, Any]:
        return {
            "run_id": run.id,
            "application_id": run.request["application_id"],
            "version_number": run.request.get("version_number"),
            "state": run.state,
            "output": "NONE" if not run.artifacts else "FULL" if run.item_output == "FULL" else "PARTIAL",
            "termination_reason": run.reason,
            "error_code": run.error_code if run.reason == "CANCELED_BY_SYSTEM" else None,
            "statistics": {"item_count": 1},
            "custom_metadata": run.metadata,
            "custom_metadata_checksum": run.checksum,
            "submitted_at": WHEN,
            "submitted_by": "auth0|123456",
            "terminated_at": WHEN if run.state == "TERMINATED" else None,
            "scheduling": run.request.get("scheduling"),
        }

    def _run(self, method: str, run: Run, words: list[str], body: Any) -> None:
        wrong = self.owner.wrong("sick", "garbage", "mute") if (method, words) == ("GET", []) else ""
        if wrong == "sick":
            self.reply(500, {"detail": "Internal Server Error"})
        elif wrong == "garbage":
            self.reply(200, b"<html>a proxy</html>")
        elif wrong == "mute":
            self.owner.stopping.wait(20)
            self.close_connection = True
        elif (method, words) == ("GET", []):
            self.owner.work(run)
            told = self._described(run)
            self.reply(200, told | ({"run_id": str(uuid.uuid4())} if self.owner.wrong("stranger") else {}))
        elif (method, words) == ("POST", ["cancel"]):
            if run.state == "TERMINATED":
                self.reply(409, {"detail": "already cancelled"})
            else:
                run.state, run.reason, run.item_reason = "TERMINATED", "CANCELED_BY_USER", "SKIPPED"
                self.reply(202, None)
        elif method == "GET" and words[:1] == ["items"]:
            item = self._item(run)
            if len(words) == 1:
                self.reply(200, [item])
            elif words[1] == item["external_id"]:
                self.reply(200, item)
            else:
                self.reply(404, {"detail": "Item not found"})
        elif method == "GET" and words[:1] == ["artifacts"] and words[2:] == ["file"]:
            self._file(run, words[1])
        elif (method, words) == ("DELETE", ["artifacts"]):
            if run.state != "TERMINATED":
                self.reply(404, {"detail": "Run is not in a final state"})
                return
            for artifact in run.artifacts:
                artifact |= {"output": "DELETED_BY_USER", "metadata": None}
            self.reply(200, None)
        elif (method, words) == ("PUT", ["custom-metadata"]):
            self._metadata(run, body)
        else:
            self.reply(404, {"detail": "Not Found"})

    def _item(self, run: Run) -> dict[str, Any]:
        return {
            "item_id": str(uuid.uuid5(uuid.NAMESPACE_OID, run.id)),
            "external_id": run.request["items"][0]["external_id"],
            "custom_metadata": {},
            "custom_metadata_checksum": "f54fe109",
            "state": run.state,
            "output": run.item_output,
            "termination_reason": run.item_reason,
            "error_code": run.error_code,
            "error_message": None,
            "terminated_at": None,
            "input_artifacts": [],
            "output_artifacts": run.artifacts,
        }

    def _file(self, run: Run, artifact_id: str) -> None:
        artifact = next((one for one in run.artifacts if one["output_artifact_id"] == artifact_id), None)
        if artifact is None:
            self.reply(404, {"detail": "Artifact not found"})
        elif artifact["output"] != "AVAILABLE" or self.owner.wrong("deleted"):
            self.reply(410, {"detail": "Gone"})
        else:
            wrong = self.owner.wrong("expired", "expired-400", "checksum", "partial")
            self.reply(307, b"", {"Location": self.owner.link(run.files[artifact_id], wrong)})

    def _metadata(self, run: Run, body: Any) -> None:
        if self.owner.wrong("stale"):
            run.metadata["other"] = "somebody was faster"
            run.written += 1
        if body.get("custom_metadata_checksum") not in (None, run.checksum):
            self.reply(412, {"detail": "Checksum mismatch"})
            return
        run.metadata = body["custom_metadata"]
        run.written += 1
        self.reply(200, {"custom_metadata_checksum": run.checksum})


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8600)
    parser.add_argument("--polls", type=int, default=3)
    arguments = parser.parse_args()
    with Aignostics(port=arguments.port, polls=arguments.polls) as server:
        sys.stdout.write(f"{server.url}\nhttp://127.0.0.1:{server.store_port}\n{TOKEN}\n")
        sys.stdout.flush()
        try:
            while not server.stopping.wait(3600):
                time.sleep(0)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
