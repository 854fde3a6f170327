"""Files that hold a secret: whoever reads one checks first that nobody else can."""

from __future__ import annotations

import errno
import grp
import os
import stat
from contextlib import suppress
from pathlib import Path

from dicom_node.errors import ConfigError

__all__ = ["check_private", "read_private", "stamp"]


def stamp(path: Path) -> tuple[int, ...]:
    """Another one whenever the file, its mode or its owner changed. Raises OSError."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_private(where: str, path: str | Path, found: os.stat_result | None = None, *, kind: str = "a file") -> None:
    """Raises ConfigError for a file that others than its owner may use, or that somebody else owns.

    `where` is the key of the configuration that names it; `found`, what an open descriptor of it says. Its group may
    read it: service managers hand secrets out that way.
    """
    try:
        found = found or Path(path).stat()
    except OSError as exc:
        raise _unreadable(where, path, exc, kind) from None
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o137:
        raise ConfigError(f"{where}: {path} has mode {mode:04o}, expected 0600 or 0640: run `chmod 600 {path}`")
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{where}: {path} belongs to user {found.st_uid}, expected the node's ({os.geteuid()}) or root: run "
            f"`chown {os.geteuid()} {path}`"
        )
    if found.st_uid != os.geteuid() and not os.access(path, os.R_OK, effective_ids=True):
        raise _unreadable(where, path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)), kind)


def _unreadable(where: str, path: str | Path, exc: OSError, kind: str) -> ConfigError:
    remedy = f"name {kind}"
    if isinstance(exc, PermissionError):  # made by root, as installations go
        group = str(os.getegid())
        with suppress(KeyError):
            group = grp.getgrgid(os.getegid()).gr_name
        remedy = f"run `chown root:{group} {path}` and `chmod 640 {path}` as root, and let {group} into its folder"
    return ConfigError(f"{where}: {path} cannot be read: {exc.strerror}; {remedy}")


def read_private(where: str, path: str | Path, most_bytes: int) -> bytes:
    """Its content, checked on the descriptor that is read. Raises ConfigError, also where it is longer."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:  # a pipe would wait
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{where}: {path} is no regular file; name one")
            check_private(where, path, found)
            content = stream.read(most_bytes + 1)
    except OSError as exc:
        raise _unreadable(where, path, exc, "a file the node can read") from None
    if len(content) > most_bytes:
        raise ConfigError(f"{where}: {path} is longer than {most_bytes} bytes; it cannot be what it should be")
    return content
