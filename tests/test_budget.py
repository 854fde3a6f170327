"""Memory shared by the byte."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from dicom_node.budget import ByteBudget, VolumeMemory, volume_bytes
from dicom_node.errors import EngineUnavailable, LeaseLost
from dicom_node.model import EngineTask, Priority, SeriesHeader


def nothing() -> None:
    """A heartbeat nobody listens to."""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Holder(threading.Thread):
    """Has some of the budget until it is let go."""

    def __init__(self, budget: ByteBudget, size: int, rank: int, order: list[int]) -> None:
        super().__init__(daemon=True)
        self.budget, self.size, self.rank, self.order = budget, size, rank, order
        self.has, self.go = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.budget.taken(self.size, self.rank, nothing):
            self.order.append(self.size)
            self.has.set()
            self.go.wait(20)


def test_no_more_is_handed_out_than_there_is_and_the_urgent_come_first() -> None:
    budget, order = ByteBudget(100), list[int]()
    first = Holder(budget, 70, 1, order)
    assert first.has.wait(5)
    waiting = []
    for size, rank in ((60, 2), (50, 1), (41, 0), (10, 2)):  # the last would fit, and overtakes nobody
        waiting.append(Holder(budget, size, rank, order))
        until(lambda: budget.waiting == len(waiting))
    assert budget.taken_bytes == 70 and order == [70]
    first.go.set()
    assert waiting[2].has.wait(5) and waiting[1].has.wait(5)
    assert budget.taken_bytes == 91 and order == [70, 41, 50]
    for holder in (waiting[2], waiting[1]):
        holder.go.set()
    assert waiting[0].has.wait(5) and waiting[3].has.wait(5)
    assert order == [70, 41, 50, 60, 10]
    for holder in waiting:
        holder.go.set()
        holder.join(5)
    assert budget.taken_bytes == 0


def test_what_is_larger_than_all_of_it_goes_alone() -> None:
    budget, order = ByteBudget(100), list[int]()
    small = Holder(budget, 1, 1, order)
    assert small.has.wait(5)
    large = Holder(budget, 500, 1, order)
    until(lambda: budget.waiting == 1)
    small.go.set()
    assert large.has.wait(5)
    large.go.set()
    large.join(5)


def test_who_waits_beats_and_may_give_up() -> None:
    budget, order = ByteBudget(100), list[int]()
    holder = Holder(budget, 100, 1, order)
    assert holder.has.wait(5)

    def lost() -> None:
        raise LeaseLost("another worker owns this job")

    with pytest.raises(LeaseLost), budget.taken(10, 0, lost):
        pytest.fail("it was not there")
    holder.go.set()
    holder.join(5)
    with budget.taken(100, 2, nothing):  # nobody stands in the way any more
        assert budget.taken_bytes == 100


def test_urgent_volumes_do_not_wait_for_those_of_others_and_no_wait_is_endless() -> None:
    memory = VolumeMemory(100)
    with memory.taken(100, Priority.ROUTINE, nothing):
        with memory.taken(80, Priority.URGENT, nothing):
            assert memory.taken_bytes == 180
        with (
            pytest.raises(EngineUnavailable, match=r"jobs\.prepared_mb"),
            memory.taken(1, Priority.ROUTINE, nothing, wait_s=0.0),
        ):
            pytest.fail("it was not there")
        assert (memory.taken_bytes, memory.waiting) == (100, 0)
    assert memory.taken_bytes == 0


def test_a_volume_counts_two_bytes_a_voxel_and_without_a_described_image_what_its_files_hold() -> None:
    def task(*geometry: dict[str, int]) -> EngineTask:
        header = SeriesHeader(series_instance_uid="1.2", instance_count=2, values={}, geometry=geometry)
        keys = {"study_instance_uid": "1", "series_instance_uid": "1.2", "timeout_s": 1.0}
        return EngineTask(job_id=1, instances=(), header=header, **keys)  # type: ignore[arg-type]

    assert volume_bytes(task({"Rows": 4, "Columns": 8}, {"Rows": 4, "Columns": 8, "NumberOfFrames": 3})) == 256
    assert volume_bytes(task({})) == 0
