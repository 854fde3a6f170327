"""What arrives and how it is kept: sources, headers, files, instances and what became of storing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

__all__ = [
    "ArchivedFile",
    "BootTime",
    "ConflictPolicy",
    "InstanceHeader",
    "InstanceRecord",
    "JournalPlace",
    "Origin",
    "Receipt",
    "Source",
    "StoreOutcome",
    "StoreResult",
    "StoredInstance",
]


class Origin(Enum):
    """Where an instance came from; rules see only RECEIVED ones unless they say `origin: any`."""

    RECEIVED = "received"
    PRODUCED = "produced"
    RETURNED = "returned"  # from an AE configured as an engine, or our own result coming back


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Who sent an instance. `association_id` is None for what the node itself produced."""

    calling_ae_title: str
    called_ae_title: str
    address: str
    association_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BootTime:
    """A moment on the boot clock. Moments of another boot cannot be compared: they count as long past."""

    boot_id: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceHeader:
    """What the index knows of one instance, scanned from its data set without decoding pixels.

    `attributes` maps DICOM keywords to decoded text (multi-valued elements joined by a backslash, surrounding padding
    stripped). `pixel_data_offset` counts from the start of the *data set*, None when there is no pixel data.
    `irregular_uids` is true when a UID had padding or leading zeros that were tolerated.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    attributes: Mapping[str, str]
    specific_character_set: str = ""
    pixel_data_offset: int | None = None
    irregular_uids: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedFile:
    """Bytes that are durable in the archive: a Part-10 file at `location` (archive-relative, opaque).

    The data set occupies `data_set_length` bytes from `data_set_offset`; `sha256` is of those bytes only
    (`dicom_node.digests`: the name is older than the kind). `journal`:
    where the intake journal holds all of it until the file itself is durable, None when the file is so already.
    """

    location: str
    data_set_offset: int
    data_set_length: int
    sha256: str
    journal: JournalPlace | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPlace:
    """A record of the intake journal: the name of that life of its segment (16 random bytes), and where it begins."""

    segment: bytes
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What is known of a received instance beside its bytes: what a file alone could not tell after a crash."""

    source: Source
    origin: Origin
    conflict_policy: ConflictPolicy
    received_at: datetime
    received_boot: BootTime


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """One instance on its way into the index."""

    header: InstanceHeader
    file: ArchivedFile
    source: Source
    origin: Origin
    received_at: datetime
    received_boot: BootTime


class ConflictPolicy(Enum):
    """What happens when a known SOP Instance UID arrives with other content."""

    KEEP_FIRST = "keep-first"
    REPLACE = "replace"
    REFUSE = "refuse"


class StoreOutcome(Enum):
    """What became of one received instance."""

    NEW = "new"
    DUPLICATE = "duplicate"  # same bytes: nothing new
    VARIANT = "variant"  # other content kept durably beside the first
    HEADER_CHANGED = "header-changed"  # a variant whose pixel data is the same
    REPLACED = "replaced"
    OTHER_SYNTAX = "other-syntax"  # the same instance in another transfer syntax, both kept
    SET_ASIDE = "set-aside"  # from an engine, under UIDs of one job: kept, but no study of its own
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreResult:
    """The answer to a C-STORE: `status` goes on the wire, `comment` is an Error Comment without patient data."""

    status: int
    outcome: StoreOutcome | None = None
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredInstance:
    """One instance as retrieval, engines and encoders see it; `path` is absolute and ready to open."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    path: str
    data_set_offset: int
    data_set_length: int
    sha256: str
    origin: Origin
    modality: str = ""
