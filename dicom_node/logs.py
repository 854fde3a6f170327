"""Structured logging: one JSON object a line on standard error, and nothing of a patient in it.

Our own records are a constant message plus `extra` fields (UIDs, ids, AE titles). What libraries say is another matter:
pydicom and pynetdicom put attribute values into messages, exceptions and warnings. So of any other library only the
fact is kept: logger, level, place, class of the exception. The text of an exception is written only when it is a
`NodeError`, whose messages carry no patient data by contract.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import sys
import threading
import traceback
import warnings
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from json.encoder import encode_basestring_ascii as _quoted
from types import TracebackType
from typing import Any, TextIO

from dicom_node.errors import NodeError

__all__ = ["JsonLines", "setup_logging"]

TRUSTED = ("dicom_node", "apscheduler")  # their messages are constants or name our own timers
CAPPED = ("pynetdicom", "pydicom", "highdicom", "monai", "torch", "PIL")
FRAMES_MAX = 12
FIELD_CHARS_MAX = 2000

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OWN = len(vars(logging.makeLogRecord({})))  # what a record has before its `extra` fields are added
_FIRST = frozenset({"time", "level", "process", "logger", "message"})  # of a line; no field takes their place


class JsonLines(logging.Formatter):
    """One record as one line of JSON: time, level, process, logger, message, then the record's own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line; control characters inside values are escaped, so a peer cannot forge one."""
        # piece by piece, and what is constant once: two lines are written for each association
        fields: dict[str, Any] = {}
        if _trusted(record.name):
            message = record.getMessage()
            for key, value in islice(vars(record).items(), _OWN, None):
                if key not in _STANDARD and key not in _FIRST:
                    fields[key] = value
        else:
            message = "a library reported a problem"
            fields["where"] = f"{record.module}:{record.lineno}"
        if record.exc_info and record.exc_info[1] is not None:
            fields |= _exception_fields(record.exc_info[1])
        moment = f"{_second(int(record.created))}.{int(record.created % 1 * 1000):03}+00:00"
        start = _start(record.levelname, self._process, record.name)
        rest = [f"{_name(key)}{_encoded(value)}" for key, value in fields.items()]
        return f'{{"time": "{moment}"{start}{_quoted(message)}{"".join(rest)}}}'


@lru_cache(maxsize=256)
def _start(level: str, process: str, logger: str) -> str:
    return f', "level": {_quoted(level)}, "process": {_quoted(process)}, "logger": {_quoted(logger)}, "message": '


@lru_cache(maxsize=256)
def _name(key: str) -> str:
    return f", {_quoted(key)}: "


@lru_cache(maxsize=8)
def _second(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()[:19]


def _encoded(value: object) -> str:
    if type(value) is str:
        return _quoted(value[:FIELD_CHARS_MAX])
    return json.dumps(_plain(value), ensure_ascii=True)


def setup_logging(level: str, process: str, stream: TextIO | None = None) -> None:
    """Send every record, warning and uncaught exception of this process to `stream` (standard error) as JSON lines.

    Replaces what was set up before. `level` is for the node's own loggers; libraries are capped at WARNING.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(process))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("dicom_node").setLevel(level)
    for name in CAPPED:
        library = logging.getLogger(name)
        library.setLevel(logging.WARNING)
        library.propagate = True
        for own in list(library.handlers):  # a library's own handler would write values past the formatter
            library.removeHandler(own)
    logging.raiseExceptions = False  # a handler's failure prints the record's arguments
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # nobody prints them
    warnings.showwarning = _show_warning
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    if stream is None:
        faulthandler.enable()


def _trusted(logger: str) -> bool:
    return logger.split(".", 1)[0] in TRUSTED


def _plain(value: object) -> object:
    """JSON-ready, bounded."""
    if type(value) is str:
        return value[:FIELD_CHARS_MAX]
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in list(value)[:100]]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in list(value.items())[:100]}
    if isinstance(value, BaseException) and not isinstance(value, NodeError):
        return type(value).__name__
    return str(value)[:FIELD_CHARS_MAX]


def _exception_fields(exc: BaseException) -> dict[str, Any]:
    fields: dict[str, Any] = {"exception": type(exc).__name__}
    if isinstance(exc, NodeError):
        fields["exception_message"] = str(exc)[:FIELD_CHARS_MAX]
    if exc.__cause__ is not None:
        fields["cause"] = type(exc.__cause__).__name__
    frames = traceback.extract_tb(exc.__traceback__)[-FRAMES_MAX:]
    fields["frames"] = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames]
    return fields


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    logging.getLogger(__name__).warning(
        "a library warned",
        extra={"category": category.__name__, "where": f"{filename.rsplit('/', 1)[-1]}:{lineno}"},
    )


def _uncaught(kind: type[BaseException], exc: BaseException | None, trace: TracebackType | None) -> None:
    if exc is None or issubclass(kind, SystemExit | KeyboardInterrupt):
        return
    logging.getLogger(__name__).critical("an exception was not caught", exc_info=(kind, exc, trace))
