"""What people and programs write: conditions, rule files, HTTP requests."""

from __future__ import annotations

import json
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import cache
from http import HTTPStatus
from pathlib import Path

from dicom_node.errors import RuleError
from dicom_node.http.health import Check, HealthServer
from dicom_node.model import Condition, Origin, SeriesHeader, SeriesView, Source
from dicom_node.routing.conditions import evaluate_condition
from dicom_node.routing.expressions import parse_expression
from dicom_node.routing.load import check_rules, load_rules
from dicom_node.routing.variables import Variables

from ._target import Target

__all__ = ["TARGETS"]

KNOWN = frozenset({200, 400, 401, 403, 404, 405, 408, 413, 414, 421, 429, 431, 501, 503, 505})
NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
REPOSITORY = Path(__file__).resolve().parents[3]


@cache
def _variables() -> Variables:
    values = {
        **{"Modality": ("CT",), "Rows": (512,), "ImageType": (["ORIGINAL", "PRIMARY"], ["DERIVED"])},
        **{"SliceThickness": (1.5,), "PatientID": ("",), "BodyPartExamined": ("CHEST", "ABDOMEN")},
    }
    header = SeriesHeader(series_instance_uid="1.2", instance_count=2, values=values)
    view = SeriesView(
        study_instance_uid="1.2.3",
        revision=1,
        header=header,
        source=Source(calling_ae_title="CT1", called_ae_title="NODE", address="10.0.0.1"),
        origins=frozenset({Origin.RECEIVED}),
        study_series_count=1,
        study_instance_count=2,
        study_modalities=("CT",),
        received_at=NOON,
    )
    return Variables(view, NOON)


def conditions(data: bytes) -> None:
    """A fault within the text, or one of five outcomes with its reason, the same each time."""
    text = data.decode("utf-8", "replace")
    parsed = parse_expression(text)
    if isinstance(parsed, list):
        assert parsed and all(fault.message and fault.remedy and 0 <= fault.offset <= len(text) for fault in parsed)
        return
    first, second = (evaluate_condition(parsed, _variables(), frozenset()) for _ in range(2))
    assert first.result.outcome in Condition and len(first.result.explanation) > 5
    assert (first.held, first.result.outcome) == (second.held, second.result.outcome)
    json.dumps(dict(first.result.values))


def _shipped(_: Path | None) -> Iterator[Path]:
    yield from sorted((REPOSITORY / "routing_rules").glob("*.yaml"))


def _conditions(corpus: Path | None) -> Iterator[bytes]:
    yield b'values.ImageType.exists(v, v[0] == "ORIGINAL")'
    yield b'!(Rows > 100 && SliceThickness <= 2.5) || Modality in ["CT", "MR"] ? true : false'
    for path in _shipped(corpus):
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.fullmatch(r"\s+- (.*)", line):
                yield found[1].encode()


@cache
def _rules_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-rules-"))


def rule_files(data: bytes) -> None:
    """A set of rules, or problems that name a line and a remedy; never something half loaded."""
    folder = _rules_folder()
    (folder / "10.yaml").write_bytes(data)
    names = {"engines": ("cxr-findings", "ct-abdomen"), "destinations": ("PACS",)}
    problems = check_rules(folder, **names)
    lines = data.count(b"\n") + data.count(b"\r") + 1
    assert all(1 <= problem.line <= lines and problem.remedy for problem in problems)
    try:
        loaded = load_rules(folder, **names)
    except RuleError as exc:
        assert problems and str(exc) == str(problems[0])
    else:
        assert not problems and len({rule.name for rule in loaded.rules}) == len(loaded.rules)


def _rule_files(corpus: Path | None) -> Iterator[bytes]:
    yield from (path.read_bytes() for path in _shipped(corpus))


# --- HTTP ------------------------------------------------------------------------------------------------------------


@cache
def _server() -> HealthServer:
    listener = socket.create_server(("127.0.0.1", 0))
    server = HealthServer(
        listener, checks=[lambda: Check(name="disk", ok=True)], metrics=lambda: ("text/plain", b"a_total 1\n")
    )
    server.start()
    return server


def http_request(data: bytes) -> None:
    """Silence, or one whole answer of a known status, within the bounds; and the server still lives."""
    answer = _asked(data)
    if answer:
        head, separator, body = answer.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        found = re.fullmatch(r"HTTP/1\.1 ([0-9]{3}) (.+)", status_line)
        assert separator and found and int(found[1]) in KNOWN and found[2] == HTTPStatus(int(found[1])).phrase
        fields = dict(line.split(": ", 1) for line in lines)
        assert body == b"" or int(fields["Content-Length"]) == len(body)
    assert _asked(b"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def _asked(request: bytes) -> bytes:
    with closing(socket.create_connection(("127.0.0.1", _server().port), timeout=10)) as client:
        try:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b""))
        except ConnectionError:
            return b""


def _requests(_: Path | None) -> Iterator[bytes]:
    for path in (b"/ping", b"/ready", b"/metrics", b"/ready?x=1", b"/../etc/passwd"):
        yield b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer x\r\n\r\n"
    yield b"HEAD /ping HTTP/1.0\r\n\r\n"
    yield b"POST /ready HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    yield b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n"


TARGETS = (
    Target(name="conditions", run=conditions, seeds=_conditions, longest=400, cost=4),
    Target(name="rule-files", run=rule_files, seeds=_rule_files, cost=20),
    Target(name="http-request", run=http_request, seeds=_requests, longest=10_000, cost=2),
)
