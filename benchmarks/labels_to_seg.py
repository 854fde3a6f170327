"""How long a label map of 300 x 512 x 512 with 100 organs takes to become a SEG, beside highdicom doing the same.

    python benchmarks/labels_to_seg.py [--organs N] [--shape PLANES ROWS COLUMNS] [--repeat N] [--check]

On one core, from the label array and the source headers as they come from the archive (undecoded) to a file in the
page cache; CPU seconds, so that other work on the machine does not count. --check reads every file back with
highdicom, and with dcmqi where it is installed, and compares all voxels.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes as dictionary
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from dicom_node.results.seg import LabelmapEncoder, SegEncoder
from dicom_node.values import (
    Code,
    LabelVolume,
    Provenance,
    ResultContext,
    Segment,
)

Labels = npt.NDArray[np.uint8]
TARGETS_S = {"BINARY": 3.0, "LABELMAP": 1.5}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organs", type=int, default=100)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    labels = _organs(options.organs, tuple(options.shape))
    headers = _headers(labels.shape)
    size = " x ".join(map(str, labels.shape))
    print(f"{options.organs} organs on {size}: CPU seconds on one core, best of {options.repeat} (highdicom: one run)")
    print(f"  {'':<9} {'ours':>7} {'highdicom':>10} {'ratio':>6} {'target':>7} {'frames':>7} {'MB':>6} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for kind, encoder in (("BINARY", SegEncoder()), ("LABELMAP", LabelmapEncoder())):
            path, their_path = Path(folder, f"{kind}.dcm"), Path(folder, f"{kind}-highdicom.dcm")
            ours = _best(partial(_encode, encoder, labels, headers, path), options.repeat)
            theirs = _best(partial(_highdicom, kind, labels, headers, their_path), 1)
            frames = int(dcmread(path, stop_before_pixels=True, specific_tags=["NumberOfFrames"]).NumberOfFrames)
            print(
                f"  {kind:<9} {ours.seconds:7.2f} {theirs.seconds:10.2f} {theirs.seconds / ours.seconds:5.1f}x "
                f"{TARGETS_S[kind]:6.1f}s {frames:7d} {path.stat().st_size / 1e6:6.0f} {ours.grown_mb:8.0f}"
            )
            their_path.unlink()
            if options.check:
                _check(path, labels, headers)


# --- what is encoded -------------------------------------------------------------------------------------------------


def _organs(count: int, shape: tuple[int, int, int]) -> Labels:
    """Ellipsoids side by side that touch and cut into each other, each a fifth of the planes high."""
    labels = np.zeros(shape, np.uint8)
    across = int(np.ceil(np.sqrt(count)))
    planes, rows, columns = shape
    radii = np.array([planes / 10, 0.6 * rows / across, 0.6 * columns / across])
    random = np.random.default_rng(1)
    for number in range(1, count + 1):
        place = np.array([0, (number - 1) // across + 0.5, (number - 1) % across + 0.5]) / across
        centre = place * shape
        centre[0] = random.uniform(radii[0], planes - radii[0])
        low = np.maximum(np.floor(centre - radii), 0).astype(int)
        high = np.minimum(np.ceil(centre + radii) + 1, shape).astype(int)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        grids = np.ogrid[box]
        inside = sum(((grid - c) / r) ** 2 for grid, c, r in zip(grids, centre, radii, strict=True)) <= 1
        labels[box][inside] = number
    return labels


def _headers(shape: tuple[int, ...]) -> list[bytes]:
    """A CT series without pixels, each image as the bytes of its file."""
    study, series, frame_of_reference = generate_uid(), generate_uid(), generate_uid()
    found = []
    for number in range(shape[0]):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame_of_reference
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Phantom", "P", "", "O"
        ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "", "", "", "", ""
        ds.Modality, ds.Manufacturer, ds.BodyPartExamined, ds.PositionReferenceIndicator = "CT", "ACME", "CHEST", ""
        ds.Rows, ds.Columns = shape[1:]
        ds.PixelSpacing, ds.SliceThickness = ["0.75", "0.75"], "1.25"
        ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        ds.ImagePositionPatient = ["-192", "-192", f"{number * 1.25:.2f}"]
        ds.InstanceNumber = number + 1
        buffer = BytesIO()
        dcmwrite(buffer, ds, enforce_file_format=True)
        found.append(buffer.getvalue())
    return found


def _received(headers: Sequence[bytes]) -> list[Dataset]:
    return [dcmread(BytesIO(content)) for content in headers]


def _volume(labels: Labels, images: Sequence[Dataset]) -> LabelVolume:
    structure = Code(value="91723000", scheme="SCT", meaning="Anatomical Structure")
    segments = tuple(
        Segment(
            number=number,
            key=f"organ-{number}",
            label=f"Organ {number}",
            category=structure,
            type=Code(value="10200004", scheme="SCT", meaning="Liver"),
            color_rgb=(number, 255 - number, 128),
        )
        for number in range(1, int(labels.max()) + 1)
    )
    uids = tuple(str(image.SOPInstanceUID) for image in images)
    return LabelVolume(labels=labels, sop_instance_uids=uids, segments=segments)


# --- encoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Run:
    seconds: float
    grown_mb: float  # highest resident size while it ran, above the one before


def _best(encode: Callable[[], float], repeat: int) -> _Run:
    before, peak, done = _resident_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        seconds = min(encode() for _ in range(repeat))
    finally:
        done.set()
        watcher.join()
    return _Run(seconds=seconds, grown_mb=peak - before)


def _resident_mb() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _encode(encoder: SegEncoder, labels: Labels, headers: Sequence[bytes], path: Path) -> float:
    images = _received(headers)
    volume = _volume(labels, images)
    context = ResultContext(
        run_key="benchmark",
        tracking_key="benchmark",
        run_number=1,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        time_zone="+0000",
        provenance=Provenance(
            name="benchmark",
            version="1",
            manufacturer="dicom-node",
            device_uid="2.25.1",
            weights_sha256="",
            config_sha256="",
        ),
        node_name="NODE",
    )
    started = time.process_time()
    (made,) = encoder.encode([volume], images, context, [])
    made.save_as(path, enforce_file_format=True)
    return time.process_time() - started


def _highdicom(kind: str, labels: Labels, headers: Sequence[bytes], path: Path) -> float:
    images = _received(headers)
    segments = _volume(labels, images).segments
    started = time.process_time()
    algorithm = hd.AlgorithmIdentificationSequence("benchmark", dictionary.DCM.ArtificialIntelligence, "1")
    made = hd.seg.Segmentation(
        source_images=images,
        pixel_array=labels,
        segmentation_type=kind,
        segment_descriptions=[
            hd.seg.SegmentDescription(
                segment.number,
                segment.label,
                dictionary.SCT.AnatomicalStructure,
                dictionary.SCT.Liver,
                "AUTOMATIC",
                algorithm,
            )
            for segment in segments
        ],
        series_instance_uid=generate_uid(),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="dicom-node",
        manufacturer_model_name="benchmark",
        software_versions="1",
        device_serial_number="1",
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    made.save_as(path)
    return time.process_time() - started


# --- reading back ----------------------------------------------------------------------------------------------------


def _check(path: Path, labels: Labels, headers: Sequence[bytes]) -> None:
    seg = hd.seg.segread(path)
    uids = [str(image.SOPInstanceUID) for image in _received(headers)]
    numbers = [int(item.SegmentNumber) for item in seg.SegmentSequence if int(item.SegmentNumber)]
    same = True
    for start in range(0, len(uids), 50):
        read = seg.get_pixels_by_source_instance(
            uids[start : start + 50],
            segment_numbers=numbers,
            combine_segments=True,
            skip_overlap_checks=True,
            assert_missing_frames_are_empty=True,
        )
        same = same and bool((read == labels[start : start + 50]).all())
    print(f"    highdicom reads {'the same voxels' if same else 'OTHER VOXELS'}")
    tool = shutil.which("segimage2itkimage", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        print("    dcmqi: not installed")
        return
    out = path.parent / "dcmqi"
    out.mkdir(exist_ok=True)
    words = [tool, "--inputDICOM", path, "--outputDirectory", out, "--prefix", "s", "-t", "nrrd", "--mergeSegments"]
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    read = np.zeros_like(labels)
    first = next(z for z in range(len(labels)) if labels[z].any())
    for file in out.glob("*.nrrd"):
        head, data = file.read_bytes().split(b"\n\n", 1)
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines() if ": " in line)
        sizes = [int(size) for size in fields["sizes"].split()]
        kind = {"short": "<i2", "unsigned char": "u1", "uchar": "u1"}[fields["type"]]
        found = np.frombuffer(gzip.decompress(data), kind).reshape(sizes[::-1])
        read[first : first + sizes[2]] += found.astype(np.uint8)
    shutil.rmtree(out)
    print(f"    dcmqi reads {'the same voxels' if (read == labels).all() else 'OTHER VOXELS'}")


if __name__ == "__main__":
    main()
