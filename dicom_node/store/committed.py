"""What destinations committed to keeping: one row an object and question, as the deletion of originals needs it.

A question is kept, with the digest of each object as it was sent, before it is asked; so a report is understood
whenever it comes, from whichever of several questions, once or more than once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from typing import Any

from dicom_node.errors import NotFound
from dicom_node.model import CommitmentReport, Delivery, DeliveryState, FailureReason, StoredInstance
from dicom_node.store.deliveries import move
from dicom_node.store.rows import CatalogPart, check_lease, insert, update, utc_text

__all__ = ["Committed"]

MOST_DOUBLINGS = 5  # of the time until it is asked again
MAX_RESENT = 2  # how often an object is sent once more because the destination did not commit to it

# what sending the object again cannot change
_FINAL = frozenset({FailureReason.CLASS_INSTANCE_CONFLICT, FailureReason.REFERENCED_SOP_CLASS_NOT_SUPPORTED})
_REASONS = {
    FailureReason.PROCESSING_FAILURE: "processing failure",
    FailureReason.NO_SUCH_OBJECT_INSTANCE: "no such object instance",
    FailureReason.CLASS_INSTANCE_CONFLICT: "class/instance conflict",
    FailureReason.REFERENCED_SOP_CLASS_NOT_SUPPORTED: "referenced SOP class not supported",
    FailureReason.DUPLICATE_TRANSACTION_UID: "duplicate transaction UID",
    FailureReason.RESOURCE_LIMITATION: "resource limitation",
}
_COUNTS = """
SELECT count(*) AS total, count(*) FILTER (WHERE state = 'waiting') AS waiting,
  count(*) FILTER (WHERE state = 'refused') AS refused,
  count(*) FILTER (WHERE state = 'sent' AND commitment <> 'committed') AS open
FROM delivery_item WHERE delivery = ?
"""


class Committed(CatalogPart):
    """The part of `interfaces.Outbox` that is about storage commitment."""

    # --- the courier's side

    def uncommitted(self, delivery: Delivery) -> Sequence[StoredInstance]:
        """See `interfaces.Outbox.uncommitted`."""
        with self.database.read() as connection:
            rows = connection.execute(
                "SELECT instance.* FROM delivery_item AS item JOIN instance USING (sop_instance_uid) "
                "WHERE delivery = ? AND item.state = 'sent' AND commitment <> 'committed' ORDER BY position",
                (delivery.id,),
            ).fetchall()
        return [self.stored(row) for row in rows]

    def begin_commitment(self, delivery: Delivery, transaction_uid: str, sop_instance_uids: Sequence[str]) -> None:
        """See `interfaces.Outbox.begin_commitment`."""
        at = utc_text(self.clock.wall())

        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "delivery", delivery.id, delivery.token)
            question = {
                "transaction_uid": transaction_uid,
                "delivery": delivery.id,
                "destination": delivery.destination,
                "asked_at": at,
            }
            transaction = insert(connection, "commitment_question", question)
            connection.executemany(
                "INSERT INTO commitment_object (question, sop_instance_uid, sha256) "
                "SELECT ?, sop_instance_uid, sent_sha256 FROM delivery_item "
                "WHERE delivery = ? AND sop_instance_uid = ? AND state = 'sent'",
                [(transaction, delivery.id, uid) for uid in sop_instance_uids],
            )
            connection.executemany(
                "UPDATE delivery_item SET commitment = 'asked', question = ? "
                "WHERE delivery = ? AND sop_instance_uid = ? AND state = 'sent' AND commitment <> 'committed'",
                [(transaction, delivery.id, uid) for uid in sop_instance_uids],
            )

        self.database.write(write)

    def commitment_is_open(self, delivery: Delivery) -> bool:
        """See `interfaces.Outbox.commitment_is_open`."""
        return bool(
            self.database.rows(
                "SELECT 1 FROM delivery_item WHERE delivery = ? AND state = 'sent' AND commitment = 'asked' LIMIT 1",
                (delivery.id,),
            )
        )

    def settle_delivery(self, delivery: Delivery, *, await_s: float, resend_s: float) -> DeliveryState:
        """See `interfaces.Outbox.settle_delivery`."""

        def write(connection: sqlite3.Connection) -> DeliveryState:
            check_lease(connection, "delivery", delivery.id, delivery.token)
            count = connection.execute(_COUNTS, (delivery.id,)).fetchone()
            if count["waiting"]:
                error = f"the destination did not commit to {count['waiting']} of {count['total']} objects"
                return move(connection, delivery.id, "retry_later", error=error, **self._not_before(resend_s))
            if count["open"]:
                asked = connection.execute(
                    "SELECT count(*) FROM commitment_question WHERE delivery = ?", (delivery.id,)
                ).fetchone()[0]
                longer = 2 ** min(max(asked - 1, 0), MOST_DOUBLINGS)
                return move(connection, delivery.id, "await", error="", **self._not_before(await_s * longer))
            if count["refused"]:
                error = f"{count['refused']} of {count['total']} objects were not taken"
                return move(connection, delivery.id, "give_up", error=error)
            return move(connection, delivery.id, "finish", error="")

        return self.database.write(write)

    def _not_before(self, delay_s: float) -> dict[str, Any]:
        not_before_s, boot_id = self._in(delay_s)
        return {"not_before_s": not_before_s, "not_before_boot_id": boot_id}

    # --- reports, on whichever association they come

    def note_report(self, report: CommitmentReport, destinations: Collection[str]) -> None:
        """See `interfaces.ReportBook.note_report`."""
        at = utc_text(self.clock.wall())

        def write(connection: sqlite3.Connection) -> None:
            question = connection.execute(
                "SELECT * FROM commitment_question WHERE transaction_uid = ?", (report.transaction_uid,)
            ).fetchone()
            if question is None or question["destination"] not in destinations:
                raise NotFound("no such question was asked of this destination")
            for _, uid in report.committed:
                _take(connection, question, uid, at)
            for (_, uid), reason in report.failed:
                _drop(connection, question, uid, reason, at)
            update(connection, "commitment_question", question["id"], {"answered_at": at})
            # the courier ends what is settled now: everything that follows of that is in one place
            connection.execute(
                "UPDATE delivery SET not_before_boot_id = NULL WHERE id = ? AND state = 'committing' "
                "AND NOT EXISTS (SELECT 1 FROM delivery_item WHERE delivery = delivery.id AND commitment = 'asked')",
                (question["delivery"],),
            )

        self.database.write(write)

    # --- reading

    def committed_by(self, sop_instance_uid: str, sha256: str) -> Sequence[str]:
        """The destinations that committed to keeping exactly this object: what must be before it may be deleted."""
        rows = self.database.rows(
            "SELECT DISTINCT destination FROM commitment_object "
            "JOIN commitment_question AS asked ON asked.id = question "
            "WHERE sop_instance_uid = ? AND sha256 = ? AND reason = 0 ORDER BY destination",
            (sop_instance_uid, sha256),
        )
        return [row[0] for row in rows]


def _take(connection: sqlite3.Connection, question: sqlite3.Row, uid: str, at: str) -> None:
    """The destination committed to it, as it was when the question was asked; a later failure takes nothing back."""
    kept = (question["id"], uid)
    connection.execute(
        "UPDATE commitment_object SET reason = 0, at = ? WHERE question = ? AND sop_instance_uid = ?", (at, *kept)
    )
    connection.execute(
        "UPDATE delivery_item SET commitment = 'committed' WHERE delivery = ? AND sop_instance_uid = ? "
        "AND state = 'sent' AND sent_sha256 = (SELECT sha256 FROM commitment_object "
        "WHERE question = ? AND sop_instance_uid = delivery_item.sop_instance_uid)",
        (question["delivery"], uid, question["id"]),
    )


def _drop(connection: sqlite3.Connection, question: sqlite3.Row, uid: str, reason: int, at: str) -> None:
    """It is sent again, a few times; what an earlier question was answered changes nothing."""
    changed = connection.execute(
        "UPDATE commitment_object SET reason = ?, at = ? WHERE question = ? AND sop_instance_uid = ? "
        "AND reason IS NULL",
        (reason, at, question["id"], uid),
    ).rowcount
    if not changed:
        return
    final = reason in _FINAL
    known = _REASONS.get(FailureReason(reason)) if reason in _REASONS else "unknown reason"
    connection.execute(
        "UPDATE delivery_item SET commitment = '', resent = resent + 1, "
        "state = CASE WHEN :final OR resent >= :most THEN 'refused' ELSE 'waiting' END, "
        "error = CASE WHEN :final OR resent >= :most THEN :error ELSE '' END "
        "WHERE delivery = :delivery AND sop_instance_uid = :uid AND question = :question AND commitment = 'asked'",
        {
            **{"final": final, "most": MAX_RESENT, "error": f"storage commitment: {known} ({reason:04X}H)"},
            **{"delivery": question["delivery"], "uid": uid, "question": question["id"]},
        },
    )
