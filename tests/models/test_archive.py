"""A zipped package is unpacked whole into a new folder, or refused with nothing written anywhere."""

import json
import random
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dicom_node.errors import PackageError
from dicom_node.models import archive
from dicom_node.models.archive import extra_files, open_archive


def packed(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    """A zip of `entries`; duplicate names included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of duplicates
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in entries:
                file.writestr(name, content)
    return path


def entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    """An entry whose name is written as it stands."""
    info = zipfile.ZipInfo("x")
    info.filename = name
    info.external_attr = mode << 16
    return info


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """An empty folder to unpack into."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_one_top_folder_is_the_package(tmp_path: Path, scratch: Path) -> None:
    path = packed(
        tmp_path / "a.zip",
        ("bundle/", b""),
        ("bundle/configs/metadata.json", b"{}"),
        ("bundle/models/model.pt", b"w" * 3000),
        ("__MACOSX/bundle/._model.pt", b"?"),
        ("bundle/.DS_Store", b"?"),
    )
    folder = open_archive(path, scratch)
    assert folder.name == "bundle"
    assert folder.parent.parent == scratch
    assert (folder / "models" / "model.pt").read_bytes() == b"w" * 3000
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "configs/metadata.json",
        "models/model.pt",
    ]


def test_without_a_top_folder_the_new_folder_is_the_package(tmp_path: Path, scratch: Path) -> None:
    path = packed(tmp_path / "a.zip", ("model.yaml", b"schema: 1"), ("weights.safetensors", b"w"))
    folder = open_archive(path, scratch)
    assert folder.parent == scratch
    assert (folder / "model.yaml").read_bytes() == b"schema: 1"


def test_two_archives_with_the_same_names_do_not_meet(tmp_path: Path, scratch: Path) -> None:
    one, two = (packed(tmp_path / f"{text}.zip", ("model.yaml", text.encode())) for text in ("one", "two"))
    folders = [open_archive(path, scratch) for path in (one, two)]
    assert [(folder / "model.yaml").read_bytes() for folder in folders] == [b"one", b"two"]


HOSTILE = {
    "upwards": [("../evil", b"x")],
    "upwards from within": [("a/../../evil", b"x")],
    "upwards in Windows' way": [("..\\evil", b"x")],
    "absolute": [(entry("/tmp/evil"), b"x")],
    "a drive": [("C:evil", b"x")],
    "a hidden tail after a NUL": [(entry("good.txt\0/../../evil"), b"x")],
    "a name of control characters": [(entry("a\nb"), b"x")],
    "an empty part": [("a//b", b"x")],
    "no name at all": [(entry(""), b"x")],
    "a very long name": [("a" * 300, b"x")],
    "very deep": [("/".join("a" * 40), b"x")],
    "a symbolic link": [(entry("link", stat.S_IFLNK | 0o777), b"/etc/passwd")],
    "a link that would be followed": [
        (entry("link", stat.S_IFLNK | 0o777), b"/tmp"),
        ("link/evil", b"x"),
    ],
    "a device": [(entry("null", stat.S_IFCHR | 0o666), b"")],
    "a pipe": [(entry("pipe", stat.S_IFIFO | 0o666), b"")],
    "a name twice": [("model.yaml", b"one"), ("model.yaml", b"two")],
    "a name twice but for its case": [("model.yaml", b"one"), ("Model.YAML", b"two")],
    "a name twice but for its composition": [("caf\u00e9", b"one"), ("cafe\u0301", b"two")],
    "a file that is a folder": [("a", b"x"), ("a/b", b"y")],
    "too many entries": [(f"{n}", b"") for n in range(archive.MAX_ENTRIES + 1)],
    "a bomb": [("zeros", b"\0" * (17 * 1024**2))],
    "nothing": [],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_and_nothing_is_written(case: str, tmp_path: Path, scratch: Path) -> None:
    path = packed(tmp_path / "evil.zip", *HOSTILE[case])
    with pytest.raises(PackageError, match=r"evil\.zip"):
        open_archive(path, scratch)
    assert list(scratch.iterdir()) == []
    assert sorted(found.name for found in tmp_path.iterdir()) == ["evil.zip", "scratch"]


def _encrypted(content: bytes) -> bytes:
    at = content.index(b"PK\x01\x02")
    return content[: at + 8] + b"\x01" + content[at + 9 :]


def _larger_than_it_says(content: bytes) -> bytes:
    at = content.index(b"PK\x01\x02")
    return content[: at + 24] + struct.pack("<I", 5) + content[at + 28 :]


def _damaged(content: bytes) -> bytes:
    at = content.index(b"weights") + len("weights") + 20
    return content[:at] + bytes(byte ^ 0x55 for byte in content[at : at + 20]) + content[at + 20 :]


def _shared(content: bytes) -> bytes:
    """Two entries of the list over the same bytes."""
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    listed = content[start:end]
    again = listed.replace(b"weights", b"another")
    tail = bytearray(content[end:])
    struct.pack_into("<HHI", tail, 8, 2, 2, len(listed) * 2)
    return content[:end] + again + bytes(tail)


def _list_of_a_gigabyte(content: bytes) -> bytes:
    end = content.index(b"PK\x05\x06")
    tail = bytearray(content[end:])
    struct.pack_into("<I", tail, 12, 2**30)
    return content[:end] + bytes(tail)


@pytest.mark.parametrize(
    "change", [_encrypted, _larger_than_it_says, _damaged, _shared, _list_of_a_gigabyte, lambda content: content[:-40]]
)
def test_an_archive_that_lies_about_itself_is_refused_and_nothing_is_left(
    change: Callable[[bytes], bytes], tmp_path: Path, scratch: Path
) -> None:
    path = packed(tmp_path / "evil.zip", ("weights", random.Random(4).randbytes(4000)))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(PackageError, match=r"evil\.zip"):
        open_archive(path, scratch)
    assert list(scratch.iterdir()) == []


def test_a_list_of_entries_that_would_fill_the_memory_is_not_read(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "evil.zip"
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse: a list of a GiB, before its end record
        file.seek(2**30)
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 60000, 60000, 2**30, 0, 0))
    with pytest.raises(PackageError, match="absurdly long"):
        open_archive(path, scratch)


def test_what_is_no_archive_or_not_there_is_told_so(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(PackageError, match="no readable zip"):
        open_archive(tmp_path / "text.zip", scratch)
    with pytest.raises(PackageError, match="No such file"):
        open_archive(tmp_path / "missing.zip", scratch)
    path = packed(tmp_path / "a.zip", ("model.yaml", b"x"))
    with pytest.raises(PackageError, match="No such file"):
        open_archive(path, tmp_path / "no folder")


def test_what_a_torchscript_file_carries_beside_its_network_is_read_without_loading_it(tmp_path: Path) -> None:
    path = tmp_path / "net.ts"
    extra = {"metadata.json": json.dumps({"name": "x"}).encode(), "other.txt": b"no"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path), _extra_files=extra)
    assert extra_files(path, ("metadata.json", "inference.json"), 1024) == {"metadata.json": b'{"name": "x"}'}
    with pytest.raises(PackageError, match="larger than"):
        extra_files(path, ("metadata.json",), 4)
    (tmp_path / "plain.ts").write_bytes(b"nothing")
    assert extra_files(tmp_path / "plain.ts", ("metadata.json",), 1024) == {}
