"""What LeapAI CXR answers, read: the envelope, its errors as the node's, its findings as the node's values.

Knows no wire and no file. The engine's messages are never repeated: they may hold paths and, of an engine that sees
the patient, who it is; each is told in the node's own words. Nothing of an answer is believed before it was checked.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from dicom_node.anatomy_codes import PRIVATE_SCHEME, private_code
from dicom_node.engines.labels import cleaned, plain
from dicom_node.errors import EngineCrashed, EngineError, EngineRejected, EngineUnavailable
from dicom_node.values import (
    Code,
    Finding,
    Findings,
    Presence,
)

__all__ = [
    "CONDITIONS",
    "READ",
    "Prediction",
    "bulk_taken",
    "findings_of",
    "prediction_of",
    "prediction_on_disk",
    "token_accepted",
    "token_expiry",
]

READ = (200, 400, 401, 415, 500)
"""The statuses whose bodies are envelopes."""

PRESENT_FROM = 0.5  # the engine's own, as its documentation says
MAX_FINDINGS = 64

CONDITIONS: Mapping[str, tuple[str, Code]] = {
    "tuberculosis": ("Tuberculosis", Code(scheme="SCT", value="154283005", meaning="Pulmonary tuberculosis")),
    "cardiomegaly": ("Cardiomegaly", Code(scheme="SCT", value="8186001", meaning="Cardiomegaly")),
    "pleural_thickening": (
        "Pleural Thickening",
        Code(scheme=PRIVATE_SCHEME, value="PLTHICK", meaning="Pleural thickening"),
    ),
    "pleural_effusion": ("Pleural Effusion", Code(scheme="SCT", value="60046008", meaning="Pleural effusion")),
    "pneumothorax": ("Pneumothorax", Code(scheme="SCT", value="36118008", meaning="Pneumothorax")),
    "consolidation": ("Consolidation", Code(scheme="SCT", value="95436008", meaning="Lung consolidation")),
    "atelectasis": ("Atelectasis", Code(scheme="SCT", value="46621007", meaning="Atelectasis")),
    "nodule_mass": ("Nodule/Mass", Code(scheme="SCT", value="309529002", meaning="Lung mass")),
    "fibrosis": ("Fibrosis", Code(scheme="SCT", value="51615001", meaning="Fibrosis of lung")),
    "infiltration": ("Infiltration", Code(scheme="DCM", value="112121", meaning="Infiltrate")),
    "calcification": ("Calcification", Code(scheme="DCM", value="112063", meaning="Abnormal calcifications")),
}
"""Key to name and code of what the engine looks for: those of the node's own chest radiograph model."""

# --- errors ----------------------------------------------------------------------------------------------------------

_FOLDERS = "check that node_folder and engine_folder are the same folder, and that the engine may read it"
# How each message of the documentation begins, and what it means here. A setting of the node that does not fit, and
# credentials, can be mended while the job waits; what contradicts the interface needs a person.
_ERRORS: Sequence[tuple[str, type[EngineError], str]] = (
    ("token missing", EngineUnavailable, "saw no token: does a proxy between take the Authorization header away?"),
    ("token expired", EngineUnavailable, "says that its token has expired: ask the vendor for a new one"),
    ("invalid token", EngineUnavailable, "says that its token is not valid: check the token and the option bearer"),
    ("invalid path input_image_path", EngineUnavailable, f"cannot make sense of the image's path: {_FOLDERS}"),
    ("input image path does not exist", EngineUnavailable, f"does not find the image: {_FOLDERS}"),
    ("requested image is not a dicom file", EngineRejected, "does not take the image for a DICOM file"),
    ("invalid dicom image", EngineRejected, "cannot read the image's header"),
    ("patient id is empty", EngineRejected, "takes no image without a Patient ID"),
    ("invalid patient_id", EngineError, "refuses the pseudonym that stands for the patient"),
    ("input_image_path is required", EngineError, "misses input_image_path in a request that has it"),
    ("save_to_disk is required", EngineError, "misses save_to_disk in a request that has it"),
    ("invalid value for save_to_disk", EngineError, "takes false for no boolean value"),
    ("output_folder_path is required", EngineError, "wants to write to disk: it is of an older generation"),
    ("unable to create output folder", EngineUnavailable, "cannot create its output folder: check its permissions"),
    ("single inference failed", EngineCrashed, "failed on this image"),
    ("input_folder_path is required", EngineError, "misses input_folder_path in a request that should have it"),
    ("invalid path input_folder_path", EngineUnavailable, f"cannot make sense of the folder's path: {_FOLDERS}"),
    ("input folder path does not exist", EngineUnavailable, f"does not find the folder: {_FOLDERS}"),
    ("no dicom images found", EngineUnavailable, f"sees no image in the folder: {_FOLDERS}"),
    ("bulk inference failed", EngineCrashed, "failed on the folder"),
)
_BY_STATUS: Mapping[int, tuple[type[EngineError], str]] = {
    400: (EngineRejected, "refuses the image for a reason that is not in its documentation"),
    401: (EngineUnavailable, "refuses the token"),
    415: (EngineError, "takes the request for no JSON"),
    500: (EngineCrashed, "failed inside"),
}
_FAILED = (EngineError, "answered that it failed, for a reason that is not in its documentation")


def _failure(engine: str, status: int, message: str) -> EngineError:
    said = " ".join(message.split()).casefold()
    known = (row[1:] for row in _ERRORS if said.startswith(row[0]))
    kind, what = next(known, _BY_STATUS.get(status, _FAILED))
    if status == 401 and not issubclass(kind, EngineUnavailable):
        kind, what = _BY_STATUS[401]
    error = kind(f"engine {engine}: it {what}")
    error.http_status = status
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Envelope:
    result: str
    content: Any
    message: str


def _opened(engine: str, status: int, body: bytes) -> _Envelope:
    """The envelope of an answer that is no failure. Raises the error it stands for."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    envelope = told if isinstance(told, Mapping) else {}
    message = envelope.get("Message")
    message = message if isinstance(message, str) else ""
    result = envelope.get("Result")
    if status != 200 or result == "Failure":
        raise _failure(engine, status, message)
    if result not in ("Success", "Warning"):
        raise EngineError(f"engine {engine}: it answered something that is not its interface: no known Result")
    return _Envelope(result=str(result), content=envelope.get("Data"), message=message)


def token_accepted(engine: str, status: int, body: bytes) -> None:
    """Read the answer to an empty request: it must miss a field, which it says only once the token was accepted.

    Raises the error that is in the way.
    """
    try:
        _opened(engine, status, body)
    except EngineRejected:
        return  # a 400 of another wording is past the token too
    except EngineError as exc:
        if status == 400:
            return
        raise exc
    raise EngineError(f"engine {engine}: it took an empty request for one")


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """One entry of `findings`."""

    name: str
    presence: bool
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the engine said of one image. `result` is its word for all of it, `remark` why it warns, `heatmap` what it
    answered under that name: a picture in base64 where it was not to write to disk.
    """

    result: str
    findings: tuple[_Told, ...]
    model_version: str
    remark: str
    heatmap: object = field(default=None, repr=False)


def prediction_of(engine: str, status: int, body: bytes, *, sop_instance_uid: str) -> Prediction:
    """The answer to a single inference on the image that was sent as `sop_instance_uid`.

    Raises EngineUnavailable, EngineRejected, EngineCrashed or EngineError as the engine's documentation has it, and
    EngineError for what is not its interface or is about another image.
    """
    return _prediction(engine, _opened(engine, status, body), sop_instance_uid)


def prediction_on_disk(engine: str, body: bytes, *, sop_instance_uid: str) -> Prediction:
    """The same from a `predictions.json` the engine wrote: Data of an answer, with or without its envelope."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        raise EngineError(f"engine {engine}: the predictions it wrote are no JSON") from None
    if isinstance(told, Mapping) and "Result" in told:
        return _prediction(engine, _opened(engine, 200, body), sop_instance_uid)
    return _prediction(engine, _Envelope(result="Success", content=told, message=""), sop_instance_uid)


def bulk_taken(engine: str, status: int, body: bytes) -> str:
    """Read the answer to a bulk inference; why it warns, '' when it does not. Raises as `prediction_of` does.

    Which images it left out it does not say: what it wrote for each is all there is.
    """
    envelope = _opened(engine, status, body)
    if envelope.result != "Warning":
        return ""
    return "the engine flagged its answer for the whole series with a warning" + _quoted(envelope.message)


def _prediction(engine: str, envelope: _Envelope, sop_instance_uid: str) -> Prediction:
    if not isinstance(envelope.content, Mapping):
        raise EngineError(f"engine {engine}: it answered without Data: is it of an older generation?")
    metadata = envelope.content.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    about = str(metadata.get("sop_instance_uid") or "").strip(" \0")
    if about and about != sop_instance_uid:
        raise EngineError(f"engine {engine}: its answer is about another image than the one it was given")
    remark = ""
    if envelope.result == "Warning":
        remark = "the engine flagged its answer with a warning" + _quoted(envelope.message)
    return Prediction(
        result=cleaned(str(envelope.content.get("result") or "")),
        findings=_told(engine, envelope.content.get("findings")),
        model_version=cleaned(str(metadata.get("model_version") or "")) or "unknown",
        remark=remark,
        heatmap=envelope.content.get("heatmap"),
    )


def _quoted(message: str) -> str:
    """A message that goes into the patient's own report, and nowhere else."""
    text = cleaned(message)
    return f': "{text}"' if text else ""


def _told(engine: str, entries: Any) -> tuple[_Told, ...]:
    if not isinstance(entries, list) or len(entries) > MAX_FINDINGS:
        raise EngineError(f"engine {engine}: its findings are no list of at most {MAX_FINDINGS}")
    told = [_entry(engine, entry) for entry in entries]
    names = [_squeezed(one.name) for one in told]
    if len(set(names)) != len(names):
        raise EngineError(f"engine {engine}: it named a finding twice")
    return tuple(told)


def _entry(engine: str, entry: Any) -> _Told:
    wrong = EngineError(f"engine {engine}: a finding has no name, presence (true or false) and confidence (0 to 1)")
    if not isinstance(entry, Mapping):
        raise wrong
    name, presence, confidence = entry.get("name"), entry.get("presence"), entry.get("confidence")
    if not isinstance(name, str) or not _squeezed(name) or not isinstance(presence, bool):
        raise wrong
    if not isinstance(confidence, int | float) or isinstance(confidence, bool) or not 0 <= confidence <= 1:
        raise wrong  # a NaN too: it compares false
    return _Told(name=cleaned(name), presence=presence, confidence=float(confidence))


def findings_of(
    prediction: Prediction, sop_instance_uid: str, thresholds: Mapping[str, float], notes: Sequence[str]
) -> Findings:
    """Every condition of `CONDITIONS` in its order, then what else the engine named.

    A condition the engine did not speak of is undetermined, for it may not have looked. `thresholds` by key: where
    there is one it decides from the confidence, elsewhere the engine's own word stands; its threshold is told where
    the documented one explains that word.
    """
    told = {_squeezed(one.name): one for one in prediction.findings}
    items = [
        _finding(key, name, code, told.pop(_squeezed(name), None), thresholds.get(key))
        for key, (name, code) in CONDITIONS.items()
    ]
    silent = sum(item.presence is Presence.UNDETERMINED for item in items)
    items += [_finding(_slug(one.name), one.name, _private(one.name), one, None) for one in told.values()]
    remarks = (
        f"the engine's word for the image: {prediction.result}" if prediction.result else "",
        f"the engine said nothing of {silent} of the {len(CONDITIONS)} conditions" if silent else "",
        prediction.remark,
    )
    kept = (*notes, *(remark for remark in remarks if remark))
    return Findings(sop_instance_uid=sop_instance_uid, items=tuple(items), notes=kept)


def _finding(key: str, name: str, code: Code, told: _Told | None, threshold: float | None) -> Finding:
    if told is None:
        return Finding(key=key, name=name, code=code, presence=Presence.UNDETERMINED, confidence=None)
    present = told.presence if threshold is None else told.confidence >= threshold
    if threshold is None and (told.confidence >= PRESENT_FROM) is told.presence:
        threshold = PRESENT_FROM
    presence = Presence.PRESENT if present else Presence.ABSENT
    return Finding(key=key, name=name, code=code, presence=presence, confidence=told.confidence, threshold=threshold)


def _squeezed(name: str) -> str:
    """The engine's generations spell differently: "Nodule/Mass" and "Nodule Mass" are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _slug(name: str) -> str:
    """Prefixed: it must never be taken for a key of the node's."""
    return "leapai_" + (re.sub(r"[^a-z0-9]+", "_", plain(name)).strip("_")[:48] or _private(name).value[1:].lower())


def _private(name: str) -> Code:
    return private_code(plain(name), name)


# --- the token -------------------------------------------------------------------------------------------------------


def token_expiry(token: str) -> datetime | None:
    """When a JWT ends (`exp`, RFC 7519 4.1.4), None when it does not say. Its signature is the engine's to check."""
    parts = token.split(".")
    try:
        padded = parts[1] + "=" * (-len(parts[1]) % 4)
        claims = json.loads(base64.urlsafe_b64decode(padded))
        return datetime.fromtimestamp(claims["exp"], UTC)
    except (LookupError, TypeError, ValueError, OverflowError, OSError, RecursionError, binascii.Error):
        return None
