"""Calls into code the node does not own, in threads of their own: one that never returns holds up nobody else.

A thread cannot be ended from outside. So a call that does not return keeps its thread for as long as it likes, and what
made it goes on without it; `Apart` sees to it that each engine has at most one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from dicom_node.errors import EngineTimeout, EngineUnavailable

__all__ = ["Apart", "Call"]

T = TypeVar("T")


class Call(Generic[T]):
    """One call, under way from its construction on."""

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._call = call
        self._answer: list[T] = []
        self._raised: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._answer.append(self._call())
        except BaseException as exc:  # noqa: BLE001 - edge: foreign code; told by `result`, where somebody waits
            self._raised = exc
        finally:
            self._done.set()

    def ended(self, wait_s: float = 0.0) -> bool:
        """Whether it has returned or raised, within `wait_s`."""
        return self._done.wait(wait_s)

    def result(self) -> T:
        """What it returned, once it has ended. Raises what it raised; a SystemExit and its like as RuntimeError."""
        if isinstance(self._raised, Exception):
            raise self._raised
        if self._raised is not None:
            raise RuntimeError(type(self._raised).__name__) from self._raised
        return self._answer[0]


class Apart:
    """Calls of one engine, one at a time. `name` is for people: the engine's, and what is asked of it. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._guard = threading.Lock()
        self._latest: Call[object] | None = None

    def call(self, call: Callable[[], T], wait_s: float) -> T:
        """Its answer. Raises what it raises, EngineTimeout when there is none after `wait_s` (the call goes on), and
        EngineUnavailable when an earlier one still goes on.
        """
        with self._guard:
            if self._latest is not None and not self._latest.ended():
                raise EngineUnavailable(f"{self._name}: an earlier call has not returned yet")
            made = Call(call, self._name)
            self._latest = made  # type: ignore[assignment]  # only `ended` is asked of it
        if not made.ended(wait_s):
            raise EngineTimeout(f"{self._name}: no return within {wait_s:g} s")
        return made.result()
