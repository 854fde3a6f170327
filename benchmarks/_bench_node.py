"""A node for benchmarks that keeps its folder: started as a user starts it, an archive with default settings."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from _bench_objects import EXPLICIT_LE, SMALL, Batch
from _bench_systems import free_port, without_nodelay
from _raw_client import RawAssociation

__all__ = ["BenchNode", "store_all"]

READY_S = 130.0


class BenchNode:
    """A node on `folder`, on ports of its own; killed at the end of the block where it still runs."""

    ae_title = "DICOM_NODE"

    def __init__(self, folder: Path, *, wait: bool = True, **settings: Any) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.port, self.http_port = free_port(), free_port()
        self._wait = wait
        self._settings = settings

    def __enter__(self) -> BenchNode:
        rules = self.folder / "rules"
        rules.mkdir(parents=True, exist_ok=True)
        settings = {
            "data_dir": str(self.data_dir),
            "rules_dir": str(rules),
            "dicom_port": self.port,
            "http_port": self.http_port,
            "engines": {},
            "jobs": {"workers": 0},
            "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
            **self._settings,
        }
        config = self.folder / "node.yaml"
        config.write_text(json.dumps(settings), encoding="utf-8")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dicom_node.cli", "serve", "--config", str(config)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=without_nodelay(),
            )
        if self._wait:
            self.wait_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.end(signal.SIGTERM)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Until it has said that it is ready."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("dicom-node ready:"):
            raise SystemExit(f"the node did not start; see {self.folder / 'log'}")

    def end(self, number: signal.Signals) -> None:
        """Send it that signal and wait for its end; its children end with it."""
        self._process.send_signal(number)
        self._process.wait(timeout=60)

    def store_study(self, count: int = 50) -> str:
        """Store one study of small images; its Study Instance UID."""
        batch = Batch(SMALL, count)
        association = RawAssociation(self.port, self.ae_title, {SMALL.sop_class_uid: EXPLICIT_LE})
        store_all(association, batch)
        association.release()
        return batch.study_uid(0)


def store_all(association: RawAssociation, batch: Batch) -> None:
    """Every image of the batch, one after the other."""
    for image in map(batch.image, range(len(batch))):
        association.store(image.sop_class_uid, image.sop_instance_uid, [image.head, image.pixels])
