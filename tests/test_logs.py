"""Log lines carry fields, and nothing of a patient."""

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest

from dicom_node.errors import StorageError
from dicom_node.logs import setup_logging

CANARY = "ZZ^CANARY^NAME"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    saved = root.handlers[:], root.level, warnings.showwarning, sys.excepthook, threading.excepthook
    raising = logging.raiseExceptions
    stream = io.StringIO()
    setup_logging("INFO", "receiver", stream)
    yield stream
    root.handlers[:], root.level, warnings.showwarning, sys.excepthook, threading.excepthook = saved
    logging.raiseExceptions = raising
    logging.getLogger("dicom_node").setLevel(logging.NOTSET)


def test_a_record_is_one_json_line_with_its_fields(lines: io.StringIO) -> None:
    logging.getLogger("dicom_node.pipeline.route").info("study complete", extra={"study": "1.2.3", "jobs": 2})
    (line,) = lines.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "study complete"
    assert (record["study"], record["jobs"], record["process"], record["level"]) == ("1.2.3", 2, "receiver", "INFO")


def test_control_characters_in_fields_cannot_forge_a_line(lines: io.StringIO) -> None:
    logging.getLogger("dicom_node.x").info("association", extra={"calling_ae_title": 'A\n{"level":"INFO"}\x1b[2J'})
    assert len(lines.getvalue().splitlines()) == 1
    assert "\x1b" not in lines.getvalue()


@pytest.mark.parametrize("name", ["pydicom", "pynetdicom.assoc", "highdicom.sr", "some.library"])
def test_of_a_library_only_the_fact_is_kept(lines: io.StringIO, name: str) -> None:
    text = f"Invalid value: {CANARY}"  # as libraries write: the value is part of the message
    logging.getLogger(name).warning(text)
    logging.getLogger(name).error("value %s", CANARY)
    logging.getLogger(name).info(CANARY)
    assert CANARY not in lines.getvalue()
    first, second = (json.loads(line) for line in lines.getvalue().splitlines())
    assert first["message"] == "a library reported a problem"
    assert first["where"].startswith("test_logs:")
    assert (first["level"], second["level"]) == ("WARNING", "ERROR")


def test_the_text_of_a_foreign_exception_is_dropped_and_its_place_kept(lines: io.StringIO) -> None:
    try:
        int(CANARY)
    except ValueError:
        logging.getLogger("dicom_node.x").exception("handler failed")
    assert CANARY not in lines.getvalue()
    record = json.loads(lines.getvalue())
    assert record["exception"] == "ValueError"
    assert record["frames"][-1].startswith("test_logs.py:")


def test_the_text_of_our_own_errors_is_kept(lines: io.StringIO) -> None:
    try:
        raise StorageError("no space")
    except StorageError:
        logging.getLogger("dicom_node.x").exception("store failed")
    assert json.loads(lines.getvalue())["exception_message"] == "no space"


def test_a_foreign_exception_as_a_field_is_its_class(lines: io.StringIO) -> None:
    logging.getLogger("dicom_node.x").warning("failed", extra={"error": ValueError(CANARY)})
    assert json.loads(lines.getvalue())["error"] == "ValueError"


def test_warnings_and_uncaught_exceptions_lose_their_text(lines: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        showwarning = warnings.showwarning
        showwarning(UserWarning(CANARY), UserWarning, "/x/pydicom/valuerep.py", 7)
    thread = threading.Thread(target=int, args=(CANARY,))
    thread.start()
    thread.join()
    assert CANARY not in lines.getvalue()
    first, second = (json.loads(line) for line in lines.getvalue().splitlines())
    assert first["where"] == "valuerep.py:7"
    assert second["message"] == "an exception was not caught"
