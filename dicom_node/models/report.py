"""What a person wants to know of a package before routing to it, its self-test included. Must not import torch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import PackageError
from dicom_node.models.grid import ModelGrid
from dicom_node.models.library import Library, Pin
from dicom_node.models.manifest import ClassificationManifest, IntensityBlock, Manifest, SegmentationManifest
from dicom_node.models.package import ModelPackage
from dicom_node.models.registry import embedded_ids, embedded_package, find_package, open_folder, opened
from dicom_node.models.runtime import Limits, Runtime
from dicom_node.models.segment import volume_job
from dicom_node.models.source import PythonSource

__all__ = ["HEADINGS", "SelfTest", "listed_models", "package_report", "self_test"]

_REFERENCE_SHAPE, _REFERENCE_MM = (300, 512, 512), (1.25, 0.75, 0.75)
_WHOLE = (64, 64, 64)  # what is tried of a network that takes a volume whole
_TRUST = {
    "data": "data: nothing in the package is executed",
    "graph": "graph: a graph of operations, run only in the contained runtime process",
    "code": "code: Python of the package, run in the contained runtime process once jobs.trusted_code has its sha256",
}
HEADINGS = ("ID", "VERSION", "FORMAT", "TRUST", "TASK", "ENABLED", "STATUS", "WEIGHTS", "ENGINES", "WHERE")

Lines = list[tuple[str, str]]


# --- the list


def listed_models(models_dir: Path, engines: Mapping[str, str]) -> list[tuple[str, ...]]:
    """A row under `HEADINGS` for each embedded and installed version, and each package that engines run elsewhere.

    `engines`: what each engine names as its model. A package that cannot be read says so in its row.
    """
    library = Library(models_dir)
    state, rows, shown = library.state(), [], set[str]()

    def users(model_id: str, version: str, meant: bool) -> str:
        names = {f"{model_id}@{version}", *([model_id] if meant else [])}
        found = [engine for engine, model in engines.items() if model in names]
        shown.update(found)
        return ", ".join(found) or "-"

    for model_id in embedded_ids():
        package = embedded_package(model_id)
        used = users(model_id, package.manifest.version, True)
        rows.append(_row(package, "", "disabled" if state.of(model_id).disabled else "yes", used, "embedded"))
    for model_id in library.ids():
        decided = state.of(model_id)
        for version in library.versions(model_id):
            meant = decided.enabled == version
            answer = "no" if not meant else "disabled" if decided.disabled else "yes"
            used, where = users(model_id, version, meant), str(library.folder(model_id, version))
            try:
                package, pin = library.load(model_id, version), library.pin(model_id, version)
            except PackageError:
                rows.append((model_id, version, "-", "-", "-", answer, "damaged", "-", used, where))
            else:
                rows.append(_row(package, pin.format, answer, used, where))
    return rows + [_elsewhere(engine, model) for engine, model in engines.items() if engine not in shown]


def _elsewhere(engine: str, model: str) -> tuple[str, ...]:
    """The row of an engine's model that is neither embedded nor installed: its own folder, or nothing."""
    try:
        found = open_folder(Path(model))
    except PackageError:
        return ("-", "-", "-", "-", "-", "-", "not found", "-", engine, model)
    return _row(found.package, found.foreign.format if found.foreign else "", "yes", engine, model)


def _row(package: ModelPackage, origin: str, enabled: str, engines: str, where: str) -> tuple[str, ...]:
    manifest = package.manifest
    source = manifest.source.format
    return (
        *(manifest.id, manifest.version),
        source if origin in ("", source) else f"{origin} ({source})",
        *(manifest.trust, manifest.task, enabled),
        *(manifest.intended_use.status, package.weights_sha256[:12], engines, where),
    )


# --- the report


@dataclass(frozen=True, slots=True)
class _Subject:
    package: ModelPackage
    format: str
    notes: tuple[str, ...]
    pin: Pin | None


@contextmanager
def _subject(model: str, models_dir: Path | None) -> Iterator[_Subject]:
    """What `model` names: an installed or embedded package, a folder, a zip or a file."""
    path = Path(model)
    if model and path.exists() and (path.is_file() or not _is_named(model, models_dir)):
        with (
            tempfile.TemporaryDirectory(prefix="dicom-node-model-") as scratch,
            opened(path, Path(scratch)) as found,
        ):
            foreign = found.foreign
            told = foreign.format if foreign else found.package.manifest.source.format
            yield _Subject(found.package, told, tuple(foreign.notes) if foreign else (), None)
        return
    package = find_package(model, models_dir)
    pin = None
    if models_dir is not None and package.folder.is_relative_to(models_dir):
        pin = Library(models_dir).pin(package.manifest.id, package.manifest.version)
    told = pin.format if pin else package.manifest.source.format
    yield _Subject(package, told, pin.notes if pin else (), pin)


def _is_named(model: str, models_dir: Path | None) -> bool:
    name = model.partition("@")[0]
    return name in embedded_ids() or (models_dir is not None and bool(Library(models_dir).versions(name)))


def package_report(
    model: str,
    device: str = "auto",
    models_dir: Path | None = None,
    *,
    run: bool = True,
    trusted_code: Collection[str] = (),
) -> Sequence[tuple[str, str]]:
    """(heading, text) lines on the package that `model` names; with `run`, its network runs on an empty input.

    `model`: an id (see `registry.find_package`), or a folder, zip or file that need not be installed. Raises
    PackageError when the package cannot be used or its weights are not those of its manifest, and what `self_test`
    raises.
    """
    with _subject(model, models_dir) as subject:
        package = subject.package
        manifest = package.manifest
        source = manifest.source.format
        lines = [
            ("model", f"{manifest.id} {manifest.version}, {manifest.task}"),
            ("format", f"{subject.format}, its configuration read as data" if subject.format != source else source),
            ("trust", _TRUST[manifest.trust]),
        ]
        if subject.format != source:
            lines.append(("network", f"kept as {source}"))
        lines += [("weights", f"{file.path}, sha256 {file.sha256[:16]}...") for file in package.weights_files]
        if isinstance(manifest.source, PythonSource):
            lines.append(("code", f"{manifest.source.code.path}, sha256 {manifest.source.code.sha256}"))
        if subject.pin:
            lines.append(("installed", f"{package.folder}, self-test at import {subject.pin.self_test}"))
        use = manifest.intended_use
        lines.append(("intended use", f"{use.status}: {use.text}"))
        lines += [("limit", text) for text in use.limits]
        lines += _needs(manifest)
        lines.append(("tells", _tells(manifest)))
        lines += [("note", note) for note in subject.notes]
        package.check_weights()
        return [*lines, *(_tested(package, device, trusted_code, models_dir) if run else [("self-test", "not run")])]


def _needs(manifest: Manifest) -> Lines:
    if isinstance(manifest, SegmentationManifest):
        return _volume_needs(manifest)
    gate = ", only what is recognised as a frontal chest film" if manifest.input.gate == "frontal_chest" else ""
    size = manifest.input.size
    takes = f"{_selected(manifest)}, images fitted to {size} x {size}{gate}"
    return [("takes", takes), ("values", f"prepared as {manifest.input.prepare}")]


def _volume_needs(manifest: SegmentationManifest) -> Lines:
    wanted, infer, geometry = manifest.input, manifest.infer, manifest.select.geometry
    windows = f"windows of {_by(infer.window)}, overlap {infer.overlap:g}" if infer.window else "the whole volume"
    if infer.mirror:
        windows += f", mirrored along {len(infer.mirror)} axes ({2 ** len(infer.mirror)} passes)"
    takes = f"{_selected(manifest)}, resampled to {_by(wanted.spacing_mm)} mm, {wanted.orientation}, {windows}"
    stack = [f"at least {geometry.min_slices} slices"]
    stack += [f"{geometry.orientation} slices"] if geometry.orientation else []
    stack += [f"at most {geometry.max_spacing_mm:g} mm apart"] if geometry.max_spacing_mm else []
    stack += [f"at least {geometry.min_coverage_mm:g} mm long"] if geometry.min_coverage_mm else []
    policy = {
        "require": "an irregular stack is refused",
        "repair": "an irregular stack is repaired, and the result says how",
    }
    units = {"hu": "Hounsfield units only", "any": "the modality's own values"}[wanted.values]
    crop = ""
    if wanted.crop is not None:
        kept = "not 0" if wanted.crop.nonzero else f"above {wanted.crop.above:g}"
        crop = f"; cut to what is {kept}, {wanted.crop.margin} voxels around"
    crop += ", before all else; resampled last" if wanted.first == "crop" else ""
    return [
        ("takes", takes),
        ("geometry", f"{', '.join(stack)}; {policy[geometry.regular]}"),
        ("values", f"{units}; {_intensity(manifest)}{crop}"),
    ]


def _selected(manifest: Manifest) -> str:
    select = manifest.select
    parts = [" or ".join(select.modality)]
    for name, block in (("of", select.body_part), ("view", select.view)):
        if block is not None:
            parts.append(f"{name} {' or '.join(block.any)}{' or not said' if block.missing == 'allow' else ''}")
    return " ".join(parts)


def _intensity(manifest: SegmentationManifest) -> str:
    intensity = manifest.input.intensity
    if isinstance(intensity, IntensityBlock):
        return f"{_range(intensity.clip)} mapped to {_range(intensity.to)}"
    told = []
    for step in intensity:
        if step.range is not None:
            held = ", held at the ends" if step.range.clip else ""
            told.append(f"{_range(step.range.source)} mapped to {_range(step.range.to)}{held}")
        elif step.clip is not None:
            told.append(f"held within {_range(step.clip)}")
        elif step.minmax is not None:
            told.append(f"lowest to highest mapped to {_range(step.minmax.to)}")
        elif step.normalize is not None:
            fixed = step.normalize.mean is not None or step.normalize.std is not None
            whose = "the model's" if fixed else "the volume's own"
            told.append(f"normalized by {whose} mean and deviation{', zeros aside' * step.normalize.nonzero}")
    return ", then ".join(told) or "as they are"


def _range(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g}..{ends[1]:g}"


def _by(sizes: Sequence[float]) -> str:
    return "x".join(f"{size:g}" for size in sizes)


def _tells(manifest: Manifest) -> str:
    if isinstance(manifest, SegmentationManifest):
        labels = manifest.output.labels
        return ", ".join(f"{label.index}: {label.name or label.segment.type.meaning}" for label in labels)
    findings = manifest.output.findings
    return ", ".join(finding.name + ("" if finding.assessed else " (not assessed)") for finding in findings)


# --- the self-test


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """How a network did on an empty input: a lone window, or a lone image. `seconds` of the second run."""

    outputs: int
    device: str
    precision: str
    windows: int
    seconds: float
    memory_mib: int


def self_test(
    package: ModelPackage,
    device: str = "auto",
    trusted_code: Collection[str] = (),
    models_dir: Path | None = None,
) -> SelfTest:
    """Load the network in a runtime process of its own and run it twice on an empty input, after its first try there.

    Raises PackageError, EngineError and their like when it does not do what the package promises: its outputs too few,
    of another shape or no numbers; too long.
    """
    manifest = package.manifest
    array, job = _empty(manifest)
    hidden = str(models_dir.absolute()) if models_dir is not None else ""
    limits = Limits(trusted_code=frozenset(trusted_code), models_dir=hidden)
    runtime = Runtime(device, limits=limits)
    try:
        for _ in range(2):  # the first pays for loading
            answer = runtime.infer(
                package,
                array,
                job=job,
                timeout_s=manifest.runtime.timeout_s,
                heartbeat=lambda: None,
                threads=1,
            )
        memory = _peak_mib(runtime.pid)
    finally:
        runtime.close()
    return SelfTest(
        outputs=answer.outputs,
        device=answer.device,
        precision=answer.precision,
        windows=answer.windows,
        seconds=answer.seconds["forward"],
        memory_mib=memory,
    )


def _empty(manifest: Manifest) -> tuple[npt.NDArray[np.float32] | npt.NDArray[np.int16], dict[str, Any]]:
    """An input without content, and what the runtime is told of it: one image, or one window on the network's grid."""
    if isinstance(manifest, ClassificationManifest):
        return np.zeros((1, manifest.input.size, manifest.input.size), np.float32), {
            "activation": manifest.output.activation
        }
    x, y, z = manifest.infer.window or _WHOLE
    return np.zeros((x, y, z), np.int16), volume_job(manifest, ModelGrid.same((x, y, z), manifest.input.spacing_mm))


def _tested(package: ModelPackage, device: str, trusted_code: Collection[str], models_dir: Path | None) -> Lines:
    manifest, done = package.manifest, self_test(package, device, trusted_code, models_dir)
    lines = [("self-test", f"passed: {done.outputs} outputs, all finite ({done.device}, {done.precision})")]
    if isinstance(manifest, SegmentationManifest):
        return lines + _volume_estimates(manifest, done)
    memory = f"about {done.memory_mib} MiB in the runtime process" if done.memory_mib else "not known"
    return [*lines, ("memory", memory), ("time", f"{done.seconds:.3f} s an image {_on(done)}")]


def _volume_estimates(manifest: SegmentationManifest, done: SelfTest) -> Lines:
    """What an abdomen of 300 x 512 x 512 would take, from one window."""
    x, y, z = manifest.input.spacing_mm
    shape = ModelGrid.shape_of(_REFERENCE_SHAPE, _REFERENCE_MM, (z, y, x))
    window = manifest.infer.window
    batch = manifest.infer.batch
    together = batch if isinstance(batch, int) else 2 if done.device == "cpu" else 1  # as `forward` runs a lone window
    each = done.seconds / together
    if window is None:  # by volume, from what was tried
        count, each = 1, each * math.prod(shape) / math.prod(_WHOLE)
    else:
        count = math.prod(
            1 + max(0, -(-(length - size) // max(1, int(size * (1 - manifest.infer.overlap)))))
            for length, size in zip(shape, reversed(window), strict=True)
        )
    # images in, labels out; on the network's grid values, weights, twice each class (measured: within 10 % for 12)
    more = math.prod(_REFERENCE_SHAPE) * 3 + math.prod(shape) * 4 * (2 * done.outputs + 3)
    least = f"about {done.memory_mib} MiB in the runtime process for one window" if done.memory_mib else "not known"
    what = f"{' x '.join(map(str, _REFERENCE_SHAPE))}: {count} windows"
    return [
        ("memory", f"{least}, {more >> 20} MiB more for a series of {' x '.join(map(str, _REFERENCE_SHAPE))}"),
        ("time", f"{each:.2f} s a window {_on(done)}; {what}, about {each * count:.0f} s"),
    ]


def _on(done: SelfTest) -> str:
    return "on one thread" if done.device == "cpu" else f"on {done.device}"


def _peak_mib(pid: int | None) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
