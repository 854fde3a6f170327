"""What the start of a node, and the death of a receiver, need to have loaded: done by a process of its own, which ends.

The supervisor lives as long as the node and opens no catalog, makes no engine and reads no rules: what it would load
for that, 50 MB, it would keep.

    python -m dicom_node.process recovery        orders and answers are lines of JSON
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from io import BufferedReader, BufferedWriter
from typing import Any

from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError, NodeError, StorageError
from dicom_node.lifeline import role_environment, tied_to
from dicom_node.logs import setup_logging

__all__ = ["ROLE", "Recovery", "run_recovery"]

ROLE = "recovery"
END_S = 5.0  # for a process that was killed; one that a disk holds ends when that lets it go
_KINDS = {"ConfigError": ConfigError, "StorageError": StorageError, "NodeError": NodeError}  # the others count as these


class Recovery:
    """Such a process, from the supervisor's side: it loads its modules, and touches nothing before it is asked.

    To be closed (`contextlib.closing`): then there is no such process any more. Each method raises what the process
    raised (ConfigError, StorageError, OSError), and NodeError when it has died; what was not done the next one does.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._unsaid = _line({"config": config.model_dump(mode="json"), "supervisor_pid": os.getpid()})
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dicom_node.process", ROLE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=role_environment(),
            bufsize=0,  # what could not be written shall not be written later
            start_new_session=True,  # Ctrl-C is the supervisor's, who waits for it
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._orders, False)
        self._heard = b""

    def close(self) -> None:
        """End it. Idempotent."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)

    def recover(self) -> None:
        """Migrate the catalog and mend what a crash left. The caller holds the data folder, and no other process runs.

        Before that, peers and users are read: what is wrong with them keeps a node from running.
        """
        self._ask({"step": "recover"})

    def check(self) -> None:
        """Raise what is wrong with rules and engines. May be slow: an engine that cannot run is told on stderr only."""
        self._ask({"step": "check"})

    def end_associations(self, live_epochs: Collection[str], timeout_s: float) -> None:
        """End those of all receivers' lives but these. NodeError also when it takes longer than `timeout_s`."""
        self._ask({"step": "end", "live_epochs": sorted(live_epochs)}, timeout_s)

    def _ask(self, order: dict[str, Any], timeout_s: float | None = None) -> None:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        orders, self._unsaid = self._unsaid + _line(order), b""
        line = self._answer(until) if self._told(orders, until) else None
        if line is None:
            raise NodeError(f"the catalog was not opened within {timeout_s:g} s; see whether the disk hangs")
        if not line:
            self._process.wait()
            status = self._process.returncode
            raise NodeError(f"the {ROLE} process ended with status {status}; see the log")
        kind, *facts = json.loads(line)
        if kind == "OSError":
            raise OSError(*facts)
        if kind:
            raise _KINDS[kind](*facts)

    def _told(self, orders: bytes, until: float | None) -> bool:
        """Whether it took them in time. One that has ended counts as such: its answer is that there is none."""
        with suppress(BrokenPipeError):
            while orders:
                if not select.select([], [self._orders], [], _left(until))[1]:
                    return False
                with suppress(BlockingIOError):
                    orders = orders[os.write(self._orders, orders) :]
        return True

    def _answer(self, until: float | None) -> bytes | None:
        """Its next line; empty when it has ended, None when there was none in time."""
        while b"\n" not in self._heard:
            if not select.select([self._answers], [], [], _left(until))[0]:
                return None
            more = os.read(self._answers, 65536)
            if not more:
                return b""
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line


def _line(said: object) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())


def run_recovery() -> int:
    """The process itself; the exit status. It ends with the supervisor, and by no other signal than SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # whoever stops the node waits for its start
        signal.signal(number, _nothing)
    orders, answers = _pipes()
    from dicom_node.process import EXIT_ERROR, counted
    from dicom_node.starting import take_step  # slow to load

    first = orders.readline()
    if not first:
        return EXIT_ERROR
    facts = json.loads(first)
    if not tied_to(facts["supervisor_pid"]):
        return EXIT_ERROR
    os.umask(0o077)
    config = NodeConfig.model_validate(facts["config"])
    setup_logging(config.log_level, ROLE)
    for line in orders:
        answer: tuple[object, ...] = ("",)
        try:
            with counted(config.data_dir):
                take_step(config, json.loads(line))
        except NodeError as exc:
            answer = (next(kind for kind, known in _KINDS.items() if isinstance(exc, known)), str(exc))
        except OSError as exc:
            answer = ("OSError", exc.errno, exc.strerror, exc.filename)
        answers.write(_line(answer))
        answers.flush()
    return 0


def _pipes() -> tuple[BufferedReader, BufferedWriter]:
    """Orders and answers, for this process alone: engines print, and start processes that read and print."""
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return orders, answers


def _nothing(*_: object) -> None:
    """Unlike SIG_IGN this is not handed on to what an engine starts."""
