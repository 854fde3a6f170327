"""Ten thousand that wait, or thousands: who is next is found as fast as with a few, and in order of urgency."""

from pathlib import Path
from typing import Any

from dicom_node.model import Priority

MANY, FEW = 2000, 20


def _queue(bench: Any, table: str, count: int, **columns: str) -> None:
    """Copies of the first row of that table, each with its number; `columns` as SQL, with {n} for the number."""

    def write(connection: Any) -> None:
        names = [row["name"] for row in connection.execute(f"PRAGMA table_info({table})") if row["name"] != "id"]
        for n in range(2, count + 1):
            values = ", ".join(columns.get(name, name).format(n=n) for name in names)
            connection.execute(f"INSERT INTO {table} ({', '.join(names)}) SELECT {values} FROM {table} WHERE id = 1")

    bench.database.write(write)


def _jobs(bench: Any, count: int) -> None:
    """Of two engines and every priority."""
    bench.receive(bench.dataset("1.2.3.1.1"))
    bench.route()
    priority = "CASE {n} % 3 WHEN 0 THEN 'urgent' WHEN 1 THEN 'routine' ELSE 'background' END"
    engine = "iif({n} % 2, 'ct-abdomen', 'outside')"
    _queue(bench, "job", count, run_number="{n}", rank="{n} % 3", priority=priority, engine=engine)


def _steps(bench: Any, **wanted: Any) -> int:
    """Of SQLite's machine, in hundreds, to say that nothing can be leased."""
    taken = 0

    def count() -> int:
        nonlocal taken
        taken += 1
        return 0

    with bench.database.read() as connection:
        connection.set_progress_handler(count, 100)
    assert bench.queue.lease_job("test", 30.0, **wanted) is None
    with bench.database.read() as connection:
        connection.set_progress_handler(None, 0)
    return taken


def test_a_worker_with_nothing_to_do_finds_that_out_at_once(kit: Any, tmp_path: Path) -> None:
    """All of them wait for an engine that is down: every worker looks five times a second."""
    looks: tuple[dict[str, Any], ...] = ({}, {"at_least": Priority.URGENT}, {"engine": "outside"}, {"engine": "none"})
    steps = []
    for count in (FEW, MANY):
        bench = kit.Bench(tmp_path / str(count))
        _jobs(bench, count)
        later = "UPDATE job SET not_before_s = 1e9, not_before_boot_id = 'boot-1'"
        bench.database.write(lambda connection, later=later: connection.execute(later))
        steps.append([_steps(bench, **wanted) for wanted in looks])
        bench.close()
    assert all(many <= few + 10 for few, many in zip(*steps, strict=True)), steps


def test_jobs_are_leased_in_order_of_urgency_then_age_whatever_waits(bench: Any) -> None:
    _jobs(bench, 60)
    # half of each kind was put off in an earlier life of the machine, or until just now: both are due
    bench.database.write(
        lambda connection: connection.execute(
            "UPDATE job SET not_before_boot_id = iif(id % 4, 'boot-1', 'boot-0'), "
            "not_before_s = iif(id % 4, 1000.0, 1e9) "
            "WHERE id % 2"
        )
    )
    leased = []
    while (job := bench.queue.lease_job("test", 30.0)) is not None:
        leased.append((job.priority.rank, job.id))
    assert len(leased) == 60 and leased == sorted(leased)
    bench.clock.seconds += 31.0  # and when every worker died: again, in the same order
    again = bench.queue.lease_job("test", 30.0)
    assert again is not None and (again.priority.rank, again.id) == leased[0]
