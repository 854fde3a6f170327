"""The work process: workers, engines, encoders. No torch: models run in the engines' own children.

Several workers make a pipeline: while one waits for the device, another reads its series, a third encodes its results.
One more takes urgent jobs only, so that these never wait for a worker.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dicom_node.decoding import close_decoders, use_decoders
from dicom_node.errors import LeaseLost, NodeError
from dicom_node.interfaces import Clock, seconds_since
from dicom_node.metrics import Metrics
from dicom_node.model import BootTime, Priority
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.pipeline.work import TIMEOUT_S, Worker, job_bound_s
from dicom_node.process import Facts, Orders
from dicom_node.wiring import encoders, engines, node_catalog, node_ingest

__all__ = ["Work"]

log = logging.getLogger(__name__)

IDLE_S = 0.2  # how often an idle worker looks for a job
WORKER_PAUSE_S = 2.0  # after the catalog could not be had
STOP_PAUSE_S = 2.0  # how often it is looked for work at engines that is to be stopped


class Work:
    """Workers: jobs, engines, encoders. The engines' own children hold the models."""

    def __init__(self, orders: Orders, clock: Clock) -> None:
        self._config, self._clock = orders.config, clock
        self._stopping = threading.Event()
        self._catalog = node_catalog(self._config, clock)
        self._engines = engines(self._config)
        use_decoders(self._config.jobs.decoders)
        self._metrics = Metrics(self._config, process="work")
        for engine in self._engines.values():
            if (observe := getattr(engine, "observe", None)) is not None:
                observe(self._metrics.engine_requested)
        self._ended: Counter[tuple[str, str]] = Counter()  # runtimes, as far as counted
        self._worker = self._make_worker()
        # beyond it no job keeps its lease (pipeline.work), so whoever still works on one is stuck
        longest_s = max((one.timeout_s for one in self._config.engines.values()), default=TIMEOUT_S)
        self._bound_s = job_bound_s(longest_s)
        self._busy_since: dict[str, BootTime] = {}
        wanted = [(f"work-{number}", Priority.BACKGROUND) for number in range(self._config.jobs.workers)]
        if wanted:
            wanted.append(("work-urgent", Priority.URGENT))
        self._threads = [
            threading.Thread(target=self._run, args=(name, at_least), name=name, daemon=True)
            for name, at_least in wanted
        ]
        self._others = (
            threading.Thread(target=self._warm_up, name="warm-up", daemon=True),
            threading.Thread(target=self._stop_engines, name="stop-engines", daemon=True),
        )
        for thread in (*self._threads, *(self._others if self._threads else ())):
            thread.start()

    def _make_worker(self) -> Worker:
        config = self._config
        return Worker(
            self._catalog.queue,
            engines=self._engines,
            timeouts_s={name: settings.timeout_s for name, settings in config.engines.items()},
            encoders=encoders(),
            stage=node_ingest(self._catalog, config, self._clock).stage,
            read_header=read_series_header,
            settings=config.jobs,
            node_name=config.ae_titles[0],
            time_zone=config.time_zone,
            clock=self._clock,
            observer=self._metrics,
            stopping=self._stopping.is_set,
            keep=self._catalog.quarantine.keep,
        )

    def _run(self, name: str, at_least: Priority) -> None:
        while not self._stopping.is_set():
            self._busy_since[name] = self._clock.boot()
            try:
                busy, pause_s = self._worker.run_once(name, at_least=at_least), IDLE_S
            except Exception as exc:  # edge: the worker's loop; a lost lease runs out and is done again
                log.error("a worker stumbled", extra={"worker": name}, exc_info=exc)
                busy, pause_s = False, WORKER_PAUSE_S
            finally:
                del self._busy_since[name]
            if not busy:
                self._stopping.wait(pause_s)

    def _stop_engines(self) -> None:
        """Tell engines to stop what nobody waits for; apart from the workers, which a slow engine must not hold up."""
        while not self._stopping.is_set():
            try:
                busy = self._worker.stop_once()
            except Exception as exc:  # edge: the worker's loop; the try is counted, there are others
                log.error("an engine could not be told to stop", exc_info=exc)
                busy = False
            if not busy:
                self._stopping.wait(STOP_PAUSE_S)

    def _warm_up(self) -> None:
        """Load what engines can load before the first study needs it. What fails here is told by the first job."""
        for name, engine in self._engines.items():
            warm_up = getattr(engine, "warm_up", None)
            if warm_up is None or self._stopping.is_set():
                continue
            try:
                warm_up(self._go_on)
            except NodeError as exc:
                log.warning("an engine could not be warmed up", extra={"engine": name, "error": str(exc)})

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise LeaseLost("the node stops")

    def health(self) -> Facts:
        """How many workers live; not ok when one is dead, or stuck in its job. The supervisor then starts anew."""
        alive = sum(thread.is_alive() for thread in self._threads)
        wanted, now = len(self._threads), self._clock.boot()
        stuck = sum(seconds_since(since, now) > self._bound_s for since in list(self._busy_since.values()))
        facts = {"workers_alive": alive, "workers_stuck": stuck, "runtimes": self._runtimes()}
        facts["unusable"] = {name: why for name, one in self._engines.items() if (why := getattr(one, "trouble", ""))}
        facts["engines"] = {name: dict(gauges()) for name, gauges in self._gauges()}
        if alive < wanted:
            return False, f"{alive} of {wanted}", facts
        return stuck == 0, f"{stuck} of {wanted} stuck in a job" if stuck else "", facts

    def _gauges(self) -> Iterator[tuple[str, Callable[[], Mapping[str, float]]]]:
        for name, engine in self._engines.items():
            if (gauges := getattr(engine, "gauges", None)) is not None:
                yield name, gauges

    def _runtimes(self) -> list[dict[str, Any]]:
        """How the engines' devices stand; what ended since the last time is counted."""
        found: dict[str, dict[str, Any]] = {}
        for engine in self._engines.values():
            for runtime in getattr(engine, "facts", tuple)():
                found[runtime["device"]] = runtime
        ended = Counter({(device, why): n for device, one in found.items() for why, n in one["restarts"].items()})
        for (device, reason), count in (ended - self._ended).items():
            self._metrics.runtime_ended(device, reason, count)
        self._ended = ended
        return [{key: one[key] for key in ("device", "breaker", "models")} for one in found.values()]

    def reload(self) -> None:
        """Nothing of a worker is re-read."""

    def stop(self) -> None:
        """Work under way is dropped; its lease runs out and it is done again."""
        self._stopping.set()
        for engine in self._engines.values():
            engine.close()
        close_decoders()
        for thread in (*self._threads, *self._others):
            if thread.ident is not None:
                thread.join(timeout=5.0)
        self._catalog.close()
