"""Counts that a scrape reads instead of counting: kept by triggers, in the transaction that changes what is counted.

A scrape must not walk through every series there ever was. `tally` holds how many there are of each kind, `study_rank`
where each study stands by the worst kept standing of its series, `unsettled` the series that are closed and have none:
there must be none, and whatever takes one away is seen at once. `audit_tallies` counts anew and compares.

Images that come in touch one of them, the number of instances; all others change when a series is opened or closed, or
a job or delivery moves.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["RANK", "SCHEMA", "audit_tallies", "recount", "tallied"]

RANK = ("lost", "failed", "waiting", "routed", "filtered")  # a study stands where the worst of its series does
_RANKED = "CASE class " + " ".join(f"WHEN '{name}' THEN {number}" for number, name in enumerate(RANK)) + " END"

# what: how it is counted anew, as (label, detail, n)
_DEFINED: Mapping[str, str] = {
    "received_series": "SELECT '', '', count(*) FROM receipt",
    "received_studies": "SELECT '', '', count(DISTINCT study_instance_uid) FROM receipt",
    "standing": "SELECT class, reason, count(*) FROM standing GROUP BY class, reason",
    "study_standing": f"SELECT worst, '', count(*) FROM (SELECT min({_RANKED}) AS worst FROM standing "
    "GROUP BY study_instance_uid) GROUP BY worst",
    "studies": "SELECT '', '', count(*) FROM study",
    "instances": "SELECT '', '', coalesce(sum(instance_count), 0) FROM study",
    "job": "SELECT state, '', count(*) FROM job GROUP BY state",
    "delivery": "SELECT destination, state, count(*) FROM delivery GROUP BY destination, state",
}
_RANKS = f"SELECT study_instance_uid, min({_RANKED}) FROM standing GROUP BY study_instance_uid"
_UNSETTLED = (
    "SELECT study_instance_uid, series_instance_uid FROM series WHERE routing = 'routed' AND NOT EXISTS "
    "(SELECT 1 FROM standing WHERE standing.study_instance_uid = series.study_instance_uid "
    "AND standing.series_instance_uid = series.series_instance_uid)"
)

_TABLES = (
    """CREATE TABLE tally (                         -- how many there are; see store.tally
    what TEXT NOT NULL, label TEXT NOT NULL, detail TEXT NOT NULL,
    n INTEGER NOT NULL,
    PRIMARY KEY (what, label, detail)
) WITHOUT ROWID""",
    """CREATE TABLE study_rank (                    -- the worst standing of a study's series, as RANK counts
    study_instance_uid TEXT PRIMARY KEY, rank INTEGER NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE unsettled (                     -- series that are closed and have no standing: there must be none
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    PRIMARY KEY (study_instance_uid, series_instance_uid)
) WITHOUT ROWID""",
    "CREATE INDEX study_conflict ON study (study_instance_uid) WHERE identity_conflict AND NOT released",
)


def _change(what: str, by: str, label: str = "''", detail: str = "''") -> str:
    """A trigger's statement that counts `by` more."""
    return (
        f"INSERT INTO tally VALUES ('{what}', {label}, {detail}, {by}) "
        "ON CONFLICT (what, label, detail) DO UPDATE SET n = n + excluded.n;"
    )


def _counted(table: str, what: str, key: Sequence[str]) -> Iterator[str]:
    """Triggers that count the rows of a table by one or two columns."""

    def one(row: str, by: str) -> str:
        return _change(what, by, *(f"{row}.{column}" for column in key))

    yield f"CREATE TRIGGER {table}_counted AFTER INSERT ON {table} BEGIN {one('NEW', '1')} END"
    yield f"CREATE TRIGGER {table}_uncounted AFTER DELETE ON {table} BEGIN {one('OLD', '-1')} END"
    if key:
        changed = " OR ".join(f"OLD.{column} IS NOT NEW.{column}" for column in key)
        yield (
            f"CREATE TRIGGER {table}_recounted AFTER UPDATE OF {', '.join(key)} ON {table} WHEN {changed} "
            f"BEGIN {one('OLD', '-1')} {one('NEW', '1')} END"
        )


def _triggers() -> Iterator[str]:
    yield from _counted("job", "job", ("state",))
    yield from _counted("delivery", "delivery", ("destination", "state"))
    yield from _counted("standing", "standing", ("class", "reason"))
    yield from _counted("receipt", "received_series", ())
    yield from _counted("study", "studies", ())
    for name, event, row, by in (("first", "INSERT", "NEW", "1"), ("last", "DELETE", "OLD", "-1")):
        yield (
            f"CREATE TRIGGER receipt_{name} AFTER {event} ON receipt WHEN (SELECT count(*) FROM (SELECT 1 FROM receipt "
            f"WHERE study_instance_uid = {row}.study_instance_uid LIMIT 2)) = {1 if by == '1' else 0} "
            f"BEGIN {_change('received_studies', by)} END"
        )
    # instances, as studies count them
    yield f"CREATE TRIGGER study_filled AFTER INSERT ON study BEGIN {_change('instances', 'NEW.instance_count')} END"
    yield f"CREATE TRIGGER study_emptied AFTER DELETE ON study BEGIN {_change('instances', '-OLD.instance_count')} END"
    yield (
        "CREATE TRIGGER study_grown AFTER UPDATE OF instance_count ON study WHEN OLD.instance_count <> "
        "NEW.instance_count BEGIN UPDATE tally SET n = n + NEW.instance_count - OLD.instance_count "
        "WHERE what = 'instances' AND label = '' AND detail = ''; END"
    )
    # where studies stand
    for event, row in (("INSERT", "NEW"), ("UPDATE OF class", "NEW"), ("DELETE", "OLD")):
        of_study = f"FROM standing WHERE study_instance_uid = {row}.study_instance_uid"
        yield (
            f"CREATE TRIGGER standing_ranked_{event.split()[0].lower()} AFTER {event} ON standing BEGIN "
            f"INSERT INTO study_rank SELECT study_instance_uid, min({_RANKED}) {of_study} GROUP BY study_instance_uid "
            "ON CONFLICT (study_instance_uid) DO UPDATE SET rank = excluded.rank WHERE rank <> excluded.rank; "
            f"DELETE FROM study_rank WHERE study_instance_uid = {row}.study_instance_uid "
            f"AND NOT EXISTS (SELECT 1 {of_study}); END"
        )
    yield from _counted("study_rank", "study_standing", ("rank",))
    # closed series without a standing
    for name, event in (("made", "INSERT"), ("closed", "UPDATE OF routing")):
        yield (
            f"CREATE TRIGGER series_{name} AFTER {event} ON series WHEN NEW.routing = 'routed' AND NOT EXISTS "
            "(SELECT 1 FROM standing WHERE standing.study_instance_uid = NEW.study_instance_uid "
            "AND standing.series_instance_uid = NEW.series_instance_uid) BEGIN INSERT OR IGNORE INTO unsettled "
            "VALUES (NEW.study_instance_uid, NEW.series_instance_uid); END"
        )
    both = "study_instance_uid = {0}.study_instance_uid AND series_instance_uid = {0}.series_instance_uid"
    new, old = both.format("NEW"), both.format("OLD")
    yield f"CREATE TRIGGER standing_settles AFTER INSERT ON standing BEGIN DELETE FROM unsettled WHERE {new}; END"
    yield f"CREATE TRIGGER series_gone AFTER DELETE ON series BEGIN DELETE FROM unsettled WHERE {old}; END"
    yield (
        "CREATE TRIGGER standing_lost AFTER DELETE ON standing BEGIN INSERT OR IGNORE INTO unsettled "
        f"SELECT study_instance_uid, series_instance_uid FROM series WHERE {old} AND routing = 'routed'; END"
    )


_FILLED = (
    *(f"INSERT INTO tally SELECT '{what}', * FROM ({counting})" for what, counting in _DEFINED.items()),
    f"INSERT INTO study_rank {_RANKS}",
    f"INSERT INTO unsettled {_UNSETTLED}",
)

SCHEMA: tuple[str, ...] = (*_TABLES, *_FILLED, *_triggers())
"""Tables, what they hold of a catalog that is there, then what keeps it so."""


def tallied(connection: sqlite3.Connection, what: str) -> dict[tuple[str, str], int]:
    """(label, detail) to how many there are, without those there are none of."""
    rows = connection.execute("SELECT label, detail, n FROM tally WHERE what = ? AND n <> 0", (what,))
    return {(str(row[0]), str(row[1])): int(row[2]) for row in rows}


def audit_tallies(connection: sqlite3.Connection) -> list[str]:
    """What is kept and differs from what is counted now; slow, for fsck and tests."""
    wrong = []
    for what, counting in _DEFINED.items():
        counted = {(str(row[0]), str(row[1])): int(row[2]) for row in connection.execute(counting) if row[2]}
        if counted != tallied(connection, what):
            wrong.append(what)
    for one, other in (("SELECT * FROM study_rank", _RANKS), (_RANKS, "SELECT * FROM study_rank")):
        if connection.execute(f"{one} EXCEPT {other} LIMIT 1").fetchone() and "study_rank" not in wrong:
            wrong.append("study_rank")
    kept = {tuple(row) for row in connection.execute("SELECT * FROM unsettled")}
    if not kept >= {tuple(row) for row in connection.execute(_UNSETTLED)}:  # one that is open again may stay
        wrong.append("unsettled")
    return wrong


def recount(connection: sqlite3.Connection) -> None:
    """Count anew what is kept, inside the caller's transaction."""
    # the triggers on `study_rank` count too; what is in `tally` last is right
    for table in ("unsettled", "study_rank", "tally"):
        connection.execute(f"DELETE FROM {table}")
    for statement in (*_FILLED[-2:], "DELETE FROM tally", *_FILLED[:-2]):
        connection.execute(statement)
