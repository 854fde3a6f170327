"""What an engine of kind `dicom` can be told."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from dicom_node.config import EngineSettings, TlsClientSettings, UserSettings
from dicom_node.engines._settings import Options, Seconds, parse_options
from dicom_node.settings import AeTitle

__all__ = ["DicomEngineOptions", "dicom_options"]


def _host(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9:._-]{1,253}", value):
        raise ValueError("expected a host name or an address")
    return value


def _uid(value: str) -> str:
    if not re.fullmatch(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+", value) or len(value) > 64:  # PS3.5 9.1
        raise ValueError("expected a UID")
    return value


def _modality(value: str) -> str:
    if not re.fullmatch(r"[A-Z0-9_ ]{1,16}", value):  # CS, PS3.5 table 6.2-1
        raise ValueError("expected a modality, as SEG or SR")
    return value


class DicomEngineOptions(Options):
    """`options` of an engine of kind `dicom`: an AE that takes C-STORE and answers by C-STORE."""

    ae_title: AeTitle
    host: Annotated[str, AfterValidator(_host)]
    port: Annotated[int, Field(ge=1, le=65535)]
    calling_ae_title: AeTitle | None = None
    """Under which title the node sends; null = its first."""
    tls: bool | TlsClientSettings = False
    """As of a destination."""
    user: UserSettings | None = None
    """As which user the node comes, as of a destination; null = as none."""
    returns_from: tuple[AeTitle, ...] = ()
    """AE titles its answers come from; empty: the one it is sent to. What they send is never analysed as an image."""
    send_identifiable: bool = False
    """Let an engine on another machine see who the patient is."""
    modalities: tuple[Annotated[str, AfterValidator(_modality)], ...] = ()
    sop_classes: tuple[Annotated[str, AfterValidator(_uid)], ...] = ()
    """Only such objects are its answer, others are kept and are no result; empty = any."""
    count: Annotated[int, Field(ge=1, le=5000)] | None = None
    """So many objects make the answer, and no time is waited after the last; null: `quiet_s` decides."""
    quiet_s: Annotated[float, Field(ge=0)] = 30.0
    """The answer is whole when nothing has come for so long."""
    answer_within_s: Seconds | None = None
    """A job without its whole answer so long after the sending is given up; null = `jobs.deadline_s` alone."""
    poll_s: Seconds = 5.0
    """How often is looked for the answer at first; later less often."""
    poll_max_s: Seconds = 60.0
    unreferenced: Literal["refuse", "take"] = "refuse"
    """Objects that refer to no image (a secondary capture, a PDF): `take` them by study and time alone."""
    max_objects: Annotated[int, Field(ge=1, le=5000)] = 1000
    """Of one answer."""
    max_copied_bytes: Annotated[int, Field(gt=0)] = 1024**3
    """Of one answer whose UIDs must be mapped back, which takes as much memory."""

    @property
    def return_titles(self) -> tuple[str, ...]:
        """AE titles its answers come from."""
        return self.returns_from or (self.ae_title,)


def dicom_options(name: str, settings: EngineSettings) -> DicomEngineOptions:
    """The options of engine `name`. Raises ConfigError naming the key."""
    return parse_options(DicomEngineOptions, name, settings.options)
