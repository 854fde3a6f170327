"""The chained files: several writers, rotation, crashes, and that each change of them is found and named."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dicom_node.audit.chain import Chain, Head, file_names, parse_line
from dicom_node.audit.verify import Report, read_anchor, verify, write_anchor
from dicom_node.audit.watch import TrailWatch

Change = Callable[[list[bytes]], list[bytes]]


def filled(folder: Path, lines: int = 30, file_bytes: int = 900) -> Head:
    """A trail of so many lines in several files."""
    chain = Chain(folder, file_bytes=file_bytes)
    head = Head()
    for number in range(1, lines + 1):
        chain.append([("2026-11-21T12:00:00.000+00:00", b"<m>%d</m>" % number)])
        head = chain.head
    chain.close()
    return head


def texts(report: Report) -> list[str]:
    return [str(fault) for fault in report.faults]


def rewritten(path: Path, change: Change) -> None:
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def test_lines_go_on_over_files_and_processes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from dicom_node.audit.chain import Chain\n"
        "chain = Chain(Path(sys.argv[1]), file_bytes=4000)\n"
        "for n in range(100): chain.append([('t', b'<m>%d</m>' % n)], 30.0)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "audit")]) for _ in range(3)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    report = verify(tmp_path / "audit")
    assert not report.faults and report.lines == 300 and report.files > 5
    assert report.end is not None and report.end.head.sequence == 300
    assert all((tmp_path / "audit" / name).stat().st_mode & 0o777 == 0o600 for name in file_names(tmp_path / "audit"))


@pytest.mark.parametrize(
    ("change", "line", "what"),
    [
        (lambda lines: [*lines[:3], lines[3].replace(b"<m>", b"<n>"), *lines[4:]], 4, "is not what was written"),
        (lambda lines: [*lines[:3], *lines[4:]], 4, "was taken out, put in or moved"),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], 4, "was taken out, put in or moved"),
        (lambda lines: [*lines[:4], lines[3], *lines[4:]], 5, "was taken out, put in or moved"),
        (lambda lines: [*lines[:3], b"nonsense\n", *lines[3:]], 4, "no line of the audit trail"),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], 9, "has no end, and files come after it"),
        (lambda lines: lines[:-1], 1, "lines or a file are missing"),
        (lambda lines: lines[1:], 1, "does not begin as a file of the audit trail does"),
    ],
    ids=["changed", "taken out", "swapped", "twice", "put in", "cut", "end of a file", "no head"],
)
def test_each_change_is_found_with_file_and_line(tmp_path: Path, change: Change, line: int, what: str) -> None:
    filled(tmp_path)
    names = file_names(tmp_path)
    assert len((tmp_path / names[1]).read_bytes().splitlines()) == 9
    rewritten(tmp_path / names[1], change)
    fault = verify(tmp_path).faults[0]
    at = names[2] if what.startswith("lines or a file") else names[1]
    assert (fault.file, fault.line) == (at, line) and what in fault.what


def test_a_file_that_is_gone_from_the_middle_is_missed(tmp_path: Path) -> None:
    filled(tmp_path)
    names = file_names(tmp_path)
    (tmp_path / names[2]).unlink()
    (fault,) = verify(tmp_path).faults
    assert fault.file == names[3] and "a file are missing" in fault.what


def test_the_end_is_missed_by_the_head_that_is_kept_elsewhere(tmp_path: Path) -> None:
    head = filled(tmp_path / "audit")
    write_anchor(tmp_path / "head.json", head)
    names = file_names(tmp_path / "audit")
    rewritten(tmp_path / "audit" / names[-1], lambda lines: lines[:-1])
    assert not verify(tmp_path / "audit").faults  # the chain itself fits
    anchor = read_anchor(tmp_path / "head.json")
    assert anchor == head
    (fault,) = texts(verify(tmp_path / "audit", [head]))
    assert fault.endswith("lines 30 to 30 are gone: 1 at the end of the trail")
    for name in names:
        (tmp_path / "audit" / name).unlink()
    assert "lines 1 to 30 are gone" in texts(verify(tmp_path / "audit", [head]))[0]


def test_a_trail_written_anew_does_not_fit_its_head(tmp_path: Path) -> None:
    head = filled(tmp_path / "audit")
    other = Chain(tmp_path / "forged", file_bytes=900)
    for number in range(1, 40):
        other.append([("2026-11-21T12:00:00.000+00:00", b"<m>%d</m>" % (number if number != 5 else 6))])
    other.close()
    assert not verify(tmp_path / "forged").faults
    (fault,) = texts(verify(tmp_path / "forged", [head]))
    assert "line 30 is not the one that was there" in fault


@pytest.mark.parametrize("left", [b"31 2026", b"\0" * 100, b"31 t " + b"0" * 64 + b" <m>31</m>"])
def test_what_a_crash_left_is_no_change_and_is_cut_off_before_the_next_line(tmp_path: Path, left: bytes) -> None:
    head = filled(tmp_path)
    with (tmp_path / file_names(tmp_path)[-1]).open("ab") as file:
        file.write(left)
    report = verify(tmp_path, [head])
    assert not report.faults and report.unfinished_bytes == len(left)
    chain = Chain(tmp_path, file_bytes=900)
    assert chain.append([("t", b"<m>31</m>")]) == 1 and chain.head.sequence == 31
    chain.close()
    assert chain.healed == [f"the last line had no end: {len(left)} bytes that a crash left were cut off"]
    report = verify(tmp_path, [head])
    assert not report.faults and report.lines == 31 and not report.unfinished_bytes


def test_a_crash_between_a_file_and_its_head_is_mended(tmp_path: Path) -> None:
    head = filled(tmp_path)
    (tmp_path / f"audit-{head.sequence + 1:012d}.log").touch()
    chain = Chain(tmp_path, file_bytes=900)
    assert chain.append([("t", b"<m>31</m>")]) == 1 and chain.head.sequence == 31
    chain.close()
    assert not verify(tmp_path, [head]).faults


def test_damage_at_the_end_stays_for_verify_and_the_trail_goes_on(tmp_path: Path) -> None:
    filled(tmp_path)
    name = file_names(tmp_path)[-1]
    with (tmp_path / name).open("ab") as file:
        file.write(b"\0" * 40 + b"\n")
    chain = Chain(tmp_path, file_bytes=900)
    assert chain.append([("t", b"<m>31</m>")]) == 1 and chain.head.sequence == 31
    chain.close()
    assert len(chain.healed) == 1
    (fault,) = verify(tmp_path).faults
    assert fault.file == name and "no line" in fault.what


def test_a_write_that_fails_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(tmp_path, file_bytes=1 << 20)
    chain.append([("t", b"<m>1</m>")])
    real = os.write

    def full(fd: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", nothing)
        return real(fd, data[:20])

    def nothing(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        chain.append([("t", b"<m>2</m>")])
    monkeypatch.undo()
    assert chain.append([("t", b"<m>2</m>")]) == 1 and chain.head.sequence == 2
    chain.close()
    report = verify(tmp_path)
    assert not report.faults and report.lines == 2 and not chain.healed


def test_a_lock_that_is_held_is_not_waited_for_for_long(tmp_path: Path) -> None:
    chain = Chain(tmp_path, file_bytes=1 << 20)
    with (tmp_path / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError):
            chain.append([("t", b"<m>1</m>")], lock_s=0.05)
    assert chain.append([("t", b"<m>1</m>")]) == 1 and chain.head.sequence == 1
    chain.close()


def test_the_node_itself_keeps_the_head_and_notices(tmp_path: Path) -> None:
    folder, anchor = tmp_path / "audit", tmp_path / "head.json"
    watch = TrailWatch(folder, anchor)
    watch.look()
    head = filled(folder)
    watch.look()
    assert read_anchor(anchor) == head and watch.sequence == 30
    rewritten(folder / file_names(folder)[-1], lambda lines: lines[:-1])
    watch.look()
    assert not watch.is_whole
    again = TrailWatch(folder, anchor)
    again.look()
    assert not again.is_whole


def appended(folder: Path, messages: Sequence[bytes]) -> None:
    chain = Chain(folder, file_bytes=900)
    chain.append([("t", message) for message in messages])
    chain.close()


def test_what_comes_later_is_verified_from_where_the_last_look_ended(tmp_path: Path) -> None:
    folder, anchor = tmp_path / "audit", tmp_path / "head.json"
    filled(folder)
    watch = TrailWatch(folder, anchor)
    watch.look()
    appended(folder, [b"<m>31</m>", b"<m>32</m>"])
    watch.look()
    assert watch.is_whole and watch.sequence == 32
    name = file_names(folder)[-1]
    appended(folder, [b"<m>33</m>"])
    rewritten(folder / name, lambda lines: [*lines[:-1], lines[-1].replace(b"33</m>", b"34</m>")])
    watch.look()
    assert not watch.is_whole


# --- files that are moved away under the hands of those who write and read


def numbers(folder: Path) -> list[int]:
    return [
        parsed[0]
        for name in file_names(folder)
        for line in (folder / name).read_bytes().splitlines(keepends=True)
        if (parsed := parse_line(line)) is not None
    ]


def test_a_writer_notices_that_its_file_was_moved_although_another_has_its_name(tmp_path: Path) -> None:
    folder, away = tmp_path / "audit", tmp_path / "away"
    away.mkdir()
    one, two = Chain(folder, file_bytes=1 << 20), Chain(folder, file_bytes=1 << 20)
    one.append([("t", b"<m>1</m>")])
    two.append([("t", b"<m>2</m>")])
    (name,) = file_names(folder)
    (folder / name).rename(away / name)
    (folder / name).touch()  # as `logrotate` with `create` leaves it
    two.append([("t", b"<m>3</m>")])
    one.append([("t", b"<m>4</m>")])
    one.close(), two.close()
    assert numbers(folder) == [3, 4] and numbers(away) == [1, 2]
    for moved in file_names(away):
        (away / moved).rename(folder / moved)
    report = verify(folder)
    assert not report.faults and report.lines == 4


def test_writers_of_a_folder_that_was_replaced_keep_one_chain(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    one, two = Chain(folder, file_bytes=1 << 20), Chain(folder, file_bytes=1 << 20)
    one.append([("t", b"<m>1</m>")])
    two.append([("t", b"<m>2</m>")])
    folder.rename(tmp_path / "away")
    again = Chain(folder, file_bytes=1 << 20, known=two.head)
    again.append([("t", b"<m>3</m>")])
    with pytest.raises(OSError, match="another one now"):  # it has the lock of the folder that is away
        one.append([("t", b"<m>4</m>")])
    for chain in (one, two, again):
        chain.close()
    assert numbers(folder) == [3] and numbers(tmp_path / "away") == [1, 2]


def test_the_newest_file_moved_away_leaves_a_gap_that_fits_when_it_is_back(tmp_path: Path) -> None:
    folder, away = tmp_path / "audit", tmp_path / "away"
    away.mkdir()
    chain = Chain(folder, file_bytes=900)
    for number in range(1, 31):
        chain.append([("t", b"<m>%d</m>" % number)])
    last = file_names(folder)[-1]
    (folder / last).rename(away / last)
    chain.append([("t", b"<m>31</m>")])
    chain.close()
    assert len(chain.healed) == 1 and "to 30 are gone" in chain.healed[0]
    assert "lines or a file are missing" in texts(verify(folder))[0]
    (away / last).rename(folder / last)
    report = verify(folder)
    assert not report.faults and report.lines == 31


def test_what_the_disk_still_took_stays_and_the_rest_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(tmp_path, file_bytes=1 << 20)
    chain.append([("t", b"<m>1</m>")])
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) < 200:
            raise OSError(28, "No space left on device")
        return real(fd, data[:200])

    monkeypatch.setattr(os, "write", full)
    batch = [("t", b"<m>%d</m>" % number) for number in range(2, 6)]
    assert chain.append(batch) == 2  # whoever read these two meanwhile has read what stays
    with pytest.raises(OSError, match="No space"):
        chain.append(batch[2:3])
    monkeypatch.undo()
    assert chain.append(batch[2:]) == 2
    chain.close()
    report = verify(tmp_path)
    assert not report.faults and report.lines == 5 and not chain.healed


def test_cut_at_any_byte_the_trail_goes_on_and_no_whole_line_is_lost(tmp_path: Path) -> None:
    filled(tmp_path / "whole", lines=3, file_bytes=1 << 20)
    (name,) = file_names(tmp_path / "whole")
    written = (tmp_path / "whole" / name).read_bytes()
    folder = tmp_path / "cut"
    folder.mkdir()
    for length in range(len(written)):
        for old in file_names(folder):
            (folder / old).unlink()
        (folder / name).write_bytes(written[:length])
        whole = max(written[:length].count(b"\n") - 1, 0)
        chain = Chain(folder, file_bytes=1 << 20)
        chain.append([("t", b"<m>next</m>")])
        chain.close()
        report = verify(folder)
        assert not report.faults and report.lines == whole + 1, length


def test_older_files_may_be_moved_away_while_it_is_verified_and_looked_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = filled(tmp_path / "audit")
    folder, anchor = tmp_path / "audit", tmp_path / "head.json"
    watch = TrailWatch(folder, anchor)
    watch.look()
    names = file_names(folder)
    real, moved = os.listdir, names[:-1]

    def meanwhile(path: Path) -> list[str]:
        found = real(path)
        if moved and path == folder:
            (folder / moved.pop(0)).unlink()
        return found

    monkeypatch.setattr(os, "listdir", meanwhile)
    report = verify(folder, [head])
    assert not report.faults and report.end is not None and report.end.head == head
    monkeypatch.undo()
    assert file_names(folder) == names[len(names) - report.files :]
    appended(folder, [b"<m>%d</m>" % number for number in range(31, 40)])
    watch.look()
    assert watch.is_whole and watch.sequence == 39


def test_a_look_that_fails_is_no_change_and_the_next_one_may_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, anchor = tmp_path / "audit", tmp_path / "head.json"
    filled(folder)
    watch = TrailWatch(folder, anchor)

    def fails(path: Path) -> list[str]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "listdir", fails)
    watch.tick()
    assert watch.is_whole
    for _ in range(2):
        watch.tick()
    assert not watch.is_whole  # nobody can say
    monkeypatch.undo()
    watch.tick()
    assert watch.is_whole and watch.sequence == 30
