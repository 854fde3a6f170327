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
from collections.abc import Collection
from types import TracebackType
from typing import Any, Self

from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError, NodeError, StorageError
from dicom_node.lifeline import tied_to
from dicom_node.logs import setup_logging

__all__ = ["ROLE", "Recovery", "run_recovery"]

ROLE = "recovery"
EXIT_ERROR = 2
_KINDS = {"ConfigError": ConfigError, "StorageError": StorageError, "NodeError": NodeError}  # the others count as these


class Recovery:
    """Such a process, from the supervisor's side: it loads its modules, and touches nothing before it is asked.

    A context: at its end there is no such process any more. Each method raises what the process raised (ConfigError,
    StorageError, OSError), and NodeError when it has died; what was not done the next one does.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dicom_node.process", ROLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._tell({"config": config.model_dump(mode="json"), "supervisor_pid": os.getpid()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it. Idempotent."""
        self._process.kill()
        with self._process:  # closes its pipes, and waits
            pass

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
        self._tell(order)
        answers = self._process.stdout
        assert answers is not None
        if not select.select([answers], [], [], timeout_s)[0]:
            raise NodeError(f"the catalog was not opened within {timeout_s:g} s; see whether the disk hangs")
        line = answers.readline()
        if not line:
            status = self._process.wait()
            raise NodeError(f"the {ROLE} process ended with status {status}; see the log")
        kind, *facts = json.loads(line)
        if kind == "OSError":
            raise OSError(*facts)
        if kind:
            raise _KINDS.get(kind, NodeError)(*facts)

    def _tell(self, order: dict[str, Any]) -> None:
        orders = self._process.stdin
        assert orders is not None
        try:
            orders.write(json.dumps(order).encode() + b"\n")
            orders.flush()
        except BrokenPipeError:
            pass  # how it ended is seen where its answer is read


def run_recovery() -> int:
    """The process itself; the exit status. It ends with the supervisor, and by no other signal than SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # whoever stops the node waits for its start
        signal.signal(number, signal.SIG_IGN)
    from dicom_node.process import counted
    from dicom_node.starting import take_step  # slow to load

    first = sys.stdin.buffer.readline()
    if not first:
        return EXIT_ERROR
    facts = json.loads(first)
    if not tied_to(facts["supervisor_pid"]):
        return EXIT_ERROR
    os.umask(0o077)
    config = NodeConfig.model_validate(facts["config"])
    setup_logging(config.log_level, ROLE)
    for line in sys.stdin.buffer:
        answer: tuple[object, ...] = ("",)
        try:
            with counted(config.data_dir):
                take_step(config, json.loads(line))
        except NodeError as exc:
            answer = (next(kind for kind, known in _KINDS.items() if isinstance(exc, known)), str(exc))
        except OSError as exc:
            answer = ("OSError", exc.errno, exc.strerror, exc.filename)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0
