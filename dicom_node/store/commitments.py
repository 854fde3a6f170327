"""What peers ask the node to commit to, and what they were told: one row a request, one a reference.

A request is `asked` until its references were checked, `judged` until its peer took the report, then `reported`, or
`failed` when the peer never did. It is kept before it is answered, so a crash at any moment only repeats a check or a
report. `round` counts how often the peer asked anew: what belongs to an earlier round changes nothing.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from dicom_node.errors import TooManyCommitments, TransactionUidTaken
from dicom_node.model import CommitmentRequest, ObjectReference
from dicom_node.store.rows import CatalogPart, insert, update, utc_text

__all__ = ["CommitmentRequests"]

MAX_OPEN = 1000  # requests of one peer that are not yet reported
FORGOTTEN_AT_ONCE = 100

_FIRST = """
SELECT * FROM commitment_request INDEXED BY commitment_request_open
WHERE calling_ae_title = :calling AND state IN ('asked', 'judged')
  AND (state = 'asked' OR not_before_boot_id IS NOT :boot OR not_before_s <= :now)
ORDER BY state, not_before_s, id LIMIT 1
"""


class CommitmentRequests(CatalogPart):
    """`interfaces.CommitmentBook` on SQLite."""

    # --- the receiver's side

    def ask_commitment(
        self,
        calling_ae_title: str,
        called_ae_title: str,
        transaction_uid: str,
        references: Sequence[ObjectReference],
        hold_s: float,
    ) -> CommitmentRequest:
        """See `interfaces.CommitmentBook.ask_commitment`."""
        digest = _digest(references)
        not_before_s, boot_id = self._in(hold_s)
        fresh = {
            "state": "asked",
            "called_ae_title": called_ae_title,
            "attempts": 0,
            "error": "",
            "not_before_s": not_before_s,
            "not_before_boot_id": boot_id,
            "ended_at": None,
            **self._now_columns(),
        }

        def write(connection: sqlite3.Connection) -> int:
            row = connection.execute(
                "SELECT * FROM commitment_request WHERE calling_ae_title = ? AND transaction_uid = ?",
                (calling_ae_title, transaction_uid),
            ).fetchone()
            if row is not None:
                if row["digest"] != digest:
                    raise TransactionUidTaken("the Transaction UID stands for other references")
                if row["state"] in ("reported", "failed"):
                    update(connection, "commitment_request", row["id"], {**fresh, "round": row["round"] + 1})
                return int(row["id"])
            _refuse_too_many(connection, calling_ae_title)
            columns = {
                "calling_ae_title": calling_ae_title,
                "transaction_uid": transaction_uid,
                "digest": digest,
                "asked_at": utc_text(self.clock.wall()),
                **fresh,
            }
            request = insert(connection, "commitment_request", columns)
            connection.executemany(
                "INSERT INTO commitment_reference (request, position, sop_class_uid, sop_instance_uid) "
                "VALUES (?, ?, ?, ?)",
                [(request, position, *reference) for position, reference in enumerate(references)],
            )
            return request

        kept = self._request(self.database.write(write))
        assert kept is not None
        return kept

    def judged_commitment(self, request: CommitmentRequest) -> CommitmentRequest | None:
        """See `interfaces.CommitmentBook.judged_commitment`."""
        state = self.database.rows(
            "SELECT state FROM commitment_request WHERE id = ? AND round = ?", (request.id, request.round)
        )
        return self._request(request.id) if state == [("judged",)] else None

    def claim_commitment(self, request: CommitmentRequest, for_s: float, *, here: bool) -> bool:
        """See `interfaces.CommitmentBook.claim_commitment`."""
        not_before_s, boot_id = self._in(for_s)
        now = self.clock.boot()
        condition = "attempts = 0" if here else "(not_before_boot_id IS NOT :boot OR not_before_s <= :now)"
        sql = (
            "UPDATE commitment_request SET attempts = attempts + 1, not_before_s = :until, not_before_boot_id = :of "
            f"WHERE id = :id AND round = :round AND state = 'judged' AND {condition}"
        )
        values = {
            **{"until": not_before_s, "of": boot_id, "id": request.id, "round": request.round},
            **{"boot": now.boot_id, "now": now.seconds},
        }
        return self.database.write(lambda connection: connection.execute(sql, values).rowcount == 1)

    def let_go_of_commitment(self, request: CommitmentRequest) -> None:
        """See `interfaces.CommitmentBook.let_go_of_commitment`."""
        self._change(request, "attempts = 0 AND state IN ('asked', 'judged')", {"not_before_boot_id": None})

    def end_commitment(self, request: CommitmentRequest, error: str = "") -> None:
        """See `interfaces.CommitmentBook.end_commitment`."""
        state = "failed" if error else "reported"
        ended = {"state": state, "error": error, "ended_at": utc_text(self.clock.wall())}
        self._change(request, "state = 'judged'", ended)

    def retry_commitment_later(self, request: CommitmentRequest, error: str, delay_s: float) -> None:
        """See `interfaces.CommitmentBook.retry_commitment_later`."""
        not_before_s, boot_id = self._in(delay_s)
        later = {"error": error, "not_before_s": not_before_s, "not_before_boot_id": boot_id}
        self._change(request, "state = 'judged'", later)

    def _change(self, request: CommitmentRequest, condition: str, columns: dict[str, Any]) -> bool:
        """Change it if it is still of that round and so; whether it was."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        sql = f"UPDATE commitment_request SET {assignments} WHERE id = ? AND round = ? AND {condition}"
        values = (*columns.values(), request.id, request.round)
        return self.database.write(lambda connection: connection.execute(sql, values).rowcount == 1)

    # --- who checks and reports

    def next_commitment(self, calling_ae_title: str) -> CommitmentRequest | None:
        """See `interfaces.CommitmentBook.next_commitment`."""
        now = self.clock.boot()
        when = {"calling": calling_ae_title, "boot": now.boot_id, "now": now.seconds}
        with self.database.read() as connection:
            row = connection.execute(_FIRST, when).fetchone()
        return self._request(row["id"]) if row is not None else None

    def judge_commitment(self, request: CommitmentRequest, reasons: Sequence[int]) -> None:
        """See `interfaces.CommitmentBook.judge_commitment`."""

        def write(connection: sqlite3.Connection) -> None:
            changed = connection.execute(
                "UPDATE commitment_request SET state = 'judged' WHERE id = ? AND round = ? AND state = 'asked'",
                (request.id, request.round),
            ).rowcount
            if changed:
                connection.executemany(
                    "UPDATE commitment_reference SET reason = ? WHERE request = ? AND position = ?",
                    [(int(reason), request.id, position) for position, reason in enumerate(reasons)],
                )

        self.database.write(write)

    def forget_commitments(self, older_than_s: float) -> int:
        """See `interfaces.CommitmentBook.forget_commitments`."""
        before = utc_text(self.clock.wall() - timedelta(seconds=older_than_s))

        def write(connection: sqlite3.Connection) -> int:
            rows = connection.execute(
                "SELECT id FROM commitment_request WHERE ended_at < ? LIMIT ?", (before, FORGOTTEN_AT_ONCE)
            ).fetchall()
            ids = [(row["id"],) for row in rows]
            connection.executemany("DELETE FROM commitment_reference WHERE request = ?", ids)
            connection.executemany("DELETE FROM commitment_request WHERE id = ?", ids)
            return len(ids)

        return self.database.write(write)

    # --- reading

    def _request(self, request_id: int) -> CommitmentRequest | None:
        with self.database.read() as connection:
            row = connection.execute("SELECT * FROM commitment_request WHERE id = ?", (request_id,)).fetchone()
            if row is None:
                return None
            references = connection.execute(
                "SELECT sop_class_uid, sop_instance_uid, reason FROM commitment_reference WHERE request = ? "
                "ORDER BY position",
                (request_id,),
            ).fetchall()
        judged = row["state"] != "asked"
        return CommitmentRequest(
            id=row["id"],
            round=row["round"],
            calling_ae_title=row["calling_ae_title"],
            called_ae_title=row["called_ae_title"],
            transaction_uid=row["transaction_uid"],
            references=tuple(ObjectReference(item["sop_class_uid"], item["sop_instance_uid"]) for item in references),
            reasons=tuple(item["reason"] for item in references) if judged else None,
            attempts=row["attempts"],
            error=row["error"],
            age_s=self.age_s(row["since_s"], row["since_boot_id"], row["since_at"]),
        )


def _digest(references: Sequence[ObjectReference]) -> str:
    """The same for the same references in any order."""
    return hashlib.sha256("\n".join(sorted(" ".join(reference) for reference in references)).encode()).hexdigest()


def _refuse_too_many(connection: sqlite3.Connection, calling_ae_title: str) -> None:
    open_now = connection.execute(
        "SELECT count(*) FROM commitment_request WHERE calling_ae_title = ? AND state IN ('asked', 'judged')",
        (calling_ae_title,),
    ).fetchone()[0]
    if open_now >= MAX_OPEN:
        raise TooManyCommitments(f"{MAX_OPEN} requests of this peer are not reported yet")
