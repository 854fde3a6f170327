"""The folder that node and LeapAI share: one image lies in it for as long as the engine looks at it.

Both sides know it under their own name. Files carry UIDs of one job as their names and appear whole.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dicom_node.engines._leapai_options import LeapAiOptions
from dicom_node.engines.outgoing import Sent, write_outgoing
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.errors import ConfigError, EngineUnavailable
from dicom_node.interfaces import Heartbeat
from dicom_node.model import StoredInstance

__all__ = ["SharedFolder"]

log = logging.getLogger(__name__)

_FILE = re.compile(r"2\.25\.[0-9]{1,39}\.dcm")
_MODES = {"0600": 0o600, "0640": 0o640, "0644": 0o644}


class SharedFolder:
    """`node_folder` here, `engine_folder` there. Thread-safe for files of different names."""

    def __init__(self, engine: str, options: LeapAiOptions) -> None:
        self._engine = engine
        self._here = options.node_folder
        self._there = options.engine_folder
        self._mode = _MODES[options.file_mode]

    def check(self) -> None:
        """Raise ConfigError unless the node may write to it."""
        if not self._here.is_dir() or not os.access(self._here, os.W_OK | os.X_OK):
            key = f"engines.{self._engine}.options.node_folder"
            raise ConfigError(f"{key}: {self._here} is no folder the node may write to; make or mount it")

    def path_there(self, name: str) -> str:
        """A file's absolute path on the engine's machine, which may be a Windows one."""
        separator = "\\" if "\\" in self._there else "/"
        return f"{self._there}{separator}{name}"

    @contextmanager
    def handed_over(
        self, instance: StoredInstance, name: str, pseudonyms: Pseudonyms | None, heartbeat: Heartbeat
    ) -> Iterator[Sent]:
        """The image lies there as `name` for as long as the block lasts; with `pseudonyms` without identification.

        Raises EngineUnavailable when the folder cannot be used, and as `outgoing.write_outgoing` does.
        """
        path = self._here / name
        part = path.with_suffix(".part")
        try:
            try:
                part.unlink(missing_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                with os.fdopen(os.open(part, flags, self._mode), "wb") as target:
                    with suppress(OSError):  # network shares have modes of their own
                        os.fchmod(target.fileno(), self._mode)
                    sent = write_outgoing(instance, target, pseudonyms, heartbeat=heartbeat)
                os.replace(part, path)
            except OSError as exc:
                raise self._unusable(exc) from exc
            yield sent
        finally:
            self.remove(name)

    def remove(self, names: str, *, must: bool = False) -> None:
        """Remove the files `names` has a line for; its other lines say other things, and a missing file is fine.

        What cannot be removed is logged; with `must` EngineUnavailable is raised as well.
        """
        for name in filter(_FILE.fullmatch, names.splitlines()):
            path = self._here / name
            try:
                path.with_suffix(".part").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            except OSError as exc:
                log.warning("a file stays in a shared folder", extra={"engine": self._engine, "file": name})
                if must:
                    raise self._unusable(exc) from exc

    def _unusable(self, exc: OSError) -> EngineUnavailable:
        return EngineUnavailable(
            f"engine {self._engine}: the shared folder {self._here} cannot be used ({exc.strerror})"
        )
