# ruff: noqa: T201 - what commands say goes to standard output
"""`dicom-node doctor`: is everything as it must be, and if not, what to do. One line for each thing looked at.

Nothing is changed but a scratch file in the data folder, and a test association with each destination. Each check has
a bounded time of its own; one that hangs is told as such and does not keep the others from their work. Lines carry
names of the configuration, addresses, counts and paths; never patient data. Part of the composition root.
"""

from __future__ import annotations

import argparse
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from dicom_node.commands import FAILED, OK, offline, settings_file
from dicom_node.errors import NodeError

__all__ = ["Check", "Finding", "State", "doctor", "examine", "lines"]

WIDTH = 120
_INDENT = " " * 8


class State(Enum):
    """How a thing is: right; right, with something to know; or wrong, with a remedy."""

    OK = "ok"
    NOTE = "note"
    WRONG = "WRONG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: what was looked at, how it is, and what to do where that is something."""

    what: str
    state: State
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Something to look at. `look` may raise NodeError or OSError: that is what is wrong, and `remedy` what to do."""

    what: str
    look: Callable[[], Iterable[Finding]]
    remedy: str
    limit_s: float = 10.0


@dataclass(slots=True)
class _Run:
    check: Check
    began: float = field(default_factory=time.monotonic)
    found: Sequence[Finding] = ()
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        try:
            self.found = tuple(self.check.look())
        except (NodeError, OSError) as exc:
            text = str(exc) if isinstance(exc, NodeError) else exc.strerror or type(exc).__name__
            self.found = (Finding(what=self.check.what, state=State.WRONG, text=text, remedy=self.check.remedy),)
        except Exception as exc:  # noqa: BLE001 - edge: what a check meets, plug-ins too, must not end the others
            text = f"the check itself failed, {type(exc).__name__}"
            self.found = (Finding(what=self.check.what, state=State.WRONG, text=text, remedy=self.check.remedy),)
        self.done.set()

    def result(self) -> Sequence[Finding]:
        if self.done.wait(max(self.began + self.check.limit_s - time.monotonic(), 0.0)):
            return self.found
        text = f"no answer within {self.check.limit_s:g} s"
        return (Finding(what=self.check.what, state=State.WRONG, text=text, remedy=self.check.remedy),)


def examine(alone: Iterable[Check], together: Iterable[Check]) -> Iterator[Finding]:
    """Every check's findings in order; those `together` run side by side, since most of them wait for somebody else."""
    for check in alone:
        yield from _started(check).result()
    runs = [_started(check) for check in together]
    for run in runs:
        yield from run.result()


def _started(check: Check) -> _Run:
    run = _Run(check)
    threading.Thread(target=run, name=f"check-{check.what}", daemon=True).start()
    return run


def lines(finding: Finding) -> list[str]:
    """A finding as it is printed."""
    text = " ".join(f"{finding.text}{'; ' if finding.remedy else ''}{finding.remedy}".split())
    head = f"{finding.state.value:<6}{finding.what}: {text}"
    return textwrap.wrap(head, WIDTH, subsequent_indent=_INDENT, break_on_hyphens=False, break_long_words=False)


def _settings(arguments: argparse.Namespace) -> Finding:
    """Which file everything else is about."""
    file = settings_file(arguments)
    text = str(file.absolute()) if file is not None else "no file: every setting has its default"
    return Finding(what="settings", state=State.OK, text=text)


def doctor(arguments: argparse.Namespace) -> int:
    """Look at everything. Exit status 2 when something is wrong; a configuration that cannot be read is raised."""
    from dicom_node.doctor_checks import checks

    config = offline(arguments)
    wrong = 0
    print("\n".join(lines(_settings(arguments))), flush=True)
    for finding in examine(*checks(config)):
        wrong += finding.state is State.WRONG
        print("\n".join(lines(finding)), flush=True)
    print(f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong" if wrong else "nothing is wrong")
    return FAILED if wrong else OK
