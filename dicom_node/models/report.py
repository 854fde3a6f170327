"""What a person wants to know of a package before routing to it, its self-test included. Must not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dicom_node.errors import EngineError
from dicom_node.models.formats import describe_folder
from dicom_node.models.manifest import Manifest, SegmentationManifest
from dicom_node.models.package import MANIFEST, ModelPackage
from dicom_node.models.registry import find_package
from dicom_node.models.resample import ModelGrid
from dicom_node.models.runtime import Runtime

__all__ = ["package_report"]

_REFERENCE_SHAPE, _REFERENCE_MM = (300, 512, 512), (1.25, 0.75, 0.75)


def package_report(model: str, device: str = "auto") -> Sequence[tuple[str, str]]:
    """(heading, text) lines on the package that `model` names; its network is loaded and run on an empty input.

    Raises PackageError when the package cannot be used, EngineError when its network does not do what it promises.
    """
    package = find_package(model)
    manifest = package.manifest
    lines = [
        ("model", f"{manifest.id} {manifest.version}, {manifest.task}"),
        ("format", manifest.source.format),
        ("trust", f"{manifest.trust}: nothing in the package is executed"),
        ("weights", f"{manifest.source.path}, sha256 {manifest.source.sha256[:16]}..."),
        ("intended use", f"{manifest.intended_use.status}: {manifest.intended_use.text}"),
        ("takes", _takes(manifest)),
        ("tells", _tells(manifest)),
    ]
    folder = Path(model)
    if folder.is_dir() and not (folder / MANIFEST).exists():
        described = describe_folder(folder)
        lines[1] = ("format", f"{described.format}, read as data")
        lines += [("note", note) for note in described.notes]
    return [*lines, *_self_test(package, device)]


def _takes(manifest: Manifest) -> str:
    parts = [" or ".join(manifest.select.modality)]
    if isinstance(manifest, SegmentationManifest):
        parts.append(f"resampled to {'x'.join(f'{mm:g}' for mm in manifest.input.spacing_mm)} mm")
        parts.append(f"{manifest.input.orientation}, windows of {'x'.join(map(str, manifest.infer.window))}")
        parts.append("one regular stack of slices")
    else:
        parts.append(f"images fitted to {manifest.input.size} x {manifest.input.size}")
    return ", ".join(parts)


def _tells(manifest: Manifest) -> str:
    if isinstance(manifest, SegmentationManifest):
        return ", ".join(f"{label.index}: {label.segment.type.meaning}" for label in manifest.output.labels)
    findings = manifest.output.findings
    return ", ".join(finding.name + ("" if finding.assessed else " (not assessed)") for finding in findings)


def _self_test(package: ModelPackage, device: str) -> list[tuple[str, str]]:
    """Run the network twice on an empty input: classes, finite values, seconds, memory."""
    manifest = package.manifest
    package.check_weights()
    runtime = Runtime(device)
    shape: tuple[int, ...]
    if isinstance(manifest, SegmentationManifest):
        shape = manifest.infer.window
    else:
        shape = (1, manifest.input.size, manifest.input.size)
    try:
        for _ in range(2):  # the first pays for loading
            answer = runtime.infer(
                package,
                np.zeros(shape, np.float32),
                timeout_s=manifest.runtime.timeout_s,
                heartbeat=lambda: None,
                threads=1,
            )
        memory = _peak_mib(runtime.pid)
    finally:
        runtime.close()
    if isinstance(manifest, SegmentationManifest):
        wanted, found = max(label.index for label in manifest.output.labels) + 1, answer.output.shape[0]
    else:
        wanted, found = max(finding.index for finding in manifest.output.findings) + 1, answer.output.shape[1]
    if found < wanted:
        raise EngineError(f"self-test: the network has {found} outputs, the package names {wanted}")
    seconds = answer.seconds["forward"]
    lines = [
        ("self-test", f"passed: {found} outputs, all finite ({answer.device}, {answer.precision})"),
        ("memory", f"about {memory} MiB in the runtime process" if memory else "not known"),
    ]
    if isinstance(manifest, SegmentationManifest):
        count = _reference_windows(manifest)
        # a lone window is run as a batch of two on a CPU
        each = seconds / 2 if answer.device == "cpu" else seconds
        about = f"300 x 512 x 512: {count} windows, about {each * count:.0f} s"
        lines.append(("time", f"{each:.2f} s a window on one thread; {about}"))
    else:
        lines.append(("time", f"{seconds:.3f} s an image on one thread"))
    return lines


def _reference_windows(manifest: Manifest) -> int:
    """How many windows an abdomen of 300 x 512 x 512 takes."""
    assert isinstance(manifest, SegmentationManifest)
    x, y, z = manifest.input.spacing_mm
    shape = ModelGrid.shape_of(_REFERENCE_SHAPE, _REFERENCE_MM, (z, y, x))
    count = 1
    for length, window in zip(shape, reversed(manifest.infer.window), strict=True):
        step = max(1, int(window * (1 - manifest.infer.overlap)))
        count *= 1 + max(0, -(-(length - window) // step))
    return count


def _peak_mib(pid: int | None) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
