"""Tables of the index: patients, studies, series, instances, variants, associations.

One denormalised row per study carries what C-FIND asks for; `attributes` columns hold every other kept attribute as
JSON by keyword. Moments are boot times (`*_boot_s` with `*_boot_id`), `*_at` are ISO 8601 UTC for people.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

index_migrations = Migrations("index")

_TABLES = """
CREATE TABLE patient (
    id INTEGER PRIMARY KEY,
    patient_id TEXT NOT NULL,          -- '' never joins two studies: such a patient has exactly one study
    issuer TEXT NOT NULL,
    only_study TEXT NOT NULL,          -- Study Instance UID when patient_id is '', else ''
    patient_name TEXT NOT NULL,
    name_key TEXT NOT NULL,            -- case- and accent-folded, for matching
    birth_date TEXT NOT NULL,
    attributes TEXT NOT NULL,
    UNIQUE (patient_id, issuer, only_study)
);
CREATE INDEX patient_name_key ON patient (name_key);
CREATE INDEX patient_name_groups ON patient (id) WHERE instr(name_key, '=') > 0;

CREATE TABLE study (
    study_instance_uid TEXT PRIMARY KEY,
    patient INTEGER NOT NULL REFERENCES patient (id),
    patient_id TEXT NOT NULL, issuer TEXT NOT NULL, name_key TEXT NOT NULL, birth_date TEXT NOT NULL,
    study_date TEXT NOT NULL, study_time TEXT NOT NULL, accession_number TEXT NOT NULL, study_id TEXT NOT NULL,
    modalities TEXT NOT NULL,          -- '\\'-joined, sorted: Modalities in Study
    sop_classes TEXT NOT NULL,         -- '\\'-joined, sorted
    series_count INTEGER NOT NULL,
    instance_count INTEGER NOT NULL,
    attributes TEXT NOT NULL,
    identity_conflict INTEGER NOT NULL DEFAULT 0,
    released INTEGER NOT NULL DEFAULT 0,
    revision INTEGER NOT NULL DEFAULT 0,         -- counts up when a late image opens the next one; first is 1
    opened_boot_s REAL, opened_boot_id TEXT,     -- first image of the open revision
    last_boot_s REAL, last_boot_id TEXT,         -- last RECEIVED instance of any kind
    first_received_at TEXT NOT NULL, last_received_at TEXT NOT NULL
);
CREATE INDEX study_patient ON study (patient);
CREATE INDEX study_patient_id ON study (patient_id);
CREATE INDEX study_name_key ON study (name_key);
CREATE INDEX study_name_groups ON study (study_instance_uid) WHERE instr(name_key, '=') > 0;
CREATE INDEX study_date ON study (study_date, study_time, study_instance_uid);
CREATE INDEX study_accession ON study (accession_number);

CREATE TABLE series (
    series_instance_uid TEXT NOT NULL,
    study_instance_uid TEXT NOT NULL REFERENCES study (study_instance_uid),
    modality TEXT NOT NULL, series_number TEXT NOT NULL,
    instance_count INTEGER NOT NULL,
    image_count INTEGER NOT NULL DEFAULT 0,      -- RECEIVED images: what completion and rules care for
    attributes TEXT NOT NULL,
    routing TEXT NOT NULL DEFAULT 'none',        -- none: no received image; open: images not yet routed; routed
    received_seq INTEGER NOT NULL DEFAULT 0,     -- counts up with every RECEIVED image: routing detects a late one
    source TEXT NOT NULL DEFAULT '{}',           -- JSON of the last Source that fed it
    PRIMARY KEY (study_instance_uid, series_instance_uid)  -- careless anonymisers reuse a series UID in two studies
);
CREATE INDEX series_uid ON series (series_instance_uid);
CREATE INDEX series_open ON series (study_instance_uid) WHERE routing = 'open';

CREATE TABLE instance (
    sop_instance_uid TEXT PRIMARY KEY,
    sop_class_uid TEXT NOT NULL,
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    transfer_syntax_uid TEXT NOT NULL,
    instance_number TEXT NOT NULL,
    instance_order INTEGER NOT NULL,             -- Instance Number as an integer; the largest one when it is none
    location TEXT NOT NULL, data_set_offset INTEGER NOT NULL, data_set_length INTEGER NOT NULL, sha256 TEXT NOT NULL,
    pixel_data_offset INTEGER,
    origin TEXT NOT NULL, modality TEXT NOT NULL, is_image INTEGER NOT NULL,
    attributes TEXT NOT NULL,
    source TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'present',       -- present | missing (fsck)
    received_at TEXT NOT NULL,
    FOREIGN KEY (study_instance_uid, series_instance_uid) REFERENCES series (study_instance_uid, series_instance_uid)
);
CREATE INDEX instance_series ON instance (series_instance_uid, instance_order, sop_instance_uid);
CREATE INDEX instance_study ON instance (study_instance_uid);
CREATE INDEX instance_location ON instance (location);

CREATE TABLE variant (                           -- other content or syntax under a known SOP Instance UID
    id INTEGER PRIMARY KEY,
    sop_instance_uid TEXT NOT NULL, kind TEXT NOT NULL,   -- a StoreOutcome value
    transfer_syntax_uid TEXT NOT NULL,
    location TEXT NOT NULL, data_set_offset INTEGER NOT NULL, data_set_length INTEGER NOT NULL, sha256 TEXT NOT NULL,
    source TEXT NOT NULL, received_at TEXT NOT NULL,
    UNIQUE (sop_instance_uid, sha256, transfer_syntax_uid)
);
CREATE INDEX variant_location ON variant (location);

CREATE TABLE association (
    association_id TEXT PRIMARY KEY,
    epoch TEXT NOT NULL,                         -- of the process that holds it; dead epochs are closed at start
    calling_ae_title TEXT NOT NULL, called_ae_title TEXT NOT NULL, address TEXT NOT NULL,
    ended TEXT NOT NULL DEFAULT 'open',          -- an AssociationEnd value
    store_failed INTEGER NOT NULL DEFAULT 0,
    last_boot_s REAL NOT NULL, last_boot_id TEXT NOT NULL,
    opened_at TEXT NOT NULL
);
CREATE INDEX association_epoch ON association (epoch) WHERE ended = 'open';

CREATE TABLE study_association (                 -- which associations fed the open revision of a study
    study_instance_uid TEXT NOT NULL, association_id TEXT NOT NULL,
    PRIMARY KEY (study_instance_uid, association_id)
) WITHOUT ROWID;
"""


@index_migrations()
def index_tables(db: Database) -> None:
    """The first schema."""
    for statement in _TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)


@index_migrations()
def other_identities(db: Database) -> None:
    """Identities a study came under beside its own: a release does not hold for one that comes later.

    Those of before this table are not known, and count as new when they come again.
    """
    db.execute(
        "CREATE TABLE other_identity (study_instance_uid TEXT NOT NULL, patient_id TEXT NOT NULL, "
        "issuer TEXT NOT NULL, PRIMARY KEY (study_instance_uid, patient_id, issuer)) WITHOUT ROWID"
    )


@index_migrations()
def journaled_records(db: Database) -> None:
    """Records of the intake journal whose objects are indexed, until their segment is used again."""
    db.execute(
        "CREATE TABLE journaled (segment BLOB NOT NULL, place INTEGER NOT NULL, PRIMARY KEY (segment, place)) "
        "WITHOUT ROWID"
    )
