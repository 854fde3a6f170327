"""What an engine of kind `leapai` can be told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dicom_node.engines._http import HttpSettings
from dicom_node.engines._leapai_answers import CONDITIONS
from dicom_node.engines.secrets import Secret

__all__ = ["LeapAiOptions"]


def _node_folder(value: Path) -> Path:
    if not value.is_absolute() or ".." in value.parts:
        raise ValueError("expected an absolute path")
    return value


def _engine_folder(value: str) -> str:
    absolute = value.startswith(("/", "\\\\")) or re.match(r"[A-Za-z]:[\\/]", value)
    if not absolute or ".." in re.split(r"[\\/]", value) or not value.isprintable():
        raise ValueError("expected an absolute path on the engine's machine, as /share/in or D:\\share\\in")
    return value.rstrip("/\\")


def _known(value: Mapping[str, float]) -> Mapping[str, float]:
    if unknown := sorted(set(value) - set(CONDITIONS)):
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(CONDITIONS)}")
    return value


class LeapAiOptions(HttpSettings):
    """`options` of an engine of kind `leapai`; those of `HttpSettings` stand beside them."""

    token: Secret
    """Where the JWT lies that the vendor issued; there is no way to renew it from here."""
    bearer: bool = False
    """Send `Authorization: Bearer <token>`; the engine's documentation wants the bare token."""
    node_folder: Annotated[Path, AfterValidator(_node_folder)]
    """The shared folder, as this node knows it. Only images on their way lie there."""
    engine_folder: Annotated[str, AfterValidator(_engine_folder)]
    """The same folder, as the engine's machine knows it."""
    file_mode: Literal["0600", "0640", "0644"] = "0640"
    """Of the images in the shared folder: the engine's user must be able to read them. Where it is to write there too
    (`bulk`, `report`), it may as the same user, as a member of the same group, or whoever it is.
    """
    bulk: bool = False
    """Hand over all images of a series at once. They are pseudonymised even for an engine on this machine, since it
    files what it finds by Patient ID."""
    heatmap: Literal["same-shape", "any-shape", "none"] = "same-shape"
    """Take the engine's heatmap as a picture: only when it has the image's proportions, whatever they are, or never."""
    report: bool = False
    """Take the engine's PDF report. It names the patient where the engine sees who it is."""
    send_identifiable: bool = False
    """Let an engine on another machine see who the patient is."""
    views: Annotated[tuple[str, ...], Field(min_length=1)] = ("PA", "AP")
    view_missing: Literal["refuse", "allow"] = "refuse"
    thresholds: Annotated[Mapping[str, Annotated[float, Field(ge=0, le=1)]], AfterValidator(_known)] = Field(
        default_factory=dict
    )
    """Confidence from which a condition counts as present, by key; where there is none the engine's own word stands."""
    token_warning_days: Annotated[float, Field(ge=0)] = 3.0
    notice: Annotated[str, Field(max_length=200)] = ""
    """Goes into every result, e.g. "research use only"."""
