"""Volumes to and from NIfTI-1 / NIfTI-2 single files (.nii, .nii.gz); nibabel reads and writes the headers.

NIfTI counts x to the right and y to the front (RAS), DICOM x to the left and y to the back (LPS): the two differ by
diag(-1, -1, 1, 1). Everything handed out here is LPS. Voxels keep their order: i is the column, j the row, k the slice
of what is written, so nothing is turned or copied on the way.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from dicom_node.engines._voxel_stream import MAX_VOXEL_BYTES, ReturnedVolume, UnusableVolume, VoxelStream, opened
from dicom_node.errors import SeriesRejected
from dicom_node.geometry import VolumeGeometry

__all__ = ["read_nifti", "write_nifti"]

Affine = npt.NDArray[np.float64]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_MAX_SIDE = 32767  # dim is int16 in NIfTI-1
_MAX_EXTENSIONS = 16 * 1024**2
_DATA = 352  # where voxels begin when there are no extensions
_COMPRESSION = 1  # the fastest: an engine on the same network unpacks it again at once
# NIfTI-1 datatype codes of real numbers
_TYPES = {
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"},
    **{256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"},
}
_UNREAD = {32: "complex", 1792: "complex", 2048: "complex", 128: "colour", 2304: "colour", 1: "single-bit"}
_TO_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: not said, metre, millimetre, micrometre
_DISAGREE = 0.25  # of a voxel

# --- writing ---------------------------------------------------------------------------------------------------------


def write_nifti(
    volume: npt.NDArray[np.int16] | npt.NDArray[np.float32],
    geometry: VolumeGeometry,
    path: Path,
    *,
    heartbeat: Callable[[], None] | None = None,
) -> None:
    """Write `volume` (slice, row, column) as `path`, .nii or .nii.gz: sform and qform, code 1 (scanner), mm.

    The same volume gives the same bytes; nothing but geometry and voxels is in them. Goes slice by slice and needs no
    memory beside the volume; `heartbeat` is called after each. Raises SeriesRejected when the slices do not lie on a
    regular grid, which NIfTI cannot say, or a side is too long for it. A file that could not be finished is removed.
    """
    header = _header(volume, geometry)
    packed = path.name.endswith(".gz")
    try:
        with path.open("wb") as file:
            if not packed:
                _write(file, header, volume, heartbeat)
                return
            # neither name nor time inside: a retry sends what was sent before
            with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as stream:
                _write(stream, header, volume, heartbeat)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _header(volume: npt.NDArray[Any], geometry: VolumeGeometry) -> bytes:
    if not geometry.regular:
        raise SeriesRejected("the slices do not lie on a regular grid: a NIfTI file cannot say where they are")
    if volume.shape != geometry.shape:
        raise ValueError(f"a volume of {volume.shape} for a geometry of {geometry.shape}")
    if max(volume.shape) > _MAX_SIDE:
        raise SeriesRejected(f"a side of {max(volume.shape)} voxels is too long for a NIfTI file")
    affine = _LPS_TO_RAS @ geometry.affine @ _to_source_index()
    header: Any = Nifti1Header(endianness="<")  # type: ignore[no-untyped-call]
    header.set_data_dtype(volume.dtype)
    header.set_data_shape(volume.shape[::-1])
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0  # some readers take "not set" for a number
    header["vox_offset"] = _DATA
    header["magic"] = b"n+1"
    return bytes(header.binaryblock) + bytes(4)  # no extensions follow


def _to_source_index() -> Affine:
    """(column, row, slice, 1) to (slice, row, column, 1)."""
    swap = np.eye(4)
    swap[[0, 2]] = swap[[2, 0]]
    return swap


def _write(
    stream: BinaryIO | gzip.GzipFile,
    header: bytes,
    volume: npt.NDArray[Any],
    heartbeat: Callable[[], None] | None,
) -> None:
    stream.write(header)
    little = volume.dtype.newbyteorder("<")
    for plane in volume:
        stream.write(np.ascontiguousarray(plane, little).view(np.uint8).data)
        if heartbeat is not None:
            heartbeat()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_nifti(
    path: Path, *, max_bytes: int = MAX_VOXEL_BYTES, heartbeat: Callable[[], None] | None = None
) -> ReturnedVolume:
    """The one volume of a .nii or .nii.gz file of anybody, told apart by its content, with its place in LPS.

    The sform is taken when its code is above 0, else the qform (NIfTI-1 standard, methods 3 and 2); a note says so
    when both are there and disagree by more than a quarter of a voxel. Stored values go through scl_slope and
    scl_inter where they say anything. No memory is taken before the header's sizes have been found sane; what is
    handed out has at most `max_bytes`.

    Raises UnusableVolume with the reason: no NIfTI file, several volumes, complex or colour voxels, no place or one
    that is not finite, too large, cut short, damaged, or more behind the voxels than the header announces.
    """
    with opened(path, heartbeat) as stream:
        header = _read_header(stream)
        dtype, shape = _voxel_type(header), _shape(header)
        affine, notes = _place(header, shape)
        _skip_extensions(stream, header)
        scale = _scale(header)
        wide = np.dtype(np.float64 if dtype.itemsize > 2 else np.float32) if scale else dtype
        array = stream.voxels(shape, dtype, max_bytes * dtype.itemsize // wide.itemsize)
    if scale is not None:
        array = array.astype(wide, copy=False)
        array *= scale[0]
        array += scale[1]
    return ReturnedVolume(array=array, affine_lps=_LPS_TO_RAS @ affine, notes=notes)


def _read_header(stream: VoxelStream) -> Any:
    start = stream.take(4)
    sizes = {int.from_bytes(start, "little"), int.from_bytes(start, "big")}
    header: Any
    if 348 in sizes:
        header, magic = Nifti1Header(start + stream.take(344), check=False), b"n+1"  # type: ignore[no-untyped-call]
    elif 540 in sizes:
        header, magic = Nifti2Header(start + stream.take(536), check=False), b"n+2"  # type: ignore[no-untyped-call]
    else:
        raise UnusableVolume("this is no NIfTI file")
    if bytes(header["magic"])[:3] != magic:
        raise UnusableVolume("this is no single-file NIfTI: its header says that the voxels are elsewhere")
    return header


def _voxel_type(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code not in _TYPES:
        raise UnusableVolume(f"{_UNREAD.get(code, 'unknown')} voxels (NIfTI datatype {code}): real numbers are read")
    return np.dtype(_TYPES[code]).newbyteorder(header.endianness)


def _shape(header: Any) -> tuple[int, int, int]:
    dims = [int(side) for side in header["dim"]]
    if not 2 <= dims[0] <= 7:
        raise UnusableVolume(f"a NIfTI file of {dims[0]} dimensions is no volume")
    sides = dims[1 : dims[0] + 1]
    if min(sides) < 1:
        raise UnusableVolume(f"a NIfTI file with a side of {min(sides)} voxels")
    several = [side for side in sides[3:] if side != 1]
    if several:
        raise UnusableVolume(f"a file of {' x '.join(map(str, several))} volumes: one was expected")
    return sides[0], sides[1], sides[2] if len(sides) > 2 else 1


def _place(header: Any, shape: tuple[int, int, int]) -> tuple[Affine, tuple[str, ...]]:
    """The affine (RAS, mm), and what is odd about it."""
    by_sform, by_qform = bool(header["sform_code"] > 0), bool(header["qform_code"] > 0)
    if not by_sform and not by_qform:
        raise UnusableVolume("the file does not say where it lies: neither sform nor qform has a code above 0")
    qform = _qform(header) if by_qform else None
    chosen = _affine(header.get_sform) if by_sform else qform
    if chosen is None or not np.isfinite(chosen).all():
        raise UnusableVolume("the place of the file is not a finite one")
    millimetres = _TO_MM.get(int(header["xyzt_units"]) & 7)
    if millimetres is None:
        raise UnusableVolume("the unit of length of the file is none that NIfTI has")
    notes: tuple[str, ...] = ()
    if by_sform and by_qform and not _agree(chosen, qform, shape):
        notes = ("the two places that the returned NIfTI file gives disagree: its sform was taken, not its qform",)
    return np.diag([millimetres] * 3 + [1.0]) @ chosen, notes


def _affine(read: Callable[[], Any]) -> Affine | None:
    try:
        return np.asarray(read(), np.float64)
    except (HeaderDataError, ValueError, ArithmeticError):
        return None


def _qform(header: Any) -> Affine | None:
    if header["pixdim"][0] == 0:  # the standard: 0 is to be taken as 1
        header["pixdim"][0] = 1
    return _affine(header.get_qform)


def _agree(sform: Affine, qform: Affine | None, shape: tuple[int, int, int]) -> bool:
    """Whether both put every corner in the same place, within what the qform's four-byte quaternion can tell."""
    if qform is None or not np.isfinite(qform).all():
        return False
    corners = np.array([[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])], np.float64)
    apart = np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1)
    return bool(apart.max() <= _DISAGREE * np.linalg.norm(sform[:3, :3], axis=0).min())


def _scale(header: Any) -> tuple[float, float] | None:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope) or (slope, inter) == (1.0, 0.0):
        return None
    if not np.isfinite([slope, inter]).all():
        raise UnusableVolume("scl_slope or scl_inter is not finite")
    return slope, inter


def _skip_extensions(stream: VoxelStream, header: Any) -> None:
    offset, size = float(header["vox_offset"]), int(header["sizeof_hdr"])
    if offset == 0:
        offset = size + 4
    if not size <= offset <= size + _MAX_EXTENSIONS or not offset.is_integer():
        raise UnusableVolume(f"the voxels cannot begin at byte {offset:g}")
    stream.take(int(offset) - size)
