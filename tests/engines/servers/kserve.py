"""A KServe v2 server for tests: the Open Inference Protocol with the binary tensor extension, and models of numbers.

Written from the protocol alone, not from the adapter. By hand: `python -m tests.engines.servers.kserve --port 8000`;
`PUT /_misbehave?next=WORD` makes the next inference go wrong: drop, unavailable, overloaded, error, refuse, slow,
partial, no-json, not-finite, other-shape, other-type, other-version, short, long, lying, huge, missing, echo,
taken-away (the model is then not ready). PUT /_misbehave?ready=0 makes server and models not ready.

Models: `levels` (FP32 [N,1,D,H,W] to 3 scores whose largest says how many of LEVELS a value exceeds), `levels-fp16`
and `levels-bf16` (the same in those types), `fixed` (the same for windows of 16 x 16 x 16, batches of 2), `zyx`
([D,H,W] INT16 to INT64 labels), `several` (2 probabilities that overlap), `chest` (FP32 [N,1,32,32] to [N,3] scores and
another output), `two-inputs`, `silent` (tells no shapes).
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

LEVELS = (40.0, 200.0)
TYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2", "INT16": "<i2", "INT64": "<i8", "UINT8": "<u1"}
Arrays = dict[str, Any]


def tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    """As metadata tells it."""
    return {"name": name, "datatype": datatype, "shape": list(shape)}


@dataclass(frozen=True)
class Model:
    """What it says of itself, and what it does: arrays by name to arrays by name."""

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    work: Callable[[Arrays], Arrays]
    told: bool = True


def levels(arrays: Arrays) -> Arrays:
    """Scores linear in the value: interpolating scores or values comes to the same."""
    v, (low, high) = arrays["image"].astype(np.float32), LEVELS
    return {"scores": np.concatenate([v * 0, v - low, 2 * v - low - high], axis=1)}


def labels(arrays: Arrays) -> Arrays:
    """INT64 labels of [D,H,W]."""
    v = arrays["image"].astype(np.float32)
    return {"labels": (v > LEVELS[0]).astype(np.int64) + (v > LEVELS[1])}


def several(arrays: Arrays) -> Arrays:
    """Two channels, both above a half where the value is above both levels."""
    v = arrays["image"].astype(np.float32)
    return {"scores": np.concatenate([(v > LEVELS[0]) * 0.6, (v > LEVELS[1]) * 0.9], axis=1).astype(np.float32)}


def chest(arrays: Arrays) -> Arrays:
    """Logits of the mean, the largest and the upper left value; and probabilities beside them."""
    v = arrays["picture"].reshape(len(arrays["picture"]), -1)
    scores = np.stack([v.mean(axis=1), v.max(axis=1), v[:, 0]], axis=1)
    return {"logits": scores.astype(np.float32), "other": (scores * 0 + 0.25).astype(np.float32)}


def volume(datatype: str, *, size: int = -1, batch: int = -1) -> Model:
    """`levels`, of that type and size."""
    sides = (size,) * 3
    return Model([tensor("image", datatype, batch, 1, *sides)], [tensor("scores", datatype, batch, 3, *sides)], levels)


MODELS: Mapping[str, Model] = {
    "levels": volume("FP32"),
    "levels-fp16": volume("FP16"),
    "levels-bf16": volume("BF16"),
    "fixed": volume("FP32", size=16, batch=2),
    "zyx": Model([tensor("image", "INT16", -1, -1, -1)], [tensor("labels", "INT64", -1, -1, -1)], labels),
    "several": Model(
        [tensor("image", "FP32", -1, 1, -1, -1, -1)], [tensor("scores", "FP32", -1, 2, -1, -1, -1)], several
    ),
    "chest": Model(
        [tensor("picture", "FP32", -1, 1, 32, 32)],
        [tensor("logits", "FP32", -1, 3), tensor("other", "FP32", -1, 3)],
        chest,
    ),
    "two-inputs": Model(
        [tensor("image", "FP32", -1, 1, -1, -1, -1), tensor("prompt", "BYTES", -1)],
        [tensor("scores", "FP32", -1, 3, -1, -1, -1)],
        levels,
    ),
    "silent": Model([], [], levels, told=False),
}


@dataclass(frozen=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Refused(Exception):
    """The request is answered with this status and {"error": text}."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class KServeServer:
    """Listens on 127.0.0.1; `requests` has all of them in order, `inputs` the arrays of each inference."""

    port: int = 0
    token: str = ""
    binary: bool = True
    version: str = "1"
    most_batch: int = 0  # 0: it does not tell
    requests: list[Request] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    ready: bool = True
    slow_s: float = 2.0

    def __post_init__(self) -> None:
        """Bind; `__enter__` answers."""
        self._next: list[str] = []
        self._guard = threading.Lock()
        self.stopping = threading.Event()
        handler = type("Bound", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "KServeServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def misbehave(self, *words: str) -> None:
        """The next inferences go wrong like this, one after the other; '' is well."""
        with self._guard:
            self._next += words

    def next_word(self) -> str:
        """How this one goes wrong; '' when it does not."""
        with self._guard:
            return self._next.pop(0) if self._next else ""

    def paths(self) -> list[str]:
        """Method and path of each request."""
        return [f"{request.method} {request.path}" for request in self.requests]

    @property
    def inferences(self) -> int:
        """How many were asked for."""
        return sum(path.endswith("/infer") for path in self.paths())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: KServeServer

    def do_GET(self) -> None:
        """And every other method."""
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, urlsplit(self.path).path, headers, body)
        self.owner.requests.append(request)
        try:
            self._answer(request)
        except Refused as refused:
            self._json({"error": str(refused)}, refused.status)

    do_POST = do_PUT = do_GET

    def _answer(self, request: Request) -> None:
        if request.path == "/_misbehave":
            query = parse_qs(urlsplit(self.path).query)
            self.owner.misbehave(*query.get("next", []))
            self.owner.ready = query.get("ready", ["1"])[-1] != "0"
            return self._json({})
        if self.owner.token and request.headers.get("authorization") != self.owner.token:
            raise Refused(401, "unauthorized")
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        if parts == ["v2"]:
            extensions = ["binary_tensor_data"] if self.owner.binary else []
            extensions += ["model_configuration"] if self.owner.most_batch else []
            return self._json({"name": "contract", "version": "2.0", "extensions": extensions})
        if parts == ["v2", "health", "ready"]:
            return self._send(200 if self.owner.ready else 400, b"", "text/plain")
        if parts[:2] == ["v2", "models"] and len(parts) > 2:
            return self._model(request, parts[2], parts[3:])
        raise Refused(404, "not found")

    def _model(self, request: Request, name: str, rest: list[str]) -> None:
        if rest[:1] == ["versions"]:
            version, rest = rest[1], rest[2:]
        else:
            version = self.owner.version
        model = MODELS.get(name)
        if model is None or version != self.owner.version:
            raise Refused(400 if rest == ["ready"] else 404, f"Request for unknown model: '{name}' is not found")
        if rest == ["ready"]:
            return self._send(200 if self.owner.ready else 400, b"", "text/plain")
        if not rest and request.method == "GET":
            told = {"inputs": model.inputs, "outputs": model.outputs} if model.told else {}
            return self._json({"name": name, "versions": [version], "platform": "numbers", **told})
        if rest == ["config"] and self.owner.most_batch:
            return self._json({"name": name, "max_batch_size": self.owner.most_batch})
        if rest == ["infer"] and request.method == "POST":
            return self._infer(request, name, model, version)
        raise Refused(404, "not found")

    # --- inference

    def _infer(self, request: Request, name: str, model: Model, version: str) -> None:
        word = self.owner.next_word()
        if word == "drop":
            self.close_connection = True
            return
        if word == "slow":
            self.owner.stopping.wait(self.owner.slow_s)
        if word == "taken-away":
            self.owner.ready = False
            raise Refused(400, f"Request for unknown model: '{name}' is not found")
        failures = {"unavailable": 503, "overloaded": 429, "error": 500, "refuse": 400}
        if word in failures:
            raise Refused(failures[word], "the model did not want to\nand says so")
        if word == "echo":
            raise Refused(400, f"cannot make sense of {request.headers.get('authorization')}")
        message, arrays = self._read(request)
        self.owner.inputs.append(arrays)
        if model.inputs and set(arrays) != {one["name"] for one in model.inputs}:
            raise Refused(400, "expected other inputs")
        for one in model.inputs:
            shape = arrays[one["name"]].shape
            if len(shape) != len(one["shape"]) or any(
                a not in (-1, b) for a, b in zip(one["shape"], shape, strict=True)
            ):
                raise Refused(400, f"unexpected shape for input '{one['name']}'")
        outputs = model.work(arrays)
        datatypes = {one["name"]: one["datatype"] for one in model.outputs}
        self._answer_with(message, name, version, outputs, datatypes, word)

    def _read(self, request: Request) -> tuple[Any, Arrays]:
        header = request.headers.get("inference-header-content-length")
        if header is not None and not self.owner.binary:
            raise Refused(400, "binary data is not read here")
        length = int(header) if header is not None else len(request.body)
        message, rest = json.loads(request.body[:length]), request.body[length:]
        arrays = {}
        for one in message["inputs"]:
            kind, shape = TYPES[one["datatype"]], one["shape"]
            size = one.get("parameters", {}).get("binary_data_size")
            if size is None:
                values = np.array(one["data"], kind)
            else:
                values, rest = np.frombuffer(rest[:size], kind), rest[size:]
            if one["datatype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            arrays[one["name"]] = values.reshape(shape)
        if rest:
            raise Refused(400, "unexpected additional input data")
        return message, arrays

    def _answer_with(
        self, message: Any, name: str, version: str, outputs: Arrays, datatypes: Mapping[str, str], word: str
    ) -> None:
        if word == "no-json":
            return self._send(200, b"<html>busy</html>", "text/html")
        told, pieces = [], []
        for wanted in message["outputs"]:
            values = np.ascontiguousarray(outputs[wanted["name"]])
            if word == "not-finite":
                values = values.astype(np.float32)
                values.flat[-1] = np.nan
            if word == "other-shape":
                values = values[..., :-1]
            datatype = datatypes.get(wanted["name"], "FP32")
            one = {"name": wanted["name"], "datatype": datatype, "shape": list(values.shape)}
            if word == "other-type":
                one["datatype"] = "BOOL"
            if word == "missing":
                one["name"] = "unheard-of"
            if word == "huge":
                one["shape"] = [2**31, 2**31, *values.shape[2:]]
            if self.owner.binary and wanted.get("parameters", {}).get("binary_data"):
                if datatype == "BF16":
                    values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
                pieces.append(values.astype(TYPES[datatype]).tobytes())
                one["parameters"] = {"binary_data_size": len(pieces[-1]) + (4 if word == "lying" else 0)}
            else:
                one["data"] = values.tolist()  # nested, which the protocol allows
            told.append(one)
        if word == "other-version":
            version += "-new"
        head = json.dumps({"model_name": name, "model_version": version, "outputs": told}).encode()
        body = head + b"".join(pieces)
        body = body[:-4] if word == "short" else body + b"1234" if word == "long" else body
        self._send(200, body, "application/octet-stream", len(head) if pieces else None, partial=word == "partial")

    # --- sending

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(
        self, status: int, body: bytes, content_type: str, header: int | None = None, *, partial: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if header is not None:
            self.send_header("Inference-Header-Content-Length", str(header))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if partial else body)
        self.close_connection = self.close_connection or partial

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def main() -> None:
    """Until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", default="", help="the whole value of the header Authorization")
    parser.add_argument("--json-only", action="store_true")
    arguments = parser.parse_args()
    with KServeServer(port=arguments.port, token=arguments.token, binary=not arguments.json_only) as server:
        sys.stdout.write(f"KServe test server at {server.url}\n")
        sys.stdout.flush()
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
