"""The schema of the timeline, as sqlite-utils migrations: triggers note every move of a job or a delivery.

A migration that has landed is never changed, only followed.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

__all__ = ["timeline_migrations"]

timeline_migrations = Migrations("timeline")

_NOW = "strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now')"
_TABLES = (
    "CREATE TABLE history (id INTEGER PRIMARY KEY, study_instance_uid TEXT NOT NULL, at TEXT NOT NULL, "
    "kind TEXT NOT NULL, ref INTEGER NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL)",
    "CREATE INDEX history_study ON history (study_instance_uid, id)",
    *(
        f"CREATE TRIGGER {kind}_{verb} AFTER {event} ON {kind} {when} BEGIN "
        "INSERT INTO history (study_instance_uid, at, kind, ref, state, detail) "
        f"VALUES (new.study_instance_uid, {_NOW}, '{kind}', new.id, new.state, new.error); END"
        for kind in ("job", "delivery")
        for verb, event, when in (
            ("made", "INSERT", ""),
            ("moved", "UPDATE OF state", "WHEN new.state <> old.state"),
        )
    ),
)


@timeline_migrations()
def history(db: Database) -> None:
    """The history of moves and the triggers that write it."""
    for statement in _TABLES:
        db.execute(statement)


@timeline_migrations()
def noted(db: Database) -> None:
    """The first line of whatever an engine remembers; the rest of a note is the engine's own."""
    db.execute(
        "CREATE TRIGGER job_noted AFTER UPDATE OF note ON job WHEN new.note <> old.note AND new.note <> '' BEGIN "
        "INSERT INTO history (study_instance_uid, at, kind, ref, state, detail) "
        f"VALUES (new.study_instance_uid, {_NOW}, 'note', new.id, new.state, "
        "substr(new.note, 1, instr(new.note || char(10), char(10)) - 1)); END"
    )
