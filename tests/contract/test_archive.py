"""What every archive promises (`interfaces.Archive`, `interfaces.Spool`)."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from blake3 import blake3

from dicom_node.errors import NotFound, StorageError
from dicom_node.interfaces import Archive, Spool
from dicom_node.store.folder import FolderArchive
from dicom_node.store.fs import RealFileSystem

EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
CT = "1.2.840.10008.5.1.4.1.1.2"


class NoTmpfile(RealFileSystem):
    """A file system without nameless files (NFS, overlay)."""

    def open_tmpfile(self, folder: Path) -> int:
        raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE")

    open_direct_tmpfile = open_tmpfile


BACK_ENDS: dict[str, Callable[[Path], Archive]] = {
    "folder": lambda root: FolderArchive(root / "archive", fs=RealFileSystem(), reserve_bytes=0, reserve_ratio=0.0),
    "folder-named-temporaries": lambda root: FolderArchive(root / "archive", fs=NoTmpfile()),
}


@pytest.fixture(params=sorted(BACK_ENDS))
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    return BACK_ENDS[request.param](tmp_path)


def begin(archive: Archive, *, uid: str = "1.2.3", syntax: str = EXPLICIT, ae: str = "SCANNER") -> Spool:
    return archive.begin(sop_class_uid=CT, sop_instance_uid=uid, transfer_syntax_uid=syntax, source_ae=ae)


def test_a_committed_object_is_a_part_10_file_around_the_very_bytes(archive: Archive) -> None:
    data_set = io.BytesIO()
    ds = pydicom.Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = CT, "1.2.3", "Doe^Jane"
    pydicom.dcmwrite(data_set, ds, implicit_vr=False, little_endian=True)
    body = data_set.getvalue()
    spool = begin(archive)
    spool.write(body[:7])
    spool.write(memoryview(body)[7:])
    assert spool.length == len(body)
    assert spool.sha256 == "blake3:" + blake3(body).hexdigest()
    assert bytes(spool.view()) == body
    kept = spool.commit()
    raw = Path(archive.path(kept.location)).read_bytes()
    assert raw[kept.data_set_offset : kept.data_set_offset + kept.data_set_length] == body
    assert len(raw) == kept.data_set_offset + len(body)
    read = pydicom.dcmread(io.BytesIO(raw))
    assert read.PatientName == "Doe^Jane"
    assert read.file_meta.TransferSyntaxUID == EXPLICIT
    assert read.file_meta.MediaStorageSOPInstanceUID == "1.2.3"
    assert read.file_meta.SourceApplicationEntityTitle == "SCANNER"
    assert read.file_meta.FileMetaInformationGroupLength == kept.data_set_offset - 144
    assert read.file_meta.ImplementationClassUID.startswith("2.25.")


def test_the_file_of_a_result_says_for_which_job_it_was_made(tmp_path: Path) -> None:
    """PS3.10 7.1: private information, under a creator of its own; every reader takes the file as before."""
    archive = FolderArchive(tmp_path / "archive", reserve_bytes=0, reserve_ratio=0.0)
    marks = ("7 2026-01-02T03:04:05.000006+00:00", "71 2026-01-02T03:04:05.000006+00:00", "")
    for number, mark in enumerate(marks):  # of odd and even length
        ds = pydicom.Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CT, f"1.2.{number}"
        body = io.BytesIO()
        pydicom.dcmwrite(body, ds, implicit_vr=False, little_endian=True)
        names = {"sop_class_uid": CT, "sop_instance_uid": f"1.2.{number}", "transfer_syntax_uid": EXPLICIT}
        spool = archive.begin(**names, source_ae="", made_for=mark)
        spool.write(body.getvalue())
        location = spool.commit().location
        with archive.examine(location) as found:
            assert (found.made_for, found.named_rightly, bytes(found.data_set)) == (mark, True, body.getvalue())
        read = pydicom.dcmread(archive.path(location))
        assert read.SOPInstanceUID == ds.SOPInstanceUID
        assert ("PrivateInformation" in read.file_meta) == bool(mark)


def test_nothing_is_visible_before_commit_nor_after_discard(archive: Archive) -> None:
    spool = begin(archive)
    spool.write(b"x" * 300_000)
    assert list(archive.locations()) == []
    spool.discard()
    spool.discard()
    assert list(archive.locations()) == []


def test_the_same_object_again_is_one_file_and_not_created_twice(archive: Archive) -> None:
    kept = []
    for ae in ("A", "ANOTHER_SENDER"):  # the second envelope would be longer
        spool = begin(archive, ae=ae)
        spool.write(b"the same bytes")
        kept.append((spool.commit(), spool.created))
    assert kept[0][0] == kept[1][0]
    assert [created for _, created in kept] == [True, False]
    assert list(archive.locations()) == [kept[0][0].location]
    raw = Path(archive.path(kept[1][0].location)).read_bytes()
    assert raw[kept[1][0].data_set_offset :] == b"the same bytes"


def test_the_same_bytes_in_another_transfer_syntax_are_another_file(archive: Archive) -> None:
    for syntax in (EXPLICIT, IMPLICIT):
        spool = begin(archive, syntax=syntax)
        spool.write(b"bytes")
        spool.commit()
    assert len(list(archive.locations())) == 2


def test_a_damaged_file_is_put_right_when_its_object_comes_again(archive: Archive) -> None:
    spool = begin(archive)
    spool.write(b"precious" * 1000)
    kept = spool.commit()
    path = Path(archive.path(kept.location))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    spool = begin(archive, ae="ANOTHER_SENDER")
    spool.write(b"precious" * 1000)
    again = spool.commit()
    assert again.location == kept.location
    assert path.read_bytes()[again.data_set_offset :] == b"precious" * 1000


def test_an_empty_data_set_can_be_spooled_and_viewed(archive: Archive) -> None:
    spool = begin(archive)
    assert bytes(spool.view()) == b""
    spool.discard()


def test_files_and_folders_are_for_their_owner_only(archive: Archive) -> None:
    spool = begin(archive)
    spool.write(b"x")
    path = Path(archive.path(spool.commit().location))
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    assert path.parent.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "location", ["", "../../etc/passwd", "aa/../../x.dcm", "/etc/passwd", "ab/" + "c" * 64 + ".dcm", "aa/aa.dcm"]
)
def test_a_location_that_is_not_the_archives_own_is_not_found(archive: Archive, location: str) -> None:
    with pytest.raises(NotFound):
        archive.path(location)


def test_removing_is_idempotent(archive: Archive) -> None:
    spool = begin(archive)
    spool.write(b"x")
    kept = spool.commit()
    archive.remove(kept.location)
    archive.remove(kept.location)
    assert list(archive.locations()) == []


def test_below_the_reserve_nothing_is_begun(tmp_path: Path) -> None:
    archive = FolderArchive(tmp_path / "archive", reserve_bytes=2**60)
    assert archive.free_bytes() <= 0
    with pytest.raises(StorageError) as refused:
        begin(archive)
    assert refused.value.dimse_status == 0xA700


def test_the_larger_of_the_two_reserves_counts(tmp_path: Path) -> None:
    space = os.statvfs(tmp_path)
    total = space.f_blocks * space.f_frsize
    plain = FolderArchive(tmp_path / "archive").free_bytes()
    ratio = FolderArchive(tmp_path / "archive", reserve_bytes=1, reserve_ratio=0.5).free_bytes()
    assert abs((plain - ratio) - total * 0.5) < total * 0.05


def test_what_a_crash_left_is_swept_and_never_listed(tmp_path: Path) -> None:
    archive = FolderArchive(tmp_path / "archive", fs=NoTmpfile())
    spool = begin(archive)
    spool.write(b"half an object" * 100_000)
    left = list((tmp_path / "archive" / "tmp").iterdir())
    assert len(left) == 1
    assert list(archive.locations()) == []
    assert archive.sweep() == 1
    spool.discard()
