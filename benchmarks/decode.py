"""A compressed CT series to HU: one frame after another in this process, and through the decoder processes.

    python benchmarks/decode.py [--slices N] [--syntax j2k|jls|rle] [--decoders N]

The series is a phantom, 512 x 512, with noise as a scanner has it. `gap`: the longest a thread beside it was kept from
running. Checks that both give the same values.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import uid as uids
from pydicom.filereader import dcmread, read_file_meta_info

from dicom_node.decoder import decoded_planes
from dicom_node.decoding import close_decoders, use_decoders
from dicom_node.demo.phantom_dicom import write_ct_series, write_cxr
from dicom_node.model import Origin, StoredInstance
from dicom_node.pixels import read_hounsfield, read_image
from dicom_node.stored_values import ImageFile, Slice, decoded

SYNTAXES = {"j2k": uids.JPEG2000Lossless, "jls": uids.JPEGLSLossless, "rle": uids.RLELossless}
TICK_S = 0.001

Volume = npt.NDArray[Any]


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--syntax", choices=sorted(SYNTAXES), default="j2k")
    parser.add_argument("--decoders", type=int, default=0)
    options = parser.parse_args()
    use_decoders(options.decoders)
    syntax = SYNTAXES[options.syntax]
    with tempfile.TemporaryDirectory() as temporary:
        series = write_ct_series(Path(temporary), 3, shape=(options.slices, 512, 512), spacing_mm=(1.25, 0.75, 0.75))
        for path in series.paths:
            compress(path, syntax)
        images = [read_image(stored(path)) for path in series.paths]
        print(f"{options.slices} slices of 512 x 512, {syntax.name}, {len(os.sched_getaffinity(0))} cores")
        one = timed("this process", options.slices, lambda: alone(images))
        timed("decoders, first use", options.slices, lambda: read_hounsfield(images))
        pool = timed("decoders, started", options.slices, lambda: read_hounsfield(images))
        assert np.array_equal(one, pool), "the values differ"
        radiographs(Path(temporary), syntax)
    close_decoders()


def alone(images: list[ImageFile]) -> Volume:
    """HU as they were read before there were decoder processes."""
    volume = np.empty((len(images), 512, 512), np.int16)
    for k, image in enumerate(images):
        instance = image.instance
        frames = decoded_planes(instance.path, instance.transfer_syntax_uid, [0], (512, 512), np.dtype("<u2"))
        volume[k] = next(frames).view(np.int16)
        volume[k] += np.int16(float(image.header["RescaleIntercept"]))
    return volume


def radiographs(folder: Path, syntax: uids.UID) -> None:
    """One picture at a time: what asking a process costs."""
    for size in (512, 1024, 2048):
        path = folder / f"cxr-{size}.dcm"
        write_cxr(path, 1, rows=size, columns=size)
        compress(path, syntax)
        slice_ = Slice.of(image := read_image(stored(path)), image.header)
        here, there = [], []
        for _ in range(9):
            started = time.perf_counter()
            next(decoded_planes(str(path), syntax, [0], (size, size), np.dtype("<u2")))
            here.append(time.perf_counter() - started)
            started = time.perf_counter()
            list(decoded([slice_]))
            there.append(time.perf_counter() - started)
        here_ms, there_ms = sorted(here)[4] * 1e3, sorted(there)[4] * 1e3
        print(f"one image of {size} x {size}: here {here_ms:.1f} ms, by a decoder {there_ms:.1f} ms")


def timed(name: str, slices: int, work: Callable[[], Volume]) -> Volume:
    """Run it once, print what it took."""
    with longest_gap() as gap:
        started = time.perf_counter()
        volume = work()
        took = time.perf_counter() - started
    print(f"{name}: {took:.2f} s, {took / slices * 1e3:.1f} ms a slice, gap {max(gap) * 1e3:.0f} ms")
    return volume


@contextmanager
def longest_gap() -> Iterator[list[float]]:
    """A thread that would run every millisecond; how long it did not."""
    gaps, over = [0.0], threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not over.wait(TICK_S):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield gaps
    finally:
        over.set()
        thread.join()


def compress(path: Path, syntax: uids.UID) -> None:
    """The file in another transfer syntax, with noise: a smooth phantom is no work for a codec."""
    ds = dcmread(path)
    cells = ds.pixel_array.astype(np.int32)
    noise = np.random.default_rng(len(path.name)).normal(0, 12, cells.shape)
    ds.PixelData = np.clip(cells + noise, 0, 4095).astype("<u2").tobytes()
    ds.compress(syntax, generate_instance_uid=False)
    ds.save_as(path)


def stored(path: Path) -> StoredInstance:
    """The file as the archive would hand it out."""
    meta = read_file_meta_info(path)
    offset = 132 + 12 + meta.FileMetaInformationGroupLength
    content = path.read_bytes()[offset:]
    return StoredInstance(
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.4",
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        origin=Origin.RECEIVED,
    )


if __name__ == "__main__":
    main()
