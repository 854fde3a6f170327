"""What a run made, from the platform's files to values: fetched, checked, read, and said where it could not be."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dicom_node.engines._aignostics_options import PlatformOptions
from dicom_node.engines._aignostics_platform import Platform
from dicom_node.engines._aignostics_told import Artifact, Item, Note, Run, word
from dicom_node.engines._class_map import Colour
from dicom_node.engines._http import Checksum, WrongChecksum
from dicom_node.engines.slide_answers import Matrix, annotations_of, quantities_of, slide_labels_of
from dicom_node.errors import EngineError, EngineTimeout, EngineUnavailable
from dicom_node.model import EngineTask
from dicom_node.values import Annotations, Quantities, SlideLabels

__all__ = ["Outputs", "Value"]

log = logging.getLogger(__name__)

_GONE = (404, 410)
_GEOJSON = ("application/geo+json", "application/vnd.geo+json")

Value = Annotations | SlideLabels | Quantities


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Fetches the outputs of one item and reads them. `left_s`: what is left of the time, raises when nothing is."""

    name: str
    platform: Platform
    options: PlatformOptions
    task: EngineTask
    note: Note
    left_s: Callable[[], float]

    def values(self, run: Run, item: Item, folder: Path) -> tuple[Value, ...]:
        """Every output that can be said in DICOM, each with notes of what could not be.

        Files lie in `folder` afterwards; one that lies there already is not fetched again. Raises EngineError when
        nothing at all came of the run, EngineUnavailable for what may be fetched later.
        """
        notes = [*self.note.said, *_ending(run, item)]
        fetched: list[tuple[Artifact, Path]] = []
        for artifact in item.output_artifacts:
            if self._is_wanted(artifact):
                path, reason = self._fetched(run, artifact, folder)
                fetched += [(artifact, path)] if path is not None else []
                notes += [reason] if reason else []
        values: list[Value] = []
        for artifact, path in fetched:  # once all are here: what may fail and come again is over
            value, reason = self._value(path, artifact)
            values += [value] if value is not None else []
            notes += [reason] if reason else []
        if not values:
            raise EngineError(
                f"engine {self.name}: nothing of run {run.run_id} could be taken: {'; '.join(notes) or 'no outputs'}"
            )
        return tuple(replace(value, notes=(*value.notes, *notes)) for value in values)

    def _is_wanted(self, artifact: Artifact) -> bool:
        return any(fnmatchcase(artifact.name, pattern) for pattern in self.options.outputs)

    def _fetched(self, run: Run, artifact: Artifact, folder: Path) -> tuple[Path | None, str]:
        """Where its file lies, None when it cannot be had any more; and what is to be said of it."""
        name, path = _name(artifact), folder / artifact.output_artifact_id
        if artifact.output.startswith("DELETED"):
            return None, f"output {name} is deleted on the platform ({word(artifact.output)})"
        if artifact.output not in ("AVAILABLE", "FULL"):
            return None, f"output {name} was not made ({word(artifact.error_code)})"
        try:
            announced = _checksum(artifact.metadata)
            if not path.is_file():
                self.platform.download(run.run_id, artifact, path, announced, self.left_s())
        except WrongChecksum as exc:  # the run is paid for: worth more than the few tries of a job
            raise EngineUnavailable(f"engine {self.name}: output {name}: {exc}") from exc
        except (EngineUnavailable, EngineTimeout):
            raise
        except EngineError as exc:
            if exc.http_status in _GONE:
                return None, f"output {name} is deleted on the platform (status {exc.http_status})"
            return None, f"output {name} could not be fetched: {exc}"
        return path, "" if announced else f"output {name} came without a checksum"

    def _value(self, path: Path, artifact: Artifact) -> tuple[Value | None, str]:
        """What its file says, or why nothing can be taken from it; the file is then in the quarantine."""
        name = _name(artifact)
        try:
            value = self._read(path, artifact)
        except (EngineUnavailable, EngineTimeout):
            raise
        except EngineError as exc:
            return None, self._kept(path, name, str(exc))
        if value is None:
            return None, self._kept(path, name, f"nothing in DICOM says what is of type {word(_type(artifact))}")
        return replace(value, notes=(f"from the engine's output {name}", *value.notes)), ""

    def _kept(self, path: Path, name: str, reason: str) -> str:
        kept = self.task.quarantine(path, f"output {name}: {reason}")
        log.info("an output was not taken", extra={"engine": self.name, "job": self.task.job_id, "kept": kept})
        where = f"; the file is in the quarantine as {kept}" if kept else ""
        return f"output {name} not taken: {reason}{where}"

    def _read(self, path: Path, artifact: Artifact) -> Value | None:
        """None for a type nothing here reads. Raises EngineError for what does not fit."""
        note = self.note
        matrix = Matrix(sop_instance_uid=note.sop_instance_uid, columns=note.columns, rows=note.rows)
        beat = self._beat
        kind = _type(artifact)
        if kind in _GEOJSON or (kind == "application/json" and _is(artifact, "geojson")):
            return annotations_of(path, matrix, labels=self.options.labels, heartbeat=beat)
        if kind == "image/tiff":
            colours = _colours(artifact.metadata)
            return slide_labels_of(path, matrix, colours=colours, labels=self.options.labels, heartbeat=beat)
        if kind == "text/csv":
            return quantities_of(path, (note.sop_instance_uid,))
        return None

    def _beat(self) -> None:
        self.left_s()


def _ending(run: Run, item: Item) -> Sequence[str]:
    """What of the run's end a reader of the result must know."""
    said = []
    if item.termination_reason != "SUCCEEDED":
        said.append(f"the slide was not processed to its end ({word(item.termination_reason)}): outputs are partial")
    if (run.termination_reason or "").startswith("CANCELED"):
        said.append(f"the run was cancelled ({word(run.termination_reason)}, {word(run.error_code)})")
    return said


def _name(artifact: Artifact) -> str:
    """For messages: one line of at most 80 characters."""
    return "".join(letter for letter in artifact.name[:80] if letter.isprintable()) or "without a name"


def _is(artifact: Artifact, what: str) -> bool:
    return what in artifact.name.lower()


def _type(artifact: Artifact) -> str:
    told = artifact.metadata or {}
    for key in ("media_type", "media-type", "mime_type", "mime-type"):
        if isinstance(told.get(key), str):
            return str(told[key]).partition(";")[0].strip().lower()
    for part, kind in (("geojson", "application/geo+json"), ("tiff", "image/tiff"), ("csv", "text/csv")):
        if _is(artifact, part):
            return kind
    return ""


def _checksum(metadata: Mapping[str, Any] | None) -> Checksum | None:
    """The announced CRC32C, whatever its key is called. Raises EngineError when it is none."""
    for key, value in (metadata or {}).items():
        if "crc32c" in key.lower() and isinstance(value, str) and value:
            return Checksum.crc32c(value)
    return None


def _colours(metadata: Mapping[str, Any] | None) -> dict[str, Colour]:
    told = (metadata or {}).get("class_colors")
    colours: dict[str, Colour] = {}
    for name, shade in told.items() if isinstance(told, Mapping) else ():
        fit = isinstance(shade, list) and len(shade) == 3 and all(_is_byte(part) for part in shade)
        if not fit or not re.search(r"\S", str(name)):
            raise EngineError("the colours of a class map's classes are not told as three numbers each")
        colours[str(name)] = (shade[0], shade[1], shade[2])
    return colours


def _is_byte(part: Any) -> bool:
    return isinstance(part, int) and not isinstance(part, bool) and 0 <= part <= 255
