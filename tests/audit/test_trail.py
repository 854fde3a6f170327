"""The trail of a process: batches, floods, a file that cannot be written, and that nobody waits for it."""

import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.audit.chain import Chain, file_names, parse_line
from dicom_node.audit.trail import Floods
from dicom_node.audit.verify import verify
from dicom_node.auditing import AuditEvent, AuditKind, AuditOutcome, Participant
from dicom_node.errors import StorageError

Make = Callable[..., AuditEvent]


def messages(folder: Path) -> list[str]:
    found = []
    for name in file_names(folder):
        for line in (folder / name).read_bytes().splitlines(keepends=True)[1:]:
            parsed = parse_line(line)
            assert parsed is not None
            found.append(parsed[3].decode())
    return found


def alert(detail: str, host: str) -> AuditEvent:
    return AuditEvent(
        kind=AuditKind.SECURITY_ALERT,
        outcome=AuditOutcome.MINOR_FAILURE,
        participants=(Participant(host=host, is_requestor=True),),
        detail=detail,
    )


class Counted:
    def __init__(self) -> None:
        self.recorded: list[tuple[str, int]] = []
        self.failures: list[str] = []
        self.lost = 0

    def audit_recorded(self, kind: str, outcome: int) -> None:
        self.recorded.append((kind, outcome))

    def audit_failed(self, sink: str) -> None:
        self.failures.append(sink)

    def audit_lost(self, messages: int) -> None:
        self.lost += messages


def test_what_was_recorded_before_it_is_closed_is_written_in_order(
    tmp_path: Path, open_trail: Callable[..., Any], event: Make
) -> None:
    counted = Counted()
    trail = open_trail(observe=counted)
    for number in range(1200):
        trail.record(event(detail=f"number {number}."))
    trail.close()
    assert [re.findall(r"number (\d+)\.", one) for one in messages(tmp_path / "audit")] == [
        [str(n)] for n in range(1200)
    ]
    assert counted.recorded == [("transferred", 0)] * 1200
    assert not verify(tmp_path / "audit", [trail.head]).faults


def test_a_flood_of_alerts_is_told_once_and_then_counted(tmp_path: Path, open_trail: Callable[..., Any]) -> None:
    trail = open_trail()
    for number in range(2313):
        trail.record(alert("association rejected: calling_ae", "192.0.2.66"))
        if number % 100 == 0:
            trail.record(alert("association rejected: called_ae", "192.0.2.66"))
    trail.close()
    details = [re.findall("<EventOutcomeDescription>(.*?)<", one)[0] for one in messages(tmp_path / "audit")]
    assert details == [
        "association rejected: calling_ae",
        "association rejected: called_ae",
        "association rejected: calling_ae; and 2,312 more of the same in 60 s",
        "association rejected: called_ae; and 23 more of the same in 60 s",
    ]


def test_alerts_from_ever_other_places_do_not_fill_the_disk() -> None:
    floods = Floods(60.0)
    told = [one for n in range(10_000) if (one := floods.admit(alert(f"w{n}", f"h{n}"), n / 1000)) is not None]
    assert len(told) == 65
    assert len(list(floods.ended(200.0))) == 1  # how many of the others there were
    assert not list(floods.ended(400.0)) and floods.admit(alert("w1", "h1"), 401.0) is not None


def test_where_the_file_cannot_be_written_events_wait_and_nothing_is_raised(
    tmp_path: Path, open_trail: Callable[..., Any], event: Make, wait_for: Callable[..., None]
) -> None:
    counted = Counted()
    (tmp_path / "audit").write_text("a file where the folder must be")
    trail = open_trail(observe=counted)
    trail.record(event())
    wait_for(lambda: counted.failures == ["file"], 20, "a try that failed")
    (tmp_path / "audit").unlink()
    wait_for(lambda: len(counted.recorded) == 1, 20, "the event to be written")
    assert len(messages(tmp_path / "audit")) == 1


def test_more_than_can_wait_is_lost_counted_and_told_in_the_trail(
    tmp_path: Path, open_trail: Callable[..., Any], event: Make, wait_for: Callable[..., None]
) -> None:
    counted = Counted()
    chain = Chain(tmp_path / "audit", file_bytes=1 << 20)
    with (tmp_path / "audit" / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # as a process that was stopped in the middle of a write holds it
        trail = open_trail(observe=counted, open_chain=lambda: chain)
        began = time.monotonic()
        for _ in range(200):
            trail.record(event(kind=AuditKind.QUERY, query=bytes(1 << 20)))
        assert time.monotonic() - began < 1.5  # it was not waited for
    wait_for(lambda: counted.lost > 100, 30, "what was lost to be told")
    trail.close()
    (told,) = [one for one in messages(tmp_path / "audit") if "were lost" in one]
    assert f"{counted.lost} audit messages were lost" in told


def test_patients_are_looked_up_where_nobody_told_them_and_not_being_found_costs_nothing_else(
    tmp_path: Path, open_trail: Callable[..., Any], event: Make
) -> None:
    def patients(studies: tuple[str, ...]) -> tuple[str, ...]:
        if studies == ("1.2.99",):
            raise StorageError("the catalog is busy")
        return tuple(f"of {study}" for study in studies)

    trail = open_trail(patient_ids=patients)
    trail.record(event(patient_ids=()))
    trail.record(event(patient_ids=(), study_instance_uids=("1.2.99",)))
    trail.record(event(patient_ids=("told",)))
    trail.close()
    first, second, third = messages(tmp_path / "audit")
    assert "of 1.2.3" in first and "Patient Number" not in second and "told" in third


def test_what_a_crash_left_is_told_in_the_trail(tmp_path: Path, open_trail: Callable[..., Any], event: Make) -> None:
    with open_trail() as trail:
        trail.record(event())
    with (tmp_path / "audit" / file_names(tmp_path / "audit")[-1]).open("ab") as file:
        file.write(b"2 2026-11-21T")
    with open_trail() as trail:
        trail.record(event())
    assert [("a crash left" in one) for one in messages(tmp_path / "audit")] == [False, False, True]


def test_who_must_not_go_on_before_it_is_told_waits_until_it_is_on_the_disk(
    tmp_path: Path, open_trail: Callable[..., Any], event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (real(fd), synced.append(len(messages(tmp_path / "audit")))))
    trail = open_trail()
    assert trail.settled()
    for number in range(1, 4):
        trail.record(event())
        assert trail.settled() and synced[-1] == number  # at once, not within the second
    with (tmp_path / "audit" / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        trail.record(event())
        assert not trail.settled(0.05)
    assert trail.settled()
    assert trail.close() and trail.settled()
    trail.record(event())
    assert not trail.settled(0.05)  # nobody writes it any more


def test_what_cannot_be_written_before_the_process_ends_is_counted_as_lost(
    tmp_path: Path, open_trail: Callable[..., Any], event: Make, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted()
    (tmp_path / "audit").write_text("a file where the folder must be")
    trail = open_trail(observe=counted)
    for _ in range(3):
        trail.record(event())
    assert not trail.close(0.2)
    assert counted.lost == 3 and "audit messages were lost" in caplog.text


def test_a_lock_that_comes_free_late_does_not_cost_what_a_command_told(
    tmp_path: Path, open_trail: Callable[..., Any], event: Make
) -> None:
    trail = open_trail()
    trail.record(event())
    assert trail.settled()
    with (tmp_path / "audit" / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        trail.record(event())
        threading.Timer(2.5, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()  # longer than one try
        assert trail.close()
    assert len(messages(tmp_path / "audit")) == 2


def test_each_name_that_is_tried_is_told_and_one_place_does_not_hide_the_others() -> None:
    floods = Floods(60.0)

    def tried(user: str, host: str) -> AuditEvent:
        who = (Participant(host=host, user=user, is_requestor=True),)
        failed = AuditOutcome.SERIOUS_FAILURE
        return AuditEvent(AuditKind.USER_AUTHENTICATED, failed, participants=who, detail="another passcode")

    told = [one for n in range(1000) if (one := floods.admit(tried(f"u{n}", "h1"), 1.0)) is not None]
    assert [one.participants[0].user for one in told] == [*(f"u{n}" for n in range(16)), ""]
    assert floods.admit(tried("u1", "h2"), 2.0) is not None
    assert not Floods.concerns(AuditEvent(AuditKind.USER_AUTHENTICATED))  # who gets in is told each time


# --- kill -9

WRITER = """
import sys
from pathlib import Path
from dicom_node.audit.message import Identity
from dicom_node.audit.trail import FileTrail
from dicom_node.auditing import AuditEvent, AuditKind
from dicom_node.clock import SystemClock
trail = FileTrail(Path(sys.argv[1]), Identity(source_id="N"), SystemClock(), file_bytes=65536, max_message_bytes=32768)
for number in range(10**6):
    trail.record(AuditEvent(AuditKind.ACCESSED, detail=f"{sys.argv[2]} {number}."))
    if number % 50 == 0 and trail.settled():
        print(number, flush=True)
"""


def test_killed_at_any_moment_what_was_settled_is_there_and_the_chain_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    seen: dict[str, int] = {}
    for turn in range(6):
        writers = {}
        for name in (f"a{turn}", f"b{turn}"):
            words = [sys.executable, "-c", WRITER, str(folder), name]
            writers[name] = subprocess.Popen(words, stdout=subprocess.PIPE)
        for name, writer in writers.items():
            assert writer.stdout is not None
            for _ in range(2 + 3 * turn):
                seen[name] = int(writer.stdout.readline())
        for name, writer in writers.items():
            writer.kill()
            assert writer.stdout is not None
            with writer.stdout:
                seen[name] = max(map(int, writer.stdout.read().split()), default=seen[name])
            writer.wait()
        report = verify(folder)
        assert not report.faults, report.faults[0]
    told: dict[str, list[int]] = {}
    for message in messages(folder):
        if found := re.search(r">(\w+) (\d+)\.<", message):
            told.setdefault(found[1], []).append(int(found[2]))
    for name, last in seen.items():
        assert told[name] == list(range(len(told[name]))) and len(told[name]) > last, name
