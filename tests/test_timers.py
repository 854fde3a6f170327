"""Timers tick whatever is done to the wall clock."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo

import apscheduler.schedulers.base
import pytest

from dicom_node.clock import SystemClock
from dicom_node.node import Timers

WAIT_S = 20.0
HOUR_S = 3600.0


class SetClock(SystemClock):
    """The system's clocks; somebody sets the one on the wall."""

    ahead_s = 0.0

    def wall(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """The one that the timers' scheduler sees too."""
    set_clock = SetClock()

    class Seen(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return set_clock.wall().astimezone(tz)

    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", Seen)
    return set_clock


@pytest.fixture
def timers(clock: SetClock) -> Iterator[Timers]:
    made = Timers(clock)
    yield made
    made.stop()


@pytest.mark.parametrize("jump_s", [-HOUR_S, HOUR_S])
def test_timers_go_on_when_the_wall_clock_is_set_by_an_hour(timers: Timers, clock: SetClock, jump_s: float) -> None:
    ticked, once = threading.Event(), threading.Event()
    timers.every(0.05, ticked.set)
    timers.once(0.5, once.set)
    assert ticked.wait(WAIT_S)
    clock.ahead_s = jump_s
    for _ in range(3):  # after the first of them there is nothing special about the clock
        timers.follow_clock()
        ticked.clear()
        assert ticked.wait(WAIT_S), "no tick after the clock was set"
    assert once.wait(WAIT_S)


def test_without_being_told_of_it_they_would_be_silent(timers: Timers, clock: SetClock) -> None:
    ticked = threading.Event()
    timers.every(0.05, ticked.set)
    assert ticked.wait(WAIT_S)
    clock.ahead_s = -HOUR_S
    ticked.wait(0.2)  # one may be on its way
    ticked.clear()
    assert not ticked.wait(0.5), "the scheduler heeds another clock by now: follow_clock may go"
