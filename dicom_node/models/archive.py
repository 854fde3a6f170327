"""Model packages that come as one file: a zip is unpacked into a fresh folder, or refused before anything is written.

What a zip says of itself is not believed: names, kinds and sizes are checked first, sizes once more while writing.
Nothing is executed, no link is made, nothing is written outside of the new folder. Must not import torch.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from dicom_node.errors import PackageError

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "extra_files", "is_torchscript", "open_archive"]

MAX_ENTRIES = 4096
MAX_BYTES = 8 * 1024**3  # unpacked, all together
_MAX_RATIO = 200  # unpacked over packed; weights hardly shrink, text shrinks tenfold
_RATIO_FROM = 16 * 1024**2  # smaller archives may shrink as they like
_MAX_DEPTH = 16
_MAX_NAME = 255
_MAX_READ = 4 * 1024**2
_CHUNK = 1024**2
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LEFT_BY_SYSTEMS = ("__MACOSX", ".DS_Store")


def open_archive(path: Path, scratch: Path) -> Path:
    """Unpack the zip `path` into a new folder under `scratch`; the package's folder: the only top one, else the new.

    Raises PackageError, with nothing left behind: no zip, encrypted, damaged, an entry that leaves the folder, is no
    regular file, or comes twice (also by case only), more than MAX_ENTRIES entries or MAX_BYTES, absurd compression.
    """
    with _opened(path) as archive:
        entries = _checked(path, archive)
        total = sum(entry.file_size for _, entry in entries)
        try:
            if total > shutil.disk_usage(scratch).free:
                raise PackageError(
                    f"{path}: unpacked it takes {(total >> 20) + 1} MiB, more than the disk has left for it"
                )
            folder = Path(tempfile.mkdtemp(prefix="package-", dir=scratch))
        except OSError as exc:
            raise PackageError(f"{scratch}: {exc.strerror}") from exc
        try:
            for name, entry in entries:
                _write(archive, entry, folder.joinpath(*name.parts))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    top = list(folder.iterdir())
    return top[0] if len(top) == 1 and top[0].is_dir() else folder


def extra_files(path: Path, names: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """Those of `names` that a TorchScript file carries beside its network (`<top>/extra/<name>`); {} for any other.

    Raises PackageError when the archive is damaged, or one of them is larger than `max_bytes` or there twice.
    """
    if not zipfile.is_zipfile(path):
        return {}
    found: dict[str, bytes] = {}
    with _opened(path) as archive:
        for entry in archive.infolist():
            parts = entry.filename.split("/")
            if len(parts) != 3 or parts[1] != "extra" or parts[2] not in names:
                continue
            if parts[2] in found or entry.file_size > max_bytes or entry.compress_type not in _PLAIN:
                raise PackageError(f"{path}: extra/{parts[2]} is there twice, or larger than {max_bytes >> 10} KiB")
            with archive.open(entry) as file:
                found[parts[2]] = file.read(max_bytes + 1)
    return found


def is_torchscript(path: Path) -> bool:
    """Whether `path` is an archive that torch.jit wrote, whatever its suffix. Raises PackageError when damaged."""
    if not zipfile.is_zipfile(path):
        return False
    with _opened(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


class _Bounded(io.FileIO):
    """A file of which nothing asks for more than a few MiB at once: the list of a zip is read in one piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes, all that are left for -1. Raises BadZipFile for more than is sane."""
        wanted = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if wanted > _MAX_READ:
            raise zipfile.BadZipFile("its list of entries is absurdly long")
        return super().read(max(0, wanted))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever a damaged one makes the reader raise becomes a PackageError."""
    try:
        with _Bounded(path, "rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror or 'cannot be read'}") from exc
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, ValueError) as exc:
        raise PackageError(f"{path}: is no readable zip archive: {str(exc)[:200]}") from exc


def _checked(path: Path, archive: zipfile.ZipFile) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    """(name, entry) of every file. Raises PackageError before anything is written."""
    listed = archive.infolist()
    packed = path.stat().st_size
    if len(listed) > MAX_ENTRIES:
        raise PackageError(f"{path}: has {len(listed)} entries, at most {MAX_ENTRIES} are unpacked")
    total = sum(entry.file_size for entry in listed)
    if total > MAX_BYTES:
        raise PackageError(f"{path}: is {total >> 30} GiB unpacked, at most {MAX_BYTES >> 30} GiB are taken")
    # entries that share their bytes are how a small file becomes a huge one
    if sum(entry.compress_size for entry in listed) > packed or total > max(_RATIO_FROM, packed * _MAX_RATIO):
        raise PackageError(f"{path}: unpacks to an absurd {total} bytes from {packed}")
    files: list[tuple[PurePosixPath, zipfile.ZipInfo]] = []
    seen: set[str] = set()
    folders: set[str] = set()
    for entry in listed:
        name = _name(path, entry)
        if name.parts[0] in _LEFT_BY_SYSTEMS or name.name == ".DS_Store":
            continue
        # as a file system that ignores case and composition of letters would have it
        same = [_folded(PurePosixPath(*name.parts[: n + 1])) for n in range(len(name.parts))]
        folders.update(same[:-1])
        if entry.is_dir():
            folders.add(same[-1])
            continue
        if same[-1] in seen:
            raise PackageError(f"{path}: entry {str(name)[:80]!r} is there twice")
        seen.add(same[-1])
        files.append((name, entry))
    if clash := seen & folders:
        raise PackageError(f"{path}: entry {min(clash)[:80]!r} is a file and a folder")
    if not files:
        raise PackageError(f"{path}: is an empty archive")
    return files


def _folded(name: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()


def _name(path: Path, entry: zipfile.ZipInfo) -> PurePosixPath:
    """Where an entry belongs, relative to the folder. Raises PackageError when it is no plain file or folder there."""
    text = entry.orig_filename  # `filename` is cut at a NUL already
    parts = text.rstrip("/").split("/")
    if (
        not text.isprintable()
        or "\\" in text
        or ":" in text
        or len(parts) > _MAX_DEPTH
        or any(part in ("", ".", "..") or len(part.encode()) > _MAX_NAME for part in parts)
    ):
        raise PackageError(f"{path}: entry {text[:80]!r} leads out of the folder or has no plain name")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    wanted = stat.S_IFDIR if entry.is_dir() else stat.S_IFREG
    if kind not in (0, wanted):
        raise PackageError(f"{path}: entry {text[:80]!r} is no regular file; links and devices are not unpacked")
    if entry.flag_bits & 0x1 or entry.compress_type not in _PLAIN:
        raise PackageError(f"{path}: entry {text[:80]!r} is encrypted or compressed in an unusual way")
    return PurePosixPath(*parts)


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(entry) as source, target.open("xb") as file:
        while chunk := source.read(_CHUNK):
            written += len(chunk)
            if written > entry.file_size:
                raise zipfile.BadZipFile("an entry is larger than it says")
            file.write(chunk)
    if written != entry.file_size:
        raise zipfile.BadZipFile("an entry is shorter than it says")
