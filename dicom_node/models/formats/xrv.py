"""torchxrayvision's DenseNet121 checkpoints as our manifest: a folder with one weights file, as published or re-saved.

What the outputs mean and where each one's operating point lies comes from `xrv.json` beside the file, else from the
file itself, else from its name where it is one of those the library publishes. Nothing is guessed: without a source
the folder is refused. What the network was not trained for is reported as not assessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicom_node.errors import PackageError
from dicom_node.models.formats import Described, file_digest
from dicom_node.models.package import read_regular
from dicom_node.models.pickles import TensorData
from dicom_node.models.torch_files import read_pickled

__all__ = ["describe", "detect"]

NAMES = "xrv.json"
_CLASS = "torchxrayvision.models.DenseNet"
_MAX_BYTES = 256 * 1024**2  # the published ones have 28 MiB

_ALL = (
    *("Atelectasis", "Consolidation", "Infiltration", "Pneumothorax", "Edema", "Emphysema", "Fibrosis", "Effusion"),
    *("Pneumonia", "Pleural_Thickening", "Cardiomegaly", "Nodule", "Mass", "Hernia", "Lung Lesion", "Fracture"),
    *("Lung Opacity", "Enlarged Cardiomediastinum"),
)
# The operating points of the published weights by the data set in the file's name; null: not trained for that output.
_PUBLISHED: Mapping[str, tuple[float | None, ...]] = {
    "nih-pc-chex-mimic_ch-google-openi-kaggle": (
        *(0.07422872, 0.038290843, 0.09814756, 0.0098118475, 0.023601074, 0.0022490358, 0.010060724, 0.103246614),
        *(0.056810737, 0.026791653, 0.050318155, 0.023985857, 0.01939503, 0.042889766, 0.053369623, 0.035975814),
        *(0.20204692, 0.05015312),
    ),
    "nih": (
        *(0.039117552, 0.0034529066, 0.11396341, 0.0057298196, 0.00045666535, 0.0018880932, 0.012037827, 0.038744126),
        *(0.0037213727, 0.014730946, 0.016149804, 0.054241467, 0.037198864, 0.0004403434, None, None, None, None),
    ),
    "pc": (
        *(0.031012505, 0.013347598, 0.081435576, 0.001262615, 0.002587246, 0.0035944257, 0.0023071, 0.055412333),
        *(0.044385884, 0.042766232, 0.043258056, 0.037629247, 0.005658899, 0.0091741895, None, 0.026507627, None, None),
    ),
    "chex": (
        *(0.1988969, 0.05710573, None, 0.0531293, 0.1435217, None, None, 0.27212676, 0.07749717, None, 0.19712369),
        *(None, None, None, 0.09932402, 0.09273402, 0.3270967, 0.10888247),
    ),
    "kaggle": (*(None,) * 8, 0.13486601, *(None,) * 7, 0.13511065, None),
    "mimic_nb": (
        *(0.08558747, 0.011884617, None, 0.0040595434, 0.010733786, None, None, 0.118761964, 0.022924708, None),
        *(0.06358637, None, None, None, 0.022143636, 0.017476924, 0.1258702, 0.014020768),
    ),
    "mimic_ch": (
        *(0.09121389, 0.010573786, None, 0.005023008, 0.003698257, None, None, 0.08001232, 0.037242252, None),
        *(0.05006329, None, None, None, 0.019866971, 0.03823637, 0.11303808, 0.0069147074),
    ),
}
_SHORT = {"nih-pc-chex-mimic_ch-google-openi-kaggle": "all", "kaggle": "rsna"}
_PUBLISHED_SUFFIX = "-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best"

# key, name, code, and the outputs of torchxrayvision that score it (the largest counts)
_FINDINGS: Sequence[tuple[str, str, tuple[str, str, str], tuple[str, ...]]] = (
    ("tuberculosis", "Tuberculosis", ("SCT", "154283005", "Pulmonary tuberculosis"), ()),
    ("cardiomegaly", "Cardiomegaly", ("SCT", "8186001", "Cardiomegaly"), ("Cardiomegaly",)),
    (
        *("pleural_thickening", "Pleural Thickening"),
        *(("99DICOMNODE", "PLTHICK", "Pleural thickening"), ("Pleural_Thickening",)),
    ),
    ("pleural_effusion", "Pleural Effusion", ("SCT", "60046008", "Pleural effusion"), ("Effusion",)),
    ("pneumothorax", "Pneumothorax", ("SCT", "36118008", "Pneumothorax"), ("Pneumothorax",)),
    ("consolidation", "Consolidation", ("SCT", "95436008", "Lung consolidation"), ("Consolidation",)),
    ("atelectasis", "Atelectasis", ("SCT", "46621007", "Atelectasis"), ("Atelectasis",)),
    ("nodule_mass", "Nodule/Mass", ("SCT", "309529002", "Lung mass"), ("Nodule", "Mass")),
    ("fibrosis", "Fibrosis", ("SCT", "51615001", "Fibrosis of lung"), ("Fibrosis",)),
    ("infiltration", "Infiltration", ("DCM", "112121", "Infiltrate"), ("Infiltration",)),
    ("calcification", "Calcification", ("DCM", "112063", "Abnormal calcifications"), ()),
)


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Label of each output ("" where it was not trained), its operating point, and who says so."""

    labels: tuple[str, ...]
    thresholds: tuple[float | None, ...]
    told_by: str


def detect(folder: Path) -> bool:
    """Whether `folder` holds one weights file that names itself, or is named by xrv.json, torchxrayvision's."""
    weights = _weights(folder)
    if weights is None:
        return False
    if (folder / NAMES).is_file() or _published(weights) is not None:
        return True
    try:
        return _is_whole_module(_read(weights))
    except PackageError:
        return False


def describe(folder: Path) -> Described:
    """The network as our manifest. Raises PackageError when it is not known what its outputs mean."""
    weights = _weights(folder)
    if weights is None:
        raise PackageError(f"{folder}: expected one .pt or .pth file of torchxrayvision")
    outputs = _outputs(folder, weights)
    findings, unassessed = _findings(outputs)
    others = [label for label in outputs.labels if label and not any(label in names for *_, names in _FINDINGS)]
    calibrated = bool(outputs.thresholds)
    digest = file_digest(weights)
    manifest = {
        "schema": 1,
        "id": _identity(weights),
        "version": digest[:12],
        "manufacturer": "torchxrayvision",
        "task": "classification",
        "trust": "data",
        "source": {
            "format": "xrv",
            "path": weights.name,
            "sha256": digest,
            "thresholds": list(outputs.thresholds),
        },
        "intended_use": {"status": "research", "text": "Research use only.", "limits": ["frontal chest radiographs"]},
        "select": {
            "modality": ["DX", "CR"],
            "sop_class": ["DigitalXRayImageStorageForPresentation", "ComputedRadiographyImageStorage"],
            "body_part": {"any": ["CHEST"], "missing": "allow"},
            "view": {"any": ["PA", "AP"], "missing": "refuse"},
        },
        "input": {"prepare": "xrv", "size": 224, "gate": "frontal_chest"},
        # operating points lie where bf16 has two digits left
        "infer": {"batch": "auto", "precision": "fp32"},
        "output": {"activation": "none" if calibrated else "sigmoid", "findings": findings},
    }
    notes = [f"what the outputs mean is told by {outputs.told_by}"]
    if unassessed:
        notes.append(f"not trained for, so never assessed: {', '.join(unassessed)}")
    if others:
        notes.append(f"outputs without a finding of ours are not reported: {', '.join(others)}")
    if not calibrated:
        notes.append("no operating points are known: findings are present from an uncalibrated 0.5 on")
    names = (NAMES,) if (folder / NAMES).is_file() else ()
    return Described(format="xrv", manifest=manifest, files=(weights.name, *names), notes=tuple(notes))


def _weights(folder: Path) -> Path | None:
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".pt", ".pth")] if folder.is_dir() else []
    single = len(found) == 1 and found[0].is_file() and found[0].stat().st_size <= _MAX_BYTES
    return found[0] if single else None


def _published(weights: Path) -> tuple[float | None, ...] | None:
    stem = weights.stem
    return _PUBLISHED.get(stem.removesuffix(_PUBLISHED_SUFFIX)) if stem.endswith(_PUBLISHED_SUFFIX) else None


def _identity(weights: Path) -> str:
    """The library's name for published weights, else the file's own."""
    stem = weights.stem
    if _published(weights) is not None:
        data = stem.removesuffix(_PUBLISHED_SUFFIX)
        stem = f"densenet121-res224-{_SHORT.get(data, data)}"
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in stem)
    return f"xrv-{kept.strip('-.')}"[:64].rstrip("-")


def _read(weights: Path) -> Any:
    return read_pickled(read_regular(weights), str(weights))


def _is_whole_module(content: Any) -> bool:
    return isinstance(content, dict) and content.get("class") == _CLASS


def _outputs(folder: Path, weights: Path) -> _Outputs:
    if (folder / NAMES).is_file():
        return _from_names(folder / NAMES)
    content = _read(weights)
    if _is_whole_module(content):
        attributes = content["attributes"]
        labels = attributes.get("targets") or attributes.get("pathologies")
        thresholds = content["state_dict"].get("op_threshs")
        if labels and isinstance(thresholds, TensorData):
            return _checked(labels, thresholds.numbers(), "the file itself", weights)
    if (known := _published(weights)) is not None:
        labels = [label if value is not None else "" for label, value in zip(_ALL, known, strict=True)]
        return _checked(labels, known, "the file's name, one of those torchxrayvision publishes", weights)
    raise PackageError(
        f"{weights}: it is not known what the outputs mean; put {NAMES} beside it with "
        '{"labels": [...], "op_threshs": [...]}, one for each output, "" and null for untrained ones'
    )


def _from_names(path: Path) -> _Outputs:
    try:
        content = json.loads(read_regular(path, 64 * 1024).decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise PackageError(f"{path}: is no JSON: {type(exc).__name__}") from exc
    if not isinstance(content, dict) or not content.keys() <= {"labels", "op_threshs"} or "labels" not in content:
        raise PackageError(f'{path}: expected {{"labels": [...], "op_threshs": [...]}}')
    return _checked(content["labels"], content.get("op_threshs") or (), path.name, path)


def _checked(labels: Any, thresholds: Any, told_by: str, path: Path) -> _Outputs:
    """Both lists as they should be: NaN means untrained, as null does. Raises PackageError."""
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise PackageError(f"{path}: labels: expected texts, one for each output")
    if not isinstance(thresholds, list | tuple) or len(thresholds) not in (0, len(labels)):
        raise PackageError(f"{path}: op_threshs: expected one for each of the {len(labels)} labels, or none at all")
    points: list[float | None] = []
    for value in thresholds:
        number = None if value is None or (isinstance(value, float) and math.isnan(value)) else value
        if number is not None and (not isinstance(number, int | float) or not 0 < number < 1):
            raise PackageError(f"{path}: op_threshs: expected numbers between 0 and 1, or null")
        points.append(number)
    if repeated := sorted({label for label in labels if label and labels.count(label) > 1}):
        raise PackageError(f"{path}: labels: {repeated[0][:40]!r} is there twice")
    return _Outputs(tuple(labels), tuple(points), told_by)


def _findings(outputs: _Outputs) -> tuple[list[dict[str, Any]], list[str]]:
    """Our findings with their outputs, and the names of those that have none."""
    findings, unassessed = [], []
    for key, name, code, wanted in _FINDINGS:
        trained = [
            index
            for index, label in enumerate(outputs.labels)
            if label in wanted and (not outputs.thresholds or outputs.thresholds[index] is not None)
        ]
        finding: dict[str, Any] = {"key": key, "name": name, "code": list(code), "threshold": 0.5}
        if trained:
            finding["index"] = trained[0] if len(trained) == 1 else trained
        else:
            finding["assessed"] = False
            unassessed.append(name)
        findings.append(finding)
    if len(unassessed) == len(_FINDINGS):
        raise PackageError("none of the outputs' labels is a finding of a chest radiograph that is reported")
    return findings, unassessed
