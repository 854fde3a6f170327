"""How engines stand, asked so that none of them can end or hold up the process that asks. Part of the composition root.

`Engine.trouble`, `gauges` and `facts` promise to be quick and to raise nothing; a plug-in may break that promise. Each
engine is asked in a thread of its own, its answers are checked, and what does not hold is left out and told: in the
log once for each change, in a counter, and as `fault`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dicom_node.apart import Call
from dicom_node.interfaces import Clock, seconds_since

__all__ = ["EngineWatch", "Misbehaved", "Observing", "Standing", "observing"]

log = logging.getLogger(__name__)

WAIT_S = 0.25  # how long is waited for an answer; one that is late is taken with the next look
LATE_S = 10.0  # after this an engine that has not said how it is counts as hanging
MAX_GAUGES = 32
MAX_RUNTIMES = 64
MAX_TEXT = 500

Misbehaved = Callable[[str, str], None]
"""Told the engine's name and the method."""

Observing = Callable[[Any, Any, Any], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What one engine says of itself, checked. `runtimes` as `models.runtime_pool.RuntimePool.facts`."""

    trouble: str = ""
    gauges: Mapping[str, float] = field(default_factory=dict)
    runtimes: tuple[Mapping[str, Any], ...] = ()


class _Nonsense(Exception):
    """The answer is not what was promised; the text names the type only."""


def _trouble(engine: Any) -> str:
    told = getattr(engine, "trouble", "")
    if not isinstance(told, str):
        raise _Nonsense(f"is a {type(told).__name__}, not a text")
    return " ".join("".join(one if one.isprintable() else " " for one in told[: 2 * MAX_TEXT]).split())[:MAX_TEXT]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Nonsense(f"has a {type(value).__name__} that is no finite number")
    return float(value)


def _gauges(engine: Any) -> Mapping[str, float]:
    told = gauges() if (gauges := getattr(engine, "gauges", None)) is not None else {}
    if not isinstance(told, Mapping) or len(told) > MAX_GAUGES or not all(isinstance(name, str) for name in told):
        raise _Nonsense(f"is a {type(told).__name__}, not at most {MAX_GAUGES} numbers by name")
    return {name[:MAX_TEXT]: _number(value) for name, value in told.items()}


def _facts(engine: Any) -> tuple[Mapping[str, Any], ...]:
    told = facts() if (facts := getattr(engine, "facts", None)) is not None else ()
    if not isinstance(told, Sequence) or isinstance(told, str) or len(told) > MAX_RUNTIMES:
        raise _Nonsense(f"is a {type(told).__name__}, not at most {MAX_RUNTIMES} devices")
    try:
        return tuple(
            {
                "device": str(one["device"])[:MAX_TEXT],
                "restarts": {str(why)[:MAX_TEXT]: int(count) for why, count in one["restarts"].items()},
                "breaker": int(one["breaker"]),
                "models": [[str(model)[:MAX_TEXT], str(version)[:MAX_TEXT]] for model, version in one["models"]],
            }
            for one in told
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise _Nonsense("does not describe devices") from exc


_ASKED: Mapping[str, Callable[[Any], Any]] = {"trouble": _trouble, "gauges": _gauges, "facts": _facts}
_HANGS = "hangs"
_FIELD = {"trouble": "trouble", "gauges": "gauges", "facts": "runtimes"}

_Look = tuple[Standing, Mapping[str, str], Mapping[str, BaseException]]
"""What is known, what was wrong by method, and what was raised."""


class EngineWatch:
    """Asks one engine how it is. `misbehaved` is told of every answer that does not hold. For one thread to use."""

    def __init__(self, name: str, engine: Any, clock: Clock, misbehaved: Misbehaved) -> None:
        self._name, self._engine, self._clock, self._misbehaved = name, engine, clock, misbehaved
        self._call: Call[_Look] | None = None
        self._began = clock.boot()
        self._wrong: Mapping[str, str] = {}
        self._standing = Standing()

    @property
    def fault(self) -> str:
        """What is wrong with its answers, '' when nothing is: names of methods and types only."""
        return "; ".join(f"{method} {how}" for method, how in self._wrong.items())

    def begin(self) -> None:
        """Have it asked, unless it still owes an answer."""
        if self._call is None:
            self._began = self._clock.boot()
            with suppress(RuntimeError):  # no more threads to be had: the next look tries again
                self._call = Call(self._look, f"watch-{self._name}")

    def standing(self, wait_s: float) -> Standing:
        """How it stands: as of now when it answers within `wait_s`, else as it last said. Never raises."""
        if self._call is not None and self._call.ended(0.0 if _HANGS in self._wrong else wait_s):
            told, wrong, raised = self._call.result()
            self._call = None
            # ends of runtimes are counted by their difference: what is not known now must not look like none
            self._standing = replace(told, runtimes=self._standing.runtimes) if "facts" in wrong else told
            for method in wrong:
                self._misbehaved(self._name, method)
            self._tell(wrong, raised)
        elif self._call is not None and seconds_since(self._began, self._clock.boot()) > LATE_S:
            if _HANGS not in self._wrong:
                self._misbehaved(self._name, _HANGS)
            self._tell({_HANGS: f"for more than {LATE_S:g} s without saying how it is"}, {})
            self._standing = replace(self._standing, gauges={})
        return self._standing

    def _look(self) -> _Look:
        known: dict[str, Any] = {}
        wrong: dict[str, str] = {}
        raised: dict[str, BaseException] = {}
        for method, ask in _ASKED.items():
            try:
                known[_FIELD[method]] = ask(self._engine)
            except _Nonsense as exc:
                wrong[method] = str(exc)
            except BaseException as exc:  # noqa: BLE001 - edge: foreign code, SystemExit included; told to a person
                wrong[method] = f"raised {type(exc).__name__}"
                raised[method] = exc
        return Standing(**known), wrong, raised

    def _tell(self, wrong: Mapping[str, str], raised: Mapping[str, BaseException]) -> None:
        """Each change once."""
        for method, how in wrong.items():
            if self._wrong.get(method) != how:
                fields = {"engine": self._name, "method": method, "how": how}
                log.error("an engine misbehaves", extra=fields, exc_info=raised.get(method))
        for method in self._wrong.keys() - wrong.keys():
            log.info("an engine behaves again", extra={"engine": self._name, "method": method})
        self._wrong = dict(wrong)


def observing(name: str, requested: Callable[[str, str, float], None], misbehaved: Misbehaved) -> Observing:
    """What an engine is given as `observer`: counts under its own name only, and never raises into its work."""

    def observe(_engine: Any, outcome: Any, seconds: Any) -> None:
        try:
            requested(name, str(outcome), _number(seconds))
        except Exception:  # noqa: BLE001 - edge: foreign arguments; its request goes on
            misbehaved(name, "observe")

    return observe
