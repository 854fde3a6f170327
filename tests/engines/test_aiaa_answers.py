"""What an AIAA server answers, read: files, parameters, both as parts; what a classifier says, as findings."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dicom_node.engines import _aiaa_parts
from dicom_node.engines._aiaa_findings import findings_of
from dicom_node.engines._aiaa_options import FindingOptions
from dicom_node.engines._aiaa_parts import Reply, reply_of
from dicom_node.engines._aiaa_pictures import grey, write_png
from dicom_node.engines.labels import LabelTable
from dicom_node.errors import EngineError
from dicom_node.values import Findings, Presence

MARK = "b0undary"
PARTS = f"multipart/form-data; boundary={MARK}"
PARAMS = 'Content-Disposition: form-data; name="params"'
FILE = 'Content-Disposition: form-data; name="file"; filename="a.nii.gz"\r\nContent-Type: application/gzip'


def _multipart(*parts: tuple[str, bytes], end: str = "--\r\n", before: bytes = b"") -> bytes:
    body = b"".join(f"--{MARK}\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts)
    return before + body + f"--{MARK}{end}".encode()


def _reply(folder: Path, body: bytes, content_type: str = PARTS) -> Reply:
    answer = folder / "answer"
    answer.write_bytes(body)
    return reply_of(answer, content_type, lambda: None)


@pytest.mark.parametrize("piece", [1, 7, 64, 256 * 1024])
def test_a_file_and_parameters_are_told_apart_wherever_the_pieces_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(_aiaa_parts, "PIECE", piece)
    content = b"\x1f\x8b\r\n--b0undar\r\n--" + bytes(range(256)) * 3 + b"\r\n"
    reply = _reply(tmp_path, _multipart((PARAMS, b'{"crop": 1}'), (FILE, content), before=b"preamble\r\n"))
    assert reply.params == {"crop": 1}
    assert reply.file is not None and reply.file.read_bytes() == content and reply.file.parent == tmp_path
    empty = _reply(tmp_path, _multipart((FILE, b""), (PARAMS, b"{}")))
    assert empty.file is not None and empty.file.read_bytes() == b"" and empty.params == {}


def test_only_the_first_file_counts_other_parts_are_passed_over_and_names_are_no_paths(tmp_path: Path) -> None:
    evil = FILE.replace("a.nii.gz", "../../evil")
    other = 'Content-Disposition: form-data; name="more"'
    reply = _reply(tmp_path, _multipart((other, b"x" * 9), (evil, b"one"), (FILE, b"two")))
    assert reply.file is not None and reply.file.read_bytes() == b"one" and reply.file.parent == tmp_path
    assert not (tmp_path.parent / "evil").exists()


def test_older_servers_say_points_instead_of_parameters(tmp_path: Path) -> None:
    head = PARAMS.replace("params", "points")
    assert _reply(tmp_path, _multipart((head, b"[[1, 2, 3]]"))).params == {"points": [[1, 2, 3]]}


def test_without_parts_it_is_a_file_or_parameters(tmp_path: Path) -> None:
    assert _reply(tmp_path, b"\x1f\x8bdata", "application/octet-stream").file == tmp_path / "answer"
    assert _reply(tmp_path, b'{"a": 1}', "application/json").params == {"a": 1}
    assert _reply(tmp_path, b'{"a": 1}', "").params == {"a": 1}
    assert _reply(tmp_path, b"[1, 2]", "text/html").params == {"": [1, 2]}


@pytest.mark.parametrize(
    ("body", "content_type", "reason"),
    [
        (b"", "application/octet-stream", "empty"),
        (b"abc", "multipart/form-data", "how they are told apart"),
        (b"abc", f"multipart/form-data; boundary={'x' * 300}", "how they are told apart"),
        (b"abc", PARTS, "ends inside"),
        (_multipart((PARAMS, b"{}"))[:-12], PARTS, "ends inside"),
        (_multipart((PARAMS, b"{}"))[:30], PARTS, "headers"),
        (f"--{MARK}\r\n".encode() + b"x" * 40_000, PARTS, "headers"),
        (_multipart((PARAMS, b"{broken")), PARTS, "no JSON"),
        (_multipart((PARAMS, b"[" * 100_000)), PARTS, "no JSON"),
        (_multipart((PARAMS, b" " * (17 << 20))), PARTS, "more than"),
        (_multipart(*[(PARAMS, b"{}")] * 65), PARTS, "more than 64 parts"),
        (b'{"success": false}', "application/json", "it failed"),
        (b'{"error": {"message": ["SECRET-7"]}}', "application/json", "it failed"),
    ],
)
def test_what_cannot_be_understood_is_told_and_not_quoted(
    tmp_path: Path, body: bytes, content_type: str, reason: str
) -> None:
    with pytest.raises(EngineError, match=reason) as caught:
        _reply(tmp_path, body, content_type)
    assert "SECRET-7" not in str(caught.value)


# --- findings --------------------------------------------------------------------------------------------------------


def _findings(params: Any, *names: str, table: Any = None, **options: Any) -> Findings:
    block = FindingOptions(**options)
    return findings_of(params, block, LabelTable(table or {}), names, sop_instance_uid="1.2")


def _said(found: Findings) -> list[tuple[str, str, float | None]]:
    return [(item.name, item.presence.value, item.confidence) for item in found.items]


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({"covid": 0.9, "other": 0.2}, {}),
        ({"covid": [0.9], "other": [0.2]}, {}),
        ({"out": {"prob": {"covid": 0.9, "other": 0.2}}}, {"at": "out.prob"}),
        ({"": [0.9, 0.2]}, {}),
        ({"pred": [[0.9, 0.2]]}, {"at": "pred"}),
    ],
)
def test_probabilities_in_every_form_become_findings(params: Any, options: Any) -> None:
    found = _findings(params, "covid", "other", **options)
    assert _said(found) == [("covid", "present", 0.9), ("other", "absent", 0.2)]
    assert {item.threshold for item in found.items} == {0.5}


def test_thresholds_codes_and_words_are_those_of_the_configuration() -> None:
    table = {"Covid_19": {"name": "COVID-19", "type": ["SCT", "840539006", "COVID-19"]}, "noise": "ignore"}
    found = _findings({"covid 19": 0.4, "edema": True, "noise": 0.1}, table=table, thresholds={"COVID 19": 0.3})
    assert _said(found) == [("COVID-19", "present", 0.4), ("edema", "present", None)]
    assert (found.items[0].code.value, found.items[1].code.scheme) == ("840539006", "99DICOMNODE")
    assert found.items[1].presence is Presence.PRESENT and found.items[1].threshold is None


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"a": 1.5},
        {"a": float("nan")},
        {"a": -0.1},
        {"a": "yes"},
        {"a": 0.5, "b": None},
        {"a": [0.5, 0.5]},
        {"": [0.5]},
        {"": 0.5},
        {"A b": 0.5, "a_b": 0.5},
        {f"finding {n}": 0.5 for n in range(300)},
    ],
)
def test_what_says_no_findings_is_told(params: Any) -> None:
    with pytest.raises(EngineError):
        _findings(params, "one", "two")


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_is_a_png_of_the_pixels(tmp_path: Path) -> None:
    plane = np.array([[2.0, 200.0, 51.0], [-55.0, 2.0, 200.0]], np.float32)
    pixels = grey(plane)
    assert pixels.tolist() == [[57, 255, 106], [0, 57, 255]] and not grey(np.full((2, 2), 7.0)).any()
    write_png(pixels, tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and raw.endswith(b"IEND\xaeB`\x82")
    at = raw.index(b"IDAT")
    lines = zlib.decompress(raw[at + 4 : at + 4 + int.from_bytes(raw[at - 4 : at], "big")])
    assert lines == b"\0\x39\xff\x6a" + b"\0\0\x39\xff"
    assert int.from_bytes(raw[at - 4 - 4 : at - 4], "big") == zlib.crc32(raw[12:29])
