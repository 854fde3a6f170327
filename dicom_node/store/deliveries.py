"""Deliveries: what is to be sent where, leased with fencing tokens, one at a time for each destination.

Sending is at least once: between a peer's answer and `item_sent` a crash makes the object go again, which the peer
recognises by its SOP Instance UID. What was acknowledged and noted is never sent again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dicom_node.errors import IllegalTransition, NotFound
from dicom_node.model import (
    Delivery,
    DeliveryItem,
    DeliveryState,
    Job,
    StoredInstance,
)
from dicom_node.store.rows import CatalogPart, QueueOptions, check_lease, insert, update, utc

__all__ = ["Deliveries", "move", "queue_results", "queue_source"]

_MOVES: Mapping[tuple[DeliveryState, str], DeliveryState] = {
    (DeliveryState.PENDING, "lease"): DeliveryState.LEASED,
    (DeliveryState.LEASED, "expire"): DeliveryState.PENDING,
    (DeliveryState.COMMITTING, "lease"): DeliveryState.LEASED,
    (DeliveryState.LEASED, "finish"): DeliveryState.DONE,
    (DeliveryState.LEASED, "await"): DeliveryState.COMMITTING,
    (DeliveryState.LEASED, "retry_later"): DeliveryState.PENDING,
    (DeliveryState.LEASED, "give_up"): DeliveryState.FAILED,
    (DeliveryState.LEASED, "cancel"): DeliveryState.CANCELLED,
    (DeliveryState.PENDING, "cancel"): DeliveryState.CANCELLED,
    (DeliveryState.COMMITTING, "cancel"): DeliveryState.CANCELLED,
    (DeliveryState.FAILED, "cancel"): DeliveryState.CANCELLED,
    (DeliveryState.FAILED, "retry"): DeliveryState.PENDING,
    (DeliveryState.CANCELLED, "retry"): DeliveryState.PENDING,
}

# One lane: while a living lease is held on the destination nothing of it is runnable.
_RUNNABLE = """
SELECT * FROM delivery INDEXED BY delivery_runnable
WHERE destination = :destination AND state IN ('pending', 'leased', 'committing')
  AND CASE state
        WHEN 'leased' THEN lease_boot_id IS NOT :boot OR lease_until_s <= :now
        ELSE not_before_boot_id IS NOT :boot OR not_before_s <= :now END
  AND NOT EXISTS (
    SELECT 1 FROM delivery AS other INDEXED BY delivery_state
    WHERE other.state = 'leased' AND other.destination = :destination
      AND other.lease_boot_id = :boot AND other.lease_until_s > :now)
ORDER BY rank, id LIMIT 1
"""


class Deliveries(CatalogPart):
    """`interfaces.Outbox` on SQLite."""

    # --- the courier's side

    def lease_delivery(self, worker: str, lease_s: float, destination: str) -> Delivery | None:
        """The destination's first runnable delivery (priority, age), or None. A lease counts as an attempt."""
        now = self.clock.boot()
        when = {"destination": destination, "boot": now.boot_id, "now": now.seconds}

        def write(connection: sqlite3.Connection) -> Delivery | None:
            row = connection.execute(_RUNNABLE, when).fetchone()
            if row is None:
                return None
            state = DeliveryState(row["state"])
            if state is DeliveryState.LEASED:
                state = _next(state, "expire")
            until_s, boot_id = self._in(lease_s)
            changes = {
                "state": _next(state, "lease").value,
                "attempts": row["attempts"] + 1,
                "token": row["token"] + 1,
                "worker": worker,
                "lease_until_s": until_s,
                "lease_boot_id": boot_id,
            }
            update(connection, "delivery", row["id"], changes)
            return self._delivery(connection, {**dict(row), **changes})

        with self.database.read() as connection:  # an idle lane must not take the writers' lock
            if connection.execute(_RUNNABLE, when).fetchone() is None:
                return None
        return self.database.write(write)

    def extend_delivery(self, delivery: Delivery, lease_s: float) -> None:
        """Heartbeat. Raises LeaseLost."""
        until_s, boot_id = self._in(lease_s)

        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "delivery", delivery.id, delivery.token)
            update(connection, "delivery", delivery.id, {"lease_until_s": until_s, "lease_boot_id": boot_id})

        self.database.write(write)

    def item_sent(self, delivery: Delivery, sop_instance_uid: str, dimse_status: int, sha256: str = "") -> None:
        """Durable: this one, of that digest, need not be sent again. Raises LeaseLost."""
        self._item(delivery, sop_instance_uid, "sent", dimse_status, "", sha256)

    def item_failed(self, delivery: Delivery, sop_instance_uid: str, dimse_status: int | None, error: str) -> None:
        """This object was refused for good; others go on. Raises LeaseLost."""
        self._item(delivery, sop_instance_uid, "refused", dimse_status, error)

    def _item(
        self, delivery: Delivery, uid: str, state: str, dimse_status: int | None, error: str, sha256: str = ""
    ) -> None:
        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "delivery", delivery.id, delivery.token)
            connection.execute(
                "UPDATE delivery_item SET state = ?, dimse_status = ?, error = ?, sent_sha256 = ?, commitment = '' "
                "WHERE delivery = ? AND sop_instance_uid = ?",
                (state, dimse_status, error, sha256, delivery.id, uid),
            )

        self.database.write(write)

    def finish_delivery(self, delivery: Delivery) -> None:
        """DONE when every item was sent, FAILED when some were refused. Raises LeaseLost."""

        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "delivery", delivery.id, delivery.token)
            total, unsent = connection.execute(
                "SELECT count(*), count(*) FILTER (WHERE state <> 'sent') FROM delivery_item WHERE delivery = ?",
                (delivery.id,),
            ).fetchone()
            if unsent:
                move(connection, delivery.id, "give_up", error=f"{unsent} of {total} objects were not taken")
            else:
                move(connection, delivery.id, "finish", error="")

        self.database.write(write)

    def retry_delivery_later(self, delivery: Delivery, error: str, delay_s: float) -> None:
        """Back to PENDING. Raises LeaseLost."""
        not_before_s, boot_id = self._in(delay_s)
        self._end_delivery_lease(
            delivery, "retry_later", error=error, not_before_s=not_before_s, not_before_boot_id=boot_id
        )

    def give_up_delivery(self, delivery: Delivery, error: str) -> None:
        """FAILED: dead letter; the objects stay in the archive. Raises LeaseLost."""
        self._end_delivery_lease(delivery, "give_up", error=error)

    def _end_delivery_lease(self, delivery: Delivery, verb: str, **columns: Any) -> None:
        def write(connection: sqlite3.Connection) -> None:
            check_lease(connection, "delivery", delivery.id, delivery.token)
            move(connection, delivery.id, verb, **columns)

        self.database.write(write)

    # --- by a person

    def retry_delivery(self, delivery_id: int) -> None:
        """FAILED or CANCELLED back to PENDING, refused items again. Raises NotFound, IllegalTransition."""
        changes = {"attempts": 0, "error": "", "not_before_boot_id": None, **self._now_columns()}

        def write(connection: sqlite3.Connection) -> None:
            move(connection, delivery_id, "retry", **changes)
            connection.execute(
                "UPDATE delivery_item SET state = 'waiting', error = '', resent = 0 "
                "WHERE delivery = ? AND state = 'refused'",
                (delivery_id,),
            )

        self.database.write(write)

    def cancel_delivery(self, delivery_id: int) -> None:
        """Raises NotFound, IllegalTransition."""

        def write(connection: sqlite3.Connection) -> None:
            move(connection, delivery_id, "cancel", error="cancelled by a person")

        self.database.write(write)

    # --- reading

    def deliveries(self, *, study_instance_uid: str | None = None, limit: int = 100) -> Sequence[Delivery]:
        """Newest first."""
        condition = "" if study_instance_uid is None else "WHERE study_instance_uid = :study"
        with self.database.read() as connection:
            rows = connection.execute(
                f"SELECT * FROM delivery {condition} ORDER BY id DESC LIMIT :limit",
                {"study": study_instance_uid, "limit": limit},
            ).fetchall()
            return [self._delivery(connection, row) for row in rows]

    def _delivery(self, connection: sqlite3.Connection, row: sqlite3.Row | dict[str, Any]) -> Delivery:
        items = connection.execute(
            "SELECT instance.*, item.state AS item_state, item.dimse_status, item.error AS item_error, "
            "commitment = 'committed' AS committed "
            "FROM delivery_item AS item JOIN instance USING (sop_instance_uid) WHERE delivery = ? ORDER BY position",
            (row["id"],),
        ).fetchall()
        return Delivery(
            id=row["id"],
            study_instance_uid=row["study_instance_uid"],
            destination=row["destination"],
            job_id=row["job"],
            state=DeliveryState(row["state"]),
            attempts=row["attempts"],
            created_at=utc(row["created_at"]),
            items=tuple(self._delivery_item(item) for item in items),
            token=row["token"],
            error=row["error"],
            age_s=self.age_s(row["since_s"], row["since_boot_id"], row["since_at"]),
        )

    def _delivery_item(self, row: sqlite3.Row) -> DeliveryItem:
        instance: StoredInstance = self.stored(row)
        return DeliveryItem(
            instance=instance,
            sent=row["item_state"] == "sent",
            dimse_status=row["dimse_status"],
            error=row["item_error"],
            committed=bool(row["committed"]),
        )


def _next(state: DeliveryState, move: str) -> DeliveryState:
    try:
        return _MOVES[(state, move)]
    except KeyError:
        raise IllegalTransition(f"a delivery that is {state.value!r} cannot {move!r}") from None


def move(connection: sqlite3.Connection, delivery_id: int, verb: str, **columns: Any) -> DeliveryState:
    """Make one move of a delivery and change these columns; its state now. Raises NotFound, IllegalTransition."""
    row = connection.execute("SELECT state FROM delivery WHERE id = ?", (delivery_id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no delivery {delivery_id}")
    state = _next(DeliveryState(row["state"]), verb)
    lease_gone = {"lease_until_s": None, "lease_boot_id": None}
    update(connection, "delivery", delivery_id, {"state": state.value, **lease_gone, **columns})
    return state


# --- queueing, inside the transaction of whoever decides it ----------------------------------------------------------


def queue_results(
    connection: sqlite3.Connection,
    job: Job,
    sending_order: Sequence[str],
    options: QueueOptions,
    times: Mapping[str, Any],
) -> None:
    """Queue a finished job's results, in sending order, for each of its destinations that takes any of them.

    None of them goes to the engine they are from.
    """
    marks = ", ".join("?" * len(sending_order))
    kept = connection.execute(
        f"SELECT sop_instance_uid, sha256, modality FROM instance WHERE sop_instance_uid IN ({marks})",
        tuple(sending_order),
    ).fetchall()
    by_uid = {row["sop_instance_uid"]: row for row in kept}
    for destination in dict.fromkeys(job.destinations):
        if options.is_engine(destination, job.engine):
            continue
        rows = [by_uid[uid] for uid in sending_order if options.takes(destination, by_uid[uid]["modality"])]
        columns = {
            "study_instance_uid": job.study_instance_uid,
            "series_instance_uid": job.series_instance_uid,
            "rule": job.rule,
            "destination": destination,
            "job": job.id,
            "input_digest": "",
            "rank": job.priority.rank,
            **times,
        }
        _queue(connection, columns, rows)


def queue_source(
    connection: sqlite3.Connection,
    columns: Mapping[str, Any],
    instances: Sequence[sqlite3.Row],
    *,
    later_too: bool,
    again: bool,
) -> None:
    """Queue a series' received instances for one destination, once.

    Nothing is queued when the same input already was, nor after a first time unless `later_too`. After a first time
    only what is new or changed goes. `again` sends everything once more.
    """
    earlier = connection.execute(
        "SELECT id, input_digest FROM delivery WHERE study_instance_uid = :study_instance_uid "
        "AND series_instance_uid = :series_instance_uid AND rule = :rule AND destination = :destination "
        "AND job IS NULL AND state <> 'cancelled'",
        columns,
    ).fetchall()
    same = any(row["input_digest"] == columns["input_digest"] for row in earlier)
    if earlier and not again and (same or not later_too):
        return
    queued: set[tuple[str, str]] = set()
    for row in [] if again else earlier:
        items = connection.execute(
            "SELECT sop_instance_uid, sha256 FROM delivery_item WHERE delivery = ?", (row["id"],)
        )
        queued |= {(item["sop_instance_uid"], item["sha256"]) for item in items}
    _queue(connection, columns, [row for row in instances if (row["sop_instance_uid"], row["sha256"]) not in queued])


def _queue(connection: sqlite3.Connection, columns: Mapping[str, Any], rows: Iterable[sqlite3.Row]) -> None:
    rows = list(rows)
    if not rows:
        return
    delivery = insert(connection, "delivery", dict(columns))
    connection.executemany(
        "INSERT INTO delivery_item (delivery, position, sop_instance_uid, sha256) VALUES (?, ?, ?, ?)",
        [(delivery, position, row["sop_instance_uid"], row["sha256"]) for position, row in enumerate(rows)],
    )
