"""Between catalog rows and values: what the ledger, the jobs and the deliveries read and write alike."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from dicom_node.errors import LeaseLost
from dicom_node.interfaces import Clock, seconds_since
from dicom_node.model import (
    BootTime,
    Origin,
    SeriesHeader,
    Source,
    StoredInstance,
)
from dicom_node.store.database import Database

__all__ = ["CatalogPart", "QueueOptions", "input_digest", "stored_instance", "utc", "utc_text"]


@lru_cache(maxsize=64)
def utc_text(moment: datetime) -> str:
    """A moment as the catalog keeps it: one form, so that text order is time order."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def utc(text: str) -> datetime:
    """A kept moment, aware."""
    return datetime.fromisoformat(text)


_quoted = json.encoder.encode_basestring
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


def json_text(value: Any) -> str:
    """Compact JSON; what JSON does not know is kept as its text."""
    return _encode(value)


def texts_json(texts: Mapping[str, str]) -> str:
    """As `json_text`, of texts under plain keywords: setting up an encoder costs more than encoding a few of them."""
    return "{" + ",".join([f'"{keyword}":{_quoted(text)}' for keyword, text in texts.items()]) + "}"


@lru_cache(maxsize=256)
def source_text(source: Source) -> str:
    """A Source as the catalog keeps it; those of one association are all the same."""
    return json_text(asdict(source))


def source_of(text: str) -> Source:
    """A kept Source; '{}' stands for the node itself."""
    return Source(**({"calling_ae_title": "", "called_ae_title": "", "address": ""} | json.loads(text)))


def packed_header(header: SeriesHeader) -> bytes:
    """A header for the catalog. A thousand slices' geometry is mostly repetition: deflate takes nine tenths away."""
    fields = {
        "instance_count": header.instance_count,
        "values": {keyword: list(values) for keyword, values in header.values.items()},
        "missing_in": dict(header.missing_in),
        "geometry": [dict(instance) for instance in header.geometry],
        "distinct_counts": dict(header.distinct_counts),
    }
    return zlib.compress(json_text(fields).encode(), level=3)


def unpacked_header(series_instance_uid: str, blob: bytes) -> SeriesHeader:
    """The header that `packed_header` packed."""
    fields = json.loads(zlib.decompress(blob))
    return SeriesHeader(
        series_instance_uid=series_instance_uid,
        instance_count=fields["instance_count"],
        values={keyword: tuple(values) for keyword, values in fields["values"].items()},
        missing_in=fields["missing_in"],
        geometry=tuple(fields["geometry"]),
        distinct_counts=fields["distinct_counts"],
    )


def input_digest(instances: Iterable[tuple[str, str]]) -> str:
    """Identity of what an engine receives: SHA-256 over the sorted (SOP Instance UID, SHA-256 of the data set)."""
    digest = hashlib.sha256()
    for sop_instance_uid, sha256 in sorted(instances):
        digest.update(f"{sop_instance_uid} {sha256}\n".encode())
    return digest.hexdigest()


def stored_instance(row: sqlite3.Row, archive_path: Callable[[str], str]) -> StoredInstance:
    """The value of an `instance` row."""
    return StoredInstance(
        sop_class_uid=row["sop_class_uid"],
        sop_instance_uid=row["sop_instance_uid"],
        study_instance_uid=row["study_instance_uid"],
        series_instance_uid=row["series_instance_uid"],
        transfer_syntax_uid=row["transfer_syntax_uid"],
        path=archive_path(row["location"]),
        data_set_offset=row["data_set_offset"],
        data_set_length=row["data_set_length"],
        sha256=row["sha256"],
        origin=Origin(row["origin"]),
        modality=row["modality"],
    )


def _takes_all(destination: str, modality: str) -> bool:
    return True


def _no_engine(destination: str, engine: str) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """What of the configuration the catalog's side of the work has to know.

    `takes(destination, modality)`: whether a destination is sent results of that modality. `immediate_modalities`: a
    series of one single image of these need not wait. `analyse_conflicts`: studies under two patient identities are
    analysed without a person's release. `is_engine(destination, engine)`: whether the destination is that engine's own
    AE, which never gets back what it made.
    """

    takes: Callable[[str, str], bool] = _takes_all
    immediate_modalities: tuple[str, ...] = ("CR", "DX", "MG")
    analyse_conflicts: bool = False
    is_engine: Callable[[str, str], bool] = _no_engine


class CatalogPart:
    """A view on the catalog: the database, where files are, what time it is, what the configuration says."""

    def __init__(
        self,
        database: Database,
        archive_path: Callable[[str], str],
        clock: Clock,
        options: QueueOptions | None = None,
    ) -> None:
        self.database = database
        self.archive_path = archive_path
        self.clock = clock
        self.options = options or QueueOptions()

    def stored(self, row: sqlite3.Row) -> StoredInstance:
        """The value of an `instance` row."""
        return stored_instance(row, self.archive_path)

    def age_s(self, since_s: float, since_boot_id: str, since_at: str) -> float:
        """Seconds since a kept moment: by the boot clock, after a reboot by the wall clock, never negative."""
        age = seconds_since(BootTime(boot_id=since_boot_id, seconds=since_s), self.clock.boot())
        if age == float("inf"):
            age = (self.clock.wall() - utc(since_at)).total_seconds()
        return max(age, 0.0)

    def _in(self, delay_s: float) -> tuple[float, str]:
        """The boot time `delay_s` from now, for a lease or a delay."""
        now = self.clock.boot()
        return now.seconds + delay_s, now.boot_id

    def _now_columns(self) -> dict[str, Any]:
        """`since_*` columns for now."""
        now = self.clock.boot()
        return {"since_s": now.seconds, "since_boot_id": now.boot_id, "since_at": utc_text(self.clock.wall())}


def check_lease(connection: sqlite3.Connection, table: str, row_id: int, token: int) -> None:
    """Raise LeaseLost unless row `row_id` of `table` is leased under `token`."""
    row = connection.execute(f"SELECT state, token FROM {table} WHERE id = ?", (row_id,)).fetchone()
    if row is None or row["state"] != "leased" or row["token"] != token:
        raise LeaseLost(f"{table} {row_id} is no longer leased under token {token}")


def insert(connection: sqlite3.Connection, table: str, columns: dict[str, Any]) -> int:
    """Insert one row; returns its id. Table and column names come from this package only."""
    names = ", ".join(columns)
    marks = ", ".join("?" * len(columns))
    cursor = connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(columns.values()))
    return int(cursor.lastrowid or 0)


def update(connection: sqlite3.Connection, table: str, row_id: int, columns: dict[str, Any]) -> None:
    """Change columns of the row with that id."""
    assignments = ", ".join(f"{name} = ?" for name in columns)
    connection.execute(f"UPDATE {table} SET {assignments} WHERE id = ?", (*columns.values(), row_id))
