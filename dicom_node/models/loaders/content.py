"""The bytes of a package's file, once: their digest is checked on what is then loaded."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dicom_node.errors import PackageError

__all__ = ["checked_content"]

_MAX_BYTES = 4 * 1024**3


def checked_content(path: Path, source: Mapping[str, Any]) -> bytes:
    """The content of `path`, which `source` gives a `path` inside the package and a `sha256`.

    Raises PackageError when it is no plain file of sane size inside the package's folder, or has another digest.
    """
    depth = len(Path(source["path"]).parts) if "path" in source else 1
    folder = path.parents[depth - 1]
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PackageError(f"{path}: leads out of the package folder")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not make us wait
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise PackageError(f"{path}: is no plain file")
            if status.st_size > _MAX_BYTES:
                raise PackageError(f"{path}: larger than {_MAX_BYTES >> 30} GiB")
            content = file.read(_MAX_BYTES + 1)
    except OSError as exc:
        raise PackageError(f"{path}: {exc.strerror}") from exc
    if hashlib.sha256(content).hexdigest() != source["sha256"]:
        raise PackageError(f"{path}: the weights are not those the package was made with (sha256 differs)")
    return content
