"""What `soak.py` injects, and what it watches: faults of processes and of the destination; memory, threads, files."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from _bench_node import BenchNode

__all__ = ["ROLES", "Faults", "Figures", "Leaks", "pid_of"]

ROLES = ("supervisor", "receiver", "service", "work")
SAMPLE_S = 5.0
OUTAGE_S = 20.0
RECOVERY_S = 90.0
AFTER_S = 10.0  # what was under way when the fault was over
# what a process may have more, all through the last third of its life, than ever in the third before
MORE_THREADS, MORE_FILES, MORE_MIB = 4, 8, 50
SHORT_LIFE_S = 90.0  # of a process: no slope is told of it
LATE_S = 1800.0  # slopes are told for the last half hour, of shorter lives for the time after the first third
MIB = 1024 * 1024


class Faults:
    """One fault after the other. `windows`: from when to when each disturbed the node (monotonic)."""

    def __init__(self, node: BenchNode, pacs: BenchNode, report: Callable[[str], None]) -> None:
        self._node, self._pacs, self._report = node, pacs, report
        self.windows: list[tuple[str, float, float]] = []
        self.broken: list[str] = []
        self._kinds: tuple[tuple[str, Callable[[], None]], ...] = (
            ("kill receiver", lambda: self._kill("receiver")),
            ("destination down", self._pacs_down),
            ("kill work", lambda: self._kill("work")),
            ("kill service", lambda: self._kill("service")),
            ("kill runtime", self._kill_runtime),
            ("destination hangs", self._pacs_hangs),
            ("kill node", self._kill_node),
        )
        self._next = 0

    def inject(self) -> None:
        """The next one; returns when the node is ready again."""
        name, fault = self._kinds[self._next % len(self._kinds)]
        self._next += 1
        began_s = time.monotonic()
        try:
            fault()
            self._wait_ready()
        except (OSError, ValueError, psutil.Error, TimeoutError) as exc:
            self.broken.append(f"{name}: {exc!r}")
        ended_s = time.monotonic()
        self.windows.append((name, began_s, ended_s + AFTER_S))
        self._report(f"{name}: ready again after {ended_s - began_s:.1f} s")

    def disturbed(self, at_s: float) -> bool:
        """Whether a fault was on at that time."""
        return any(began <= at_s <= ended for _, began, ended in self.windows)

    def _kill(self, role: str) -> None:
        old = _pid(self._node, role)
        os.kill(old, signal.SIGKILL)
        _wait(lambda: _pid(self._node, role) != old, f"a new {role}")

    def _kill_runtime(self) -> None:
        for child in psutil.Process(_pid(self._node, "work")).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def _kill_node(self) -> None:
        self._node.end(signal.SIGKILL)
        self._node.__enter__()

    def _pacs_down(self) -> None:
        self._pacs.end(signal.SIGKILL)
        time.sleep(OUTAGE_S)
        self._pacs.__enter__()

    def _pacs_hangs(self) -> None:
        receiver = _pid(self._pacs, "receiver")
        os.kill(receiver, signal.SIGSTOP)
        time.sleep(OUTAGE_S)
        os.kill(receiver, signal.SIGCONT)

    def _wait_ready(self) -> None:
        def is_ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._node.http_port}/ready", timeout=5) as answer:
                    return int(answer.status) == 200
            except (OSError, urllib.error.HTTPError):
                return False

        _wait(is_ready, "/ready")


def _pid(node: BenchNode, role: str) -> int:
    return pid_of(node.data_dir, role)


def pid_of(data_dir: Path, role: str) -> int:
    """Of that process of the node. Raises OSError or ValueError while it starts."""
    return int(json.loads((data_dir / "run" / f"{role}.json").read_text(encoding="utf-8"))["pid"])


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + RECOVERY_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {RECOVERY_S:g} s")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the longest life of one role: how it grew, per minute (see LATE_S), and its peak."""

    role: str
    life_s: float
    peak_mib: float
    mib_per_min: float
    threads_per_min: float
    files_per_min: float
    threads: int
    files: int
    more_mib: float  # the least of the last third above the most of the one before: not what comes and goes
    more_threads: float
    more_files: float

    @property
    def grows(self) -> bool:
        """Whether it has more than may be."""
        return self.more_threads > MORE_THREADS or self.more_files > MORE_FILES or self.more_mib > MORE_MIB


class Leaks:
    """Samples memory, threads and open files of every role, on a thread, while the block runs."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._over = threading.Event()
        self._samples: dict[tuple[str, int], list[tuple[float, float, int, int]]] = defaultdict(list)
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Leaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            for role in ROLES:
                with suppress(OSError, ValueError, psutil.Error):
                    pid = pid_of(self._data_dir, role)
                    process = psutil.Process(pid)
                    with process.oneshot():
                        found = (
                            time.monotonic(),
                            process.memory_info().rss / MIB,
                            process.num_threads(),
                            process.num_fds(),
                        )
                    if found[3]:  # one that was just killed has no files any more
                        self._samples[role, pid].append(found)

    def figures(self) -> list[Figures]:
        """One for each role that lived long enough."""
        found = []
        for role in ROLES:
            lives = [samples for (name, _), samples in self._samples.items() if name == role and len(samples) > 2]
            longest = max(lives, key=lambda samples: samples[-1][0] - samples[0][0], default=[])
            if not longest or longest[-1][0] - longest[0][0] < SHORT_LIFE_S:
                continue
            third = len(longest) // 3
            late = [sample for sample in longest[third:] if sample[0] >= longest[-1][0] - LATE_S]
            more = [
                min(one[n] for one in longest[-third:]) - max(one[n] for one in longest[third:-third])
                for n in (1, 2, 3)
            ]
            found.append(
                Figures(
                    role=role,
                    life_s=longest[-1][0] - longest[0][0],
                    peak_mib=max(sample[1] for sample in longest),
                    mib_per_min=_slope(late, 1),
                    threads_per_min=_slope(late, 2),
                    files_per_min=_slope(late, 3),
                    threads=late[-1][2],
                    files=late[-1][3],
                    more_mib=more[0],
                    more_threads=more[1],
                    more_files=more[2],
                )
            )
        return found


def _slope(samples: Sequence[tuple[float, float, int, int]], column: int) -> float:
    minutes = [sample[0] / 60 for sample in samples]
    return statistics.linear_regression(minutes, [float(sample[column]) for sample in samples]).slope
