"""Engines whose own code raises, hangs or answers nonsense: the work process goes on, says so once, and counts it."""

import json
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dicom_node.apart import Apart
from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, NodeConfig
from dicom_node.errors import ConfigError, EngineTimeout, EngineUnavailable
from dicom_node.metrics import Gauges, render
from dicom_node.model import BootTime, Priority
from dicom_node.process import Orders
from dicom_node.watching import LATE_S, MAX_TEXT, EngineWatch, observing
from dicom_node.wiring import Unmade, engine_workers, engines
from dicom_node.worker import Work

PLUG_IN = '''
import sys, threading
from dicom_node.errors import EngineRejected

class Bad:
    """Does everything wrong that is not its run."""

    def __init__(self, name, settings, *, devices=()):
        if settings.options.get("unmade") and "work" in sys.argv:
            raise ValueError("only in the work process")
        self.name, self._options = name, settings.options

    @property
    def trouble(self):
        raise ZeroDivisionError("Doe^John")

    def gauges(self):
        threading.Event().wait() if self._options.get("hangs") else None
        return {"breaker_state": "open", 7: 7}

    def facts(self):
        return [{"device": "gpu"}]

    def observe(self, observer):
        sys.exit("Doe^John")

    def warm_up(self, heartbeat):
        threading.Event().wait()

    def check(self):
        """It could run."""

    def run(self, task, heartbeat):
        raise EngineRejected("it takes nothing")

    def cancel(self, handle):
        threading.Event().wait()

    def close(self):
        raise KeyError("Doe^John")
'''


class Told:
    """What was told of misbehaviour, and a clock that is moved."""

    def __init__(self) -> None:
        self.of: list[tuple[str, str]] = []
        self.now_s = 0.0

    def __call__(self, engine: str, method: str) -> None:
        self.of.append((engine, method))

    def wall(self) -> Any:
        return SystemClock().wall()

    def boot(self) -> BootTime:
        return BootTime(boot_id="one", seconds=self.now_s)


def watched(engine: Any, told: Told) -> EngineWatch:
    return EngineWatch("bad", engine, told, told)  # type: ignore[arg-type]


def looked(watch: EngineWatch) -> Any:
    watch.begin()
    return watch.standing(5.0)


class Fine:
    """As it should be."""

    trouble = ""

    def gauges(self) -> Mapping[str, float]:
        return {"breaker_state": 1.0}

    def facts(self) -> Any:
        return [{"device": "gpu", "restarts": {"died": 2}, "breaker": 0, "models": [["m", "1"]], "calls": 3}]


# --- one engine, asked


def test_an_engine_that_behaves_is_believed() -> None:
    told = Told()
    standing = looked(watched(Fine(), told))
    assert (standing.trouble, dict(standing.gauges)) == ("", {"breaker_state": 1.0})
    assert [one["device"] for one in standing.runtimes] == ["gpu"] and told.of == []


def test_an_engine_without_any_of_it_stands_well() -> None:
    told = Told()
    assert looked(watched(object(), told)).trouble == "" and told.of == []


@pytest.mark.parametrize(
    ("method", "answer", "how"),
    [
        ("trouble", 7, "is a int, not a text"),
        ("gauges", [1], "is a list, not at most 32 numbers by name"),
        ("gauges", {"breaker_state": float("nan")}, "has a float that is no finite number"),
        ("gauges", {"breaker_state": "open"}, "has a str that is no finite number"),
        ("gauges", {n: 1.0 for n in range(3)}, "not at most 32 numbers by name"),
        ("gauges", {str(n): 1.0 for n in range(33)}, "not at most 32 numbers by name"),
        ("facts", "none", "is a str, not at most 64 devices"),
        ("facts", [{"device": "gpu"}], "does not describe devices"),
        ("facts", [None], "does not describe devices"),
        ("facts", [{"device": "gpu", "restarts": 3, "breaker": 0, "models": []}], "does not describe devices"),
    ],
)
def test_nonsense_is_left_out_and_told(method: str, answer: Any, how: str) -> None:
    class Bad(Fine):
        pass

    setattr(Bad, method, answer if method == "trouble" else lambda self: answer)
    told = Told()
    watch = watched(Bad(), told)
    standing = looked(watch)
    assert told.of == [("bad", method)] and how in watch.fault
    assert standing.trouble == "" and (method == "gauges") is (not standing.gauges)
    assert (method == "facts") is (standing.runtimes == ())


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, RecursionError])
def test_what_it_raises_is_told_by_its_type_once_for_each_change_and_counted_each_time(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Bad(Fine):
        well = False

        def gauges(self) -> Mapping[str, float]:
            if self.well:
                return super().gauges()
            raise kind("Doe^John")

    engine, told = Bad(), Told()
    watch = watched(engine, told)
    with caplog.at_level(logging.INFO, "dicom_node.watching"):
        for _ in range(3):
            assert looked(watch).runtimes, "the rest is still believed"
        assert watch.fault == f"gauges raised {kind.__name__}" and "Doe" not in watch.fault
        engine.well = True
        assert looked(watch).gauges == {"breaker_state": 1.0} and watch.fault == ""
        engine.well = False
        looked(watch)
    assert told.of == [("bad", "gauges")] * 4
    messages = [record.message for record in caplog.records]
    assert messages == ["an engine misbehaves", "an engine behaves again", "an engine misbehaves"]
    assert {record.engine for record in caplog.records} == {"bad"}  # type: ignore[attr-defined]


def test_runtimes_that_are_not_told_once_do_not_look_like_none() -> None:
    class Bad(Fine):
        well = True

        def facts(self) -> Any:
            return super().facts() if self.well else None

    engine = Bad()
    watch = watched(engine, Told())
    before = looked(watch).runtimes
    engine.well = False
    assert looked(watch).runtimes == before and "facts" in watch.fault


def test_a_long_trouble_is_cut_and_made_printable() -> None:
    class Bad(Fine):
        trouble = "no\x1b[31m " * 10_000

    standing = looked(watched(Bad(), Told()))
    assert len(standing.trouble) <= MAX_TEXT and "\x1b" not in standing.trouble and standing.trouble.startswith("no")


def test_an_engine_that_hangs_costs_one_thread_and_is_told_once_until_it_returns(
    caplog: pytest.LogCaptureFixture, begun_threads: Callable[[], list[str]]
) -> None:
    go = threading.Event()

    class Bad(Fine):
        def gauges(self) -> Mapping[str, float]:
            go.wait(30)
            return super().gauges()

    told = Told()
    watch = watched(Bad(), told)
    with caplog.at_level(logging.INFO, "dicom_node.watching"):
        for _ in range(50):
            watch.begin()
            watch.standing(0.001)
        assert len(begun_threads()) == 1 and told.of == [], "it may only be slow"
        told.now_s += LATE_S + 1
        watch.standing(0.001)
        for _ in range(50):
            watch.begin()
            watch.standing(60.0)  # of one that hangs nothing is waited for
        assert told.of == [("bad", "hangs")] and watch.fault.startswith("hangs for more than 10 s")
        go.set()
        while watch.fault:
            watch.begin()
            assert watch.standing(1.0) is not None
        assert looked(watch).gauges == {"breaker_state": 1.0}
    assert [record.message for record in caplog.records] == ["an engine misbehaves", "an engine behaves again"]


def test_an_observer_counts_under_the_engines_own_name_and_never_raises() -> None:
    heard: list[tuple[str, str, float]] = []
    told = Told()
    observe = observing("bad", lambda *seen: heard.append(seen), told)
    observe("another", "ok", 0.5)
    observe("bad", ["ok"], float("nan"))
    observe("bad", "ok", "soon")
    assert heard == [("bad", "ok", 0.5)] and told.of == [("bad", "observe")] * 2


# --- calls apart


def test_a_call_that_does_not_return_is_left_alone_and_is_the_only_one() -> None:
    apart, go = Apart("bad.cancel"), threading.Event()
    with pytest.raises(EngineTimeout, match=r"bad\.cancel: no return within"):
        apart.call(lambda: go.wait(30), 0.01)
    with pytest.raises(EngineUnavailable, match="has not returned yet"):
        apart.call(lambda: None, 5.0)
    go.set()
    deadline = time.monotonic() + 10
    while True:
        try:
            assert apart.call(lambda: 7, 5.0) == 7
            break
        except EngineUnavailable:
            assert time.monotonic() < deadline


def test_what_would_end_the_process_is_an_error_of_the_call() -> None:
    def leave() -> None:
        raise SystemExit(0)

    with pytest.raises(RuntimeError, match="SystemExit"):
        Apart("bad").call(leave, 5.0)


# --- the work process's part


class Hostile:
    """Every method of it hangs or raises."""

    name = "bad"

    def __init__(self) -> None:
        self.go = threading.Event()

    @property
    def trouble(self) -> str:
        raise ZeroDivisionError

    def gauges(self) -> Any:
        self.go.wait(60)
        return {}

    def observe(self, observer: Any) -> None:
        raise SystemExit(1)

    def warm_up(self, heartbeat: Any) -> None:
        raise MemoryError

    def close(self) -> None:
        raise KeyError("x")


class Calm(Fine):
    """Told to warm up and closed, as it should be."""

    name = "good"

    def __init__(self) -> None:
        self.warmed, self.closed = threading.Event(), False
        self.observer: Any = None

    def observe(self, observer: Any) -> None:
        self.observer = observer

    def warm_up(self, heartbeat: Any) -> None:
        self.warmed.set()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Work, Hostile, Calm]]:
    bad, good = Hostile(), Calm()
    monkeypatch.setattr("dicom_node.worker.engines", lambda config, **how: {"bad": bad, "good": good})
    (tmp_path / "rules").mkdir()
    settings: dict[str, Any] = {
        "data_dir": tmp_path,
        "rules_dir": tmp_path / "rules",
        "jobs": {"workers": 1},
        "engines": {"bad": EngineSettings(kind="plug"), "good": EngineSettings(kind="plug")},
    }
    work = Work(Orders(config=NodeConfig(**settings), supervisor_pid=1), SystemClock())
    yield work, bad, good
    bad.go.set()
    work.stop()
    assert good.closed, "one that cannot be closed does not keep the others open"


def test_a_hostile_engine_stalls_neither_the_signs_of_life_nor_the_others(beside: tuple[Work, Hostile, Calm]) -> None:
    work, _, good = beside
    assert good.warmed.wait(10) and good.observer is not None
    began = time.monotonic()
    for _ in range(4):
        ok, detail, facts = work.health()
        assert ok and detail == ""
        assert facts["engines"]["good"] == {"breaker_state": 1.0}
        json.dumps(facts)
    assert time.monotonic() - began < 4.0, "each is given within a fraction of a second"
    good.observer("bad", "ok", 0.1)
    text = render(work._metrics, Gauges(lambda: ()))[1].decode()
    assert 'engine_misbehaved_total{engine="bad",method="observe"} 1.0' in text
    assert 'engine_requests_total{engine="good",outcome="ok"} 1.0' in text
    assert 'engine_misbehaved_total{engine="good",method="observe"} 0.0' in text


# --- one that is slow


def test_an_engine_that_never_answers_takes_no_worker_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rules").mkdir()
    outside, local = EngineSettings(kind="plug"), EngineSettings(model="demo-ct-abdomen")
    settings: dict[str, Any] = {"data_dir": tmp_path, "rules_dir": tmp_path / "rules", "jobs": {"workers": 3}}
    config = NodeConfig(**settings, engines={"slow": outside, "quick": outside, "ct": local})
    made = {name: Calm() for name in config.engines}
    monkeypatch.setattr("dicom_node.worker.engines", lambda config, **how: made)
    go, guard, asked = threading.Event(), threading.Lock(), dict.fromkeys(("slow", "quick", "here", "urgent"), 0)

    def run_once(self: Any, worker: str, **how: Any) -> bool:
        """There are endless jobs of `slow`: whoever may take one never returns."""
        engine, without = how.get("engine"), how.get("without", ())
        with guard:
            asked[engine or ("urgent" if how.get("at_least") is Priority.URGENT else "here")] += 1
        if engine == "slow" or (engine is None and "slow" not in without):
            go.wait(30)
        return False

    monkeypatch.setattr("dicom_node.worker.Worker.run_once", run_once)
    work = Work(Orders(config=config, supervisor_pid=1), SystemClock())
    try:
        deadline = time.monotonic() + 15
        while min(asked["quick"], asked["here"], asked["urgent"]) < 8:
            assert time.monotonic() < deadline, asked
            time.sleep(0.02)
        assert asked["slow"] == engine_workers(config)["slow"] == 2
        assert work.health()[2]["workers_alive"] == 3 + 1 + sum(engine_workers(config).values())
    finally:
        go.set()
        work.stop()


# --- making them


def test_a_plug_in_that_cannot_be_made_names_its_key_and_at_work_lets_its_jobs_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, *_: object, **__: object) -> None:
            raise ValueError("Doe^John")

    real = engines.__globals__["engine_class"]
    monkeypatch.setattr("dicom_node.wiring.engine_class", lambda kind: Broken if kind == "plug" else real(kind))
    settings = {"bad": EngineSettings(kind="plug"), "ct": EngineSettings(model="demo-ct-abdomen")}
    config = NodeConfig(data_dir=tmp_path, engines=settings)
    with pytest.raises(ConfigError, match=r"engines\.bad: its kind 'plug' cannot be made, ValueError") as caught:
        engines(config)
    assert "Doe" not in str(caught.value)
    made = engines(config, stand_in=True)
    assert isinstance(made["bad"], Unmade) and "ValueError" in made["bad"].trouble and made["ct"].name == "ct"
    for wrong in (lambda: made["bad"].run(None, lambda: None), lambda: made["bad"].cancel_noted("x")):  # type: ignore[arg-type]
        with pytest.raises(EngineUnavailable):
            wrong()
    for engine in made.values():
        engine.close()


def test_the_nodes_own_kinds_share_one_memory_for_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, Mapping[str, Any]]] = []

    class Kind:
        def __init__(self, name: str, settings: EngineSettings, **more: Any) -> None:
            self.name = name
            given.append((settings.kind, more))

    monkeypatch.setattr("dicom_node.wiring.engine_class", lambda kind: Kind)
    kinds = ("local", "monai_label", "leapai", "plug")
    config = NodeConfig(
        data_dir=tmp_path, engines={kind: EngineSettings(kind=kind) for kind in kinds}, jobs={"prepared_mb": 3}
    )
    engines(config)
    by_kind = dict(given)
    memories = {id(by_kind[kind]["memory"]) for kind in ("local", "monai_label", "leapai")}
    assert len(memories) == 1 and by_kind["local"]["memory"].size == 3 << 20
    assert set(by_kind["plug"]) == {"devices"}, "plug-ins are promised no more"


# --- a real node


def _installed(folder: Path) -> None:
    """A plug-in as another package would bring it."""
    (folder / "bad_engine.py").write_text(PLUG_IN)
    info = folder / "bad_engine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dicom_node.engines]\nbad = bad_engine:Bad\n")


def test_a_real_node_works_on_beside_an_engine_that_misbehaves_in_every_way(
    running_node: Callable[..., Any],
    wait_for: Callable[..., None],
    tool: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dicom_node.demo.phantom_dicom import write_cxr

    plug_ins, rules = tmp_path / "plug-ins", tmp_path / "rules"
    plug_ins.mkdir()
    rules.mkdir()
    _installed(plug_ins)
    monkeypatch.setenv("PYTHONPATH", str(plug_ins))
    (rules / "one.yaml").write_text("rule: one\nwhen:\n  - Modality == 'DX'\nrun:\n  engine: bad\n  results: [sr]\n")
    kinds: dict[str, dict[str, Any]] = {"bad": {"kind": "bad", "options": {"hangs": True}}, "odd": {"kind": "bad"}}
    kinds["un"] = {"kind": "bad", "options": {"unmade": True}}
    node = running_node(rules_dir=str(rules), engines=kinds, jobs={"workers": 1})
    pulse = node.data_dir / "run" / "work.json"

    def facts() -> Any:
        return json.loads(pulse.read_text())

    wait_for(lambda: {"odd"} <= set(facts()["facts"].get("misbehaving", {})), 30.0, "the odd one is told")
    first, pid = facts()["boot_s"], facts()["pid"]
    assert "only in the work process" not in node.log.read_text() and "un" in facts()["facts"]["unusable"]
    write_cxr(tmp_path / "1.dcm", 1, rows=64, columns=64, view="PA")
    send = [tool("storescu"), "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port), str(tmp_path / "1.dcm")]
    subprocess.run(send, check=True, capture_output=True, timeout=60)
    wait_for(lambda: "it takes nothing" in node.command("jobs", "list").stdout, 30.0, f"its job; {node.tail()}")
    wait_for(lambda: facts()["boot_s"] > first + 2.0, 20.0, "signs of life go on")
    assert facts()["pid"] == pid and facts()["ok"]
    page = node.get("/metrics")[1]
    assert 'engine_misbehaved_total{engine="odd",method="trouble"} 0.0' not in page
    assert 'engine_misbehaved_total{engine="odd",method="trouble"}' in page
    assert "odd" in node.get("/ready")[1]
    assert "Doe" not in node.log.read_text()
