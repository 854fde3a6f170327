"""The work process: workers, engines, encoders. No torch: models run in the engines' own children.

Several workers make a pipeline: while one waits for the device, another reads its series, a third encodes its results.
One more takes urgent jobs only, so that these never wait for a worker.

Each engine outside has workers of its own, which do no other's jobs: one that is slow or never answers holds up nobody
else, however many series wait for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from dicom_node.apart import Call
from dicom_node.backpressure import disk_facts, pressed_elsewhere
from dicom_node.bells import Bell
from dicom_node.decoding import close_decoders, use_decoders
from dicom_node.errors import EngineTimeout, LeaseLost, NodeError
from dicom_node.interfaces import Clock, Engine, seconds_since
from dicom_node.metrics import Metrics
from dicom_node.model import BootTime, Level, Priority
from dicom_node.nudge import Nudge
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.pipeline.work import TIMEOUT_S, Worker, job_bound_s
from dicom_node.process import Facts, Orders
from dicom_node.store.pressure import Grade
from dicom_node.trails import node_trail
from dicom_node.watching import WAIT_S, EngineWatch, Observing, Standing, observing
from dicom_node.wiring import encoders, engine_workers, engines, node_catalog, node_ingest

__all__ = ["Work"]

log = logging.getLogger(__name__)

IDLE_S = 0.2  # how often an idle worker looks for a job
WORKER_PAUSE_S = 2.0  # after the catalog could not be had
METHOD_S = 5.0  # how long is waited for what promises to be quick
WARM_UP_S = 300.0  # after this the next engine is warmed up beside it
CLOSE_S = 3.0
STOP_PAUSE_S = 2.0  # how often it is looked for work at engines that is to be stopped


class Work:
    """Workers: jobs, engines, encoders. The engines' own children hold the models."""

    def __init__(self, orders: Orders, clock: Clock) -> None:
        self._config, self._clock = orders.config, clock
        self._stopping = threading.Event()
        self._nudge = Nudge()
        self._bell, self._service_bell = Bell(orders.work_bell), Bell(orders.service_bell)
        self._catalog = node_catalog(self._config, clock, migrated=orders.migrated)
        self._engines = engines(self._config, stand_in=True, returns=self._catalog.queue)
        use_decoders(self._config.jobs.decoders)
        self._metrics = Metrics(self._config, process="work")
        self._audit = node_trail(self._config, "work", clock, self._metrics, self._catalog.index.patient_ids)
        self._catalog.pressure.observer = self._metrics
        self._observe()
        self._watches = {
            name: EngineWatch(name, engine, clock, self._metrics.engine_misbehaved)
            for name, engine in self._engines.items()
        }
        self._ended: Counter[tuple[str, str]] = Counter()  # runtimes, as far as counted
        self._worker = self._make_worker()
        # beyond it no job keeps its lease (pipeline.work), so whoever still works on one is stuck
        longest_s = max((one.timeout_s for one in self._config.engines.values()), default=TIMEOUT_S)
        self._bound_s = job_bound_s(longest_s)
        self._busy_since: dict[str, BootTime] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(name, take), name=name, daemon=True)
            for name, take in self._takers().items()
        ]
        self._others = (
            threading.Thread(target=self._warm_up, name="warm-up", daemon=True),
            threading.Thread(target=self._stop_engines, name="stop-engines", daemon=True),
        )
        for thread in (*self._threads, *(self._others if self._threads else ())):
            thread.start()
        self._bell.answer(self._nudge.give)

    def _takers(self) -> Mapping[str, Callable[[str], bool]]:
        """The workers by name, and how each takes a job."""
        workers = self._config.jobs.workers
        if not workers:
            return {}
        outside = engine_workers(self._config)
        here = partial(self._worker.run_once, without=tuple(outside))
        takers: dict[str, Callable[[str], bool]] = {f"work-{number}": here for number in range(workers)}
        takers["work-urgent"] = partial(here, at_least=Priority.URGENT)
        for name, count in outside.items():
            for number in range(count):
                takers[f"work-{name}-{number}"] = partial(self._worker.run_once, engine=name)
        return takers

    def _observe(self) -> None:
        for name, engine in self._engines.items():
            observer = observing(name, self._metrics.engine_requested, self._metrics.engine_misbehaved)

            def tell(engine: Engine = engine, observer: Observing = observer) -> None:
                if (observe := getattr(engine, "observe", None)) is not None:
                    observe(observer)

            self._guarded(name, "observe", tell)

    def _guarded(self, name: str, method: str, call: Callable[[], object], wait_s: float = METHOD_S) -> None:
        """Call an engine's own code apart; what it raises and how long it takes is told, and is not the process's."""
        until_s = time.monotonic() + wait_s
        try:
            made = Call(call, f"{name}.{method}")
            while not made.ended(IDLE_S):
                if method == "warm_up" and self._stopping.is_set():
                    return
                if time.monotonic() > until_s:
                    raise EngineTimeout(f"engine {name}: {method} has not returned within {wait_s:g} s")
            made.result()
        except LeaseLost:
            return  # the node stops
        except Exception as exc:  # edge: a plug-in's code
            if isinstance(exc, EngineTimeout) or not isinstance(exc, NodeError):
                self._metrics.engine_misbehaved(name, method)
            log.warning("an engine's method failed", extra={"engine": name, "method": method}, exc_info=exc)

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
            begin_at_least=self._begin_at_least,
            study_instances=lambda study: self._catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [study]}),
            audit=self._audit,
        )

    def _begin_at_least(self) -> Priority | None:
        """How urgent a job must be to be begun, as the disk stands; what engines work on already is gone on with."""
        grade = self._catalog.pressure.background()
        if grade is Grade.FULL:
            return None
        return Priority.BACKGROUND if grade is Grade.OPEN else Priority.URGENT

    def _run(self, name: str, take: Callable[[str], bool]) -> None:
        while not self._stopping.is_set():
            seen = self._nudge.count
            self._busy_since[name] = self._clock.boot()
            try:
                busy, pause_s = take(name), IDLE_S
            except Exception as exc:  # edge: the worker's loop; a lost lease runs out and is done again
                log.error("a worker stumbled", extra={"worker": name}, exc_info=exc)
                busy, pause_s = False, WORKER_PAUSE_S
            finally:
                del self._busy_since[name]
            if busy:
                self._service_bell.ring()  # there may be something to deliver
            else:
                self._nudge.wait(seen, pause_s)

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
            if self._stopping.is_set():
                return

            def warm_up(engine: Engine = engine) -> None:
                if (method := getattr(engine, "warm_up", None)) is not None:
                    method(self._go_on)

            self._guarded(name, "warm_up", warm_up, WARM_UP_S)

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise LeaseLost("the node stops")

    def health(self) -> Facts:
        """How many workers live; not ok when one is dead, or stuck in its job. The supervisor then starts anew."""
        alive = sum(thread.is_alive() for thread in self._threads)
        wanted, now = len(self._threads), self._clock.boot()
        stuck = sum(seconds_since(since, now) > self._bound_s for since in list(self._busy_since.values()))
        standings = self._standings()
        facts = {"workers_alive": alive, "workers_stuck": stuck, "runtimes": self._runtimes(standings.values())}
        facts |= disk_facts(self._catalog.pressure)
        self._catalog.pressure.told(pressed_elsewhere(self._config, self._clock))
        facts["unusable"] = {name: one.trouble for name, one in standings.items() if one.trouble}
        facts["engines"] = {name: dict(one.gauges) for name, one in standings.items()}
        facts["misbehaving"] = {name: watch.fault for name, watch in self._watches.items() if watch.fault}
        if alive < wanted:
            return False, f"{alive} of {wanted}", facts
        return stuck == 0, f"{stuck} of {wanted} stuck in a job" if stuck else "", facts

    def _standings(self) -> dict[str, Standing]:
        """How every engine stands, within WAIT_S for all of them together."""
        for watch in self._watches.values():
            watch.begin()
        until_s = time.monotonic() + WAIT_S
        return {name: one.standing(max(until_s - time.monotonic(), 0.0)) for name, one in self._watches.items()}

    def _runtimes(self, standings: Iterable[Standing]) -> list[dict[str, Any]]:
        """How the engines' devices stand; what ended since the last time is counted."""
        found: dict[str, Mapping[str, Any]] = {}
        for standing in standings:
            for runtime in standing.runtimes:
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
        self._nudge.give()
        self._bell.stop()
        closing = [
            threading.Thread(target=self._guarded, args=(name, "close", engine.close, CLOSE_S), daemon=True)
            for name, engine in self._engines.items()
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(CLOSE_S)
        close_decoders()
        for thread in (*self._threads, *self._others):
            if thread.ident is not None:
                thread.join(timeout=5.0)
        self._audit.close()
        self._catalog.close()
