"""Tables of what was decided and what follows: headers, verdicts, jobs, deliveries.

The index's tables say what is there; these say what became of it. A series is closed by one row in `routed_series`;
its verdicts hang on that row, so the history of every decision stays. `rank` is `Priority.rank`. Leases and delays are
boot times (`*_s` with `*_boot_id`): of another boot, or NULL, they count as past. `*_at` are ISO 8601 UTC.
A series is named by both its UIDs: careless anonymisers reuse a series UID in two studies.
"""

from __future__ import annotations

from sqlite_utils import Database, Migrations

from dicom_node.store.tally import SCHEMA

queue_migrations = Migrations("queue")

_TABLES = """
CREATE TABLE routed_series (                     -- one row each time a series is closed
    id INTEGER PRIMARY KEY,
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    revision INTEGER NOT NULL,
    close_trigger TEXT NOT NULL,                 -- a CloseTrigger value
    rule_set_digest TEXT NOT NULL,
    outcome TEXT NOT NULL,                       -- routed | filtered | held (identity conflict) | failed
    reason TEXT NOT NULL,                        -- of filtered, held and failed
    planned TEXT NOT NULL,                       -- JSON list: rules that asked for a job or a sending
    routed_at TEXT NOT NULL
);
CREATE INDEX routed_series_series ON routed_series (study_instance_uid, series_instance_uid, id);
CREATE INDEX routed_series_at ON routed_series (routed_at);

CREATE TABLE standing (                          -- where a series stands since its latest closing; see store.standing
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    routed INTEGER NOT NULL REFERENCES routed_series (id),   -- the latest closing
    class TEXT NOT NULL,                         -- routed | filtered | waiting (held) | failed | lost
    reason TEXT NOT NULL,
    PRIMARY KEY (study_instance_uid, series_instance_uid)
) WITHOUT ROWID;
CREATE INDEX standing_routed ON standing (routed);
CREATE INDEX standing_class ON standing (class, reason);

CREATE TABLE series_header (                     -- of the latest closing; apart, since it is large
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    header BLOB NOT NULL,                        -- SeriesHeader as JSON, zlib
    PRIMARY KEY (study_instance_uid, series_instance_uid)
);

CREATE TABLE verdict (
    routed INTEGER NOT NULL REFERENCES routed_series (id), position INTEGER NOT NULL,
    rule TEXT NOT NULL,
    matched INTEGER NOT NULL,
    reason TEXT NOT NULL,
    conditions TEXT NOT NULL,                    -- JSON: expression, outcome, values, explanation
    PRIMARY KEY (routed, position)
) WITHOUT ROWID;
CREATE INDEX verdict_match ON verdict (rule, routed) WHERE matched = 1;

CREATE TABLE job (
    id INTEGER PRIMARY KEY,
    study_instance_uid TEXT NOT NULL, revision INTEGER NOT NULL, series_instance_uid TEXT NOT NULL,
    rule TEXT NOT NULL, engine TEXT NOT NULL,
    priority TEXT NOT NULL, rank INTEGER NOT NULL,
    results TEXT NOT NULL, destinations TEXT NOT NULL,       -- JSON lists
    send_what TEXT NOT NULL, late_instances TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending',       -- a JobState value; moves only by model.next_job_state
    attempts INTEGER NOT NULL DEFAULT 0, outages INTEGER NOT NULL DEFAULT 0,
    run_number INTEGER NOT NULL,
    input_digest TEXT NOT NULL,
    superseded_job INTEGER REFERENCES job (id),
    token INTEGER NOT NULL DEFAULT 0,            -- fencing: counts up with each lease
    worker TEXT NOT NULL DEFAULT '',
    handle TEXT,                                 -- an external engine's own id
    error TEXT NOT NULL DEFAULT '',
    stages TEXT NOT NULL DEFAULT '{}',           -- JSON: stage of a DONE job to its seconds
    lease_until_s REAL, lease_boot_id TEXT,
    not_before_s REAL, not_before_boot_id TEXT,
    created_at TEXT NOT NULL,
    since_s REAL NOT NULL, since_boot_id TEXT NOT NULL, since_at TEXT NOT NULL,  -- made, or retried by a person
    UNIQUE (study_instance_uid, series_instance_uid, rule, run_number)
);
CREATE INDEX job_runnable ON job (rank, id) WHERE state IN ('pending', 'leased', 'waiting');
CREATE INDEX job_state ON job (state);

CREATE TABLE job_input (                         -- what a job is to analyse, fixed when it is made
    job INTEGER NOT NULL REFERENCES job (id),
    sop_instance_uid TEXT NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (job, sop_instance_uid)
) WITHOUT ROWID;

CREATE TABLE job_result (                        -- what a job produced, in sending order
    job INTEGER NOT NULL REFERENCES job (id), position INTEGER NOT NULL,
    sop_instance_uid TEXT NOT NULL,
    PRIMARY KEY (job, position)
) WITHOUT ROWID;
CREATE INDEX job_result_instance ON job_result (sop_instance_uid);

CREATE TABLE delivery (
    id INTEGER PRIMARY KEY,
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL, rule TEXT NOT NULL,
    destination TEXT NOT NULL,
    job INTEGER REFERENCES job (id),             -- of results
    input_digest TEXT NOT NULL,                  -- of source images: what was to be sent; '' for results
    rank INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending',       -- a DeliveryState value
    attempts INTEGER NOT NULL DEFAULT 0,
    token INTEGER NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT '',
    lease_until_s REAL, lease_boot_id TEXT,
    not_before_s REAL, not_before_boot_id TEXT,
    created_at TEXT NOT NULL,
    since_s REAL NOT NULL, since_boot_id TEXT NOT NULL, since_at TEXT NOT NULL
);
CREATE UNIQUE INDEX delivery_once ON delivery (job, destination) WHERE job IS NOT NULL;
CREATE INDEX delivery_runnable ON delivery (destination, rank, id) WHERE state IN ('pending', 'leased');
CREATE INDEX delivery_source ON delivery (study_instance_uid, series_instance_uid, rule, destination);
CREATE INDEX delivery_state ON delivery (state, destination);

CREATE TABLE delivery_item (
    delivery INTEGER NOT NULL REFERENCES delivery (id), position INTEGER NOT NULL,
    sop_instance_uid TEXT NOT NULL, sha256 TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting',       -- waiting | sent | refused
    dimse_status INTEGER,
    error TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (delivery, position)
) WITHOUT ROWID;
CREATE INDEX delivery_item_instance ON delivery_item (sop_instance_uid);

-- What the ledger counts beside `standing`. Images coming into an open series touch none of these.
CREATE INDEX series_routed ON series (study_instance_uid, series_instance_uid) WHERE routing = 'routed';
CREATE INDEX series_restored ON series (study_instance_uid) WHERE routing = 'none' AND image_count > 0;
CREATE INDEX instance_document ON instance (study_instance_uid, series_instance_uid)
    WHERE origin = 'received' AND is_image = 0;
"""


@queue_migrations()
def queue_tables(db: Database) -> None:
    """The first schema."""
    for statement in _TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)


@queue_migrations()
def job_strikes(db: Database) -> None:
    """Attempts that killed or hung what runs the engine: after two the job is not tried again by itself."""
    db.execute("ALTER TABLE job ADD COLUMN strikes INTEGER NOT NULL DEFAULT 0")


@queue_migrations()
def engine_ledger(db: Database) -> None:
    """What engines outside the node hold for a job, what was sent to them, and what they are still to be told."""
    db.execute("ALTER TABLE job ADD COLUMN note TEXT NOT NULL DEFAULT ''")
    for statement in _ENGINE_TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)


@queue_migrations()
def returned_objects(db: Database) -> None:
    """What engines that answer by C-STORE sent back, each time it came, and the UIDs studies left the node under."""
    for statement in _RETURNED_TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)


@queue_migrations()
def receipts(db: Database) -> None:
    """What was received, apart from what became of it (`store.receipts`); of what is here, as its rows tell."""
    for statement in _RECEIPT_TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)


@queue_migrations()
def storage_commitment(db: Database) -> None:
    """What peers ask the node to commit to, what destinations committed to, and deliveries that wait for it."""
    for statement in _COMMITMENT_TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)


@queue_migrations()
def jobs_by_due_time(db: Database) -> None:
    """Whether any job is due is known without a look at each that is not, however many wait for an engine."""
    db.execute(
        "CREATE INDEX job_due ON job (engine, rank, not_before_boot_id, not_before_s) "
        "WHERE state IN ('pending', 'waiting')"
    )


@queue_migrations()
def tallies(db: Database) -> None:
    """Counts of what there is, kept by triggers (`store.tally`)."""
    for statement in SCHEMA:
        db.execute(statement)


@queue_migrations()
def deletions(db: Database) -> None:
    """Studies that were deleted and files that are still to go, what the node committed to, and when a study was last
    sent again; indexes without which each deletion would look through whole tables.
    """
    for statement in _DELETION_TABLES.split(";\n"):
        if statement.strip():
            db.execute(statement)
    db.execute(
        "CREATE TRIGGER reference_committed_to AFTER UPDATE OF reason ON commitment_reference "
        "WHEN new.reason = 0 BEGIN INSERT OR IGNORE INTO committed_to VALUES (new.sop_instance_uid); END"
    )


@queue_migrations()
def days_seen(db: Database) -> None:
    """Days on which the node ran, as far as what was received tells (`store.deletions`)."""
    db.execute("CREATE TABLE day_seen (day TEXT PRIMARY KEY) WITHOUT ROWID")
    db.execute("INSERT INTO day_seen SELECT DISTINCT substr(hour, 1, 10) FROM receipt")


_DELETION_TABLES = """
CREATE TABLE deletion (                          -- bounded: the oldest that ended are forgotten
    id INTEGER PRIMARY KEY,
    study_instance_uid TEXT NOT NULL,
    rule TEXT NOT NULL,                          -- of retention; 'person'
    who TEXT NOT NULL, why TEXT NOT NULL,
    safe TEXT NOT NULL,                          -- JSON: destination to committed | found | accepted
    series INTEGER NOT NULL,
    instances TEXT NOT NULL,                     -- JSON: SOP class to how many
    files INTEGER NOT NULL, bytes INTEGER NOT NULL,
    patient_ids TEXT NOT NULL,                   -- JSON, for the audit trail; '[]' once it has ended
    at TEXT NOT NULL, ended_at TEXT              -- NULL: its rows are gone, files of it may not be
);
CREATE INDEX deletion_study ON deletion (study_instance_uid, id);
CREATE INDEX deletion_unfinished ON deletion (id) WHERE ended_at IS NULL;
CREATE TABLE doomed (                            -- files to be removed, unless a row speaks of them again
    deletion INTEGER NOT NULL REFERENCES deletion (id), location TEXT NOT NULL,
    PRIMARY KEY (deletion, location)
) WITHOUT ROWID;
CREATE INDEX doomed_location ON doomed (location);
CREATE TABLE committed_to (                      -- by this node, asked by a peer
    sop_instance_uid TEXT PRIMARY KEY
) WITHOUT ROWID;
INSERT OR IGNORE INTO committed_to SELECT sop_instance_uid FROM commitment_reference WHERE reason = 0;
ALTER TABLE study ADD COLUMN again_s REAL;
ALTER TABLE study ADD COLUMN again_boot_id TEXT;
ALTER TABLE study ADD COLUMN again_at TEXT;
ALTER TABLE sending ADD COLUMN former_job INTEGER;
CREATE INDEX study_first_received ON study (first_received_at, study_instance_uid);
CREATE INDEX job_superseded ON job (superseded_job) WHERE superseded_job IS NOT NULL;
CREATE INDEX sending_job ON sending (job) WHERE job IS NOT NULL;
CREATE INDEX cancellation_job ON cancellation (job)
"""


_RECEIPT_TABLES = """
CREATE TABLE receipt (                           -- one row for each series that was received; see store.receipts
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    hour TEXT NOT NULL,                          -- of its first instance: ISO 8601 UTC up to the hour
    calling_ae TEXT NOT NULL,
    PRIMARY KEY (study_instance_uid, series_instance_uid)
) WITHOUT ROWID;
CREATE INDEX receipt_hour ON receipt (hour, calling_ae);
CREATE INDEX instance_missing ON instance (study_instance_uid, series_instance_uid) WHERE state = 'missing';
INSERT INTO receipt SELECT study_instance_uid, series_instance_uid, substr(min(received_at), 1, 13),
    coalesce(json_extract(source, '$.calling_ae_title'), '')
FROM instance WHERE origin = 'received' GROUP BY study_instance_uid, series_instance_uid
"""

_COMMITMENT_TABLES = """
CREATE TABLE commitment_request (                -- N-ACTIONs of peers; gone some time after they ended
    id INTEGER PRIMARY KEY,
    calling_ae_title TEXT NOT NULL, called_ae_title TEXT NOT NULL,
    transaction_uid TEXT NOT NULL,
    digest TEXT NOT NULL,                        -- of its references, in any order
    state TEXT NOT NULL,                         -- asked | judged | reported | failed
    round INTEGER NOT NULL DEFAULT 1,            -- counts up when the peer asks the same anew
    attempts INTEGER NOT NULL, error TEXT NOT NULL,
    not_before_s REAL, not_before_boot_id TEXT,  -- of the next report
    asked_at TEXT NOT NULL, ended_at TEXT,
    since_s REAL NOT NULL, since_boot_id TEXT NOT NULL, since_at TEXT NOT NULL,
    UNIQUE (calling_ae_title, transaction_uid)
);
CREATE INDEX commitment_request_open ON commitment_request (calling_ae_title, state)
    WHERE state IN ('asked', 'judged');
CREATE INDEX commitment_request_ended ON commitment_request (ended_at) WHERE ended_at IS NOT NULL;
CREATE TABLE commitment_reference (
    request INTEGER NOT NULL REFERENCES commitment_request (id), position INTEGER NOT NULL,
    sop_class_uid TEXT NOT NULL, sop_instance_uid TEXT NOT NULL,
    reason INTEGER,                              -- 0: committed to; a Failure Reason (0008,1197); NULL: not checked
    PRIMARY KEY (request, position)
) WITHOUT ROWID;
CREATE INDEX commitment_reference_instance ON commitment_reference (sop_instance_uid);
CREATE TABLE commitment_question (               -- N-ACTIONs of the node to destinations; never removed
    id INTEGER PRIMARY KEY,
    transaction_uid TEXT NOT NULL UNIQUE,
    delivery INTEGER NOT NULL REFERENCES delivery (id), destination TEXT NOT NULL,
    asked_at TEXT NOT NULL, answered_at TEXT
);
CREATE INDEX commitment_question_delivery ON commitment_question (delivery);
CREATE TABLE commitment_object (                 -- what a destination said of one object as it was sent
    question INTEGER NOT NULL REFERENCES commitment_question (id),
    sop_instance_uid TEXT NOT NULL, sha256 TEXT NOT NULL,
    reason INTEGER,                              -- 0: committed to; a Failure Reason; NULL: not answered
    at TEXT,
    PRIMARY KEY (question, sop_instance_uid)
) WITHOUT ROWID;
CREATE INDEX commitment_object_instance ON commitment_object (sop_instance_uid, sha256);
ALTER TABLE delivery_item ADD COLUMN sent_sha256 TEXT NOT NULL DEFAULT '';
ALTER TABLE delivery_item ADD COLUMN commitment TEXT NOT NULL DEFAULT '';
ALTER TABLE delivery_item ADD COLUMN question INTEGER;
ALTER TABLE delivery_item ADD COLUMN resent INTEGER NOT NULL DEFAULT 0;
DROP INDEX delivery_runnable;
CREATE INDEX delivery_runnable ON delivery (destination, rank, id) WHERE state IN ('pending', 'leased', 'committing')
"""

_RETURNED_TABLES = """
CREATE TABLE returned (                          -- never removed; once more of what no job took replaces the one before
    id INTEGER PRIMARY KEY AUTOINCREMENT,        -- the order of arrival
    sop_instance_uid TEXT NOT NULL, sop_class_uid TEXT NOT NULL,
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    modality TEXT NOT NULL, transfer_syntax_uid TEXT NOT NULL, sha256 TEXT NOT NULL,
    calling_ae_title TEXT NOT NULL,
    outcome TEXT NOT NULL,                       -- a StoreOutcome value
    about_study TEXT NOT NULL,                   -- its study here; its own unless it came under UIDs of one job
    job INTEGER REFERENCES job (id),             -- whose result it is
    at TEXT NOT NULL, at_s REAL NOT NULL, at_boot_id TEXT NOT NULL
);
CREATE INDEX returned_study ON returned (study_instance_uid, id);
CREATE INDEX returned_about ON returned (about_study, id);
CREATE INDEX returned_instance ON returned (sop_instance_uid);
CREATE INDEX returned_job ON returned (job);
CREATE INDEX sending_remote ON sending (remote_id) WHERE remote_id <> ''
"""

_ENGINE_TABLES = """
CREATE TABLE sending (                           -- what left the node for an engine; never removed
    id INTEGER PRIMARY KEY,
    study_instance_uid TEXT NOT NULL, series_instance_uid TEXT NOT NULL,
    job INTEGER REFERENCES job (id),             -- NULL: an engine that was run by hand
    engine TEXT NOT NULL, host TEXT NOT NULL, what TEXT NOT NULL,
    objects INTEGER NOT NULL, bytes INTEGER, sha256 TEXT NOT NULL,
    identifiable INTEGER NOT NULL,
    remote_id TEXT NOT NULL,
    state TEXT NOT NULL,                         -- a SendingState value
    error TEXT NOT NULL DEFAULT '',
    begun_at TEXT NOT NULL, ended_at TEXT
);
CREATE INDEX sending_study ON sending (study_instance_uid, id);

CREATE TABLE cancellation (                      -- work at an engine that nobody waits for any more
    id INTEGER PRIMARY KEY,
    job INTEGER NOT NULL REFERENCES job (id),
    study_instance_uid TEXT NOT NULL,
    engine TEXT NOT NULL, handle TEXT NOT NULL, note TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending',       -- pending | told | failed
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    not_before_s REAL, not_before_boot_id TEXT,
    asked_at TEXT NOT NULL, ended_at TEXT
);
CREATE INDEX cancellation_due ON cancellation (id) WHERE state = 'pending';
CREATE INDEX cancellation_study ON cancellation (study_instance_uid, id);
CREATE UNIQUE INDEX cancellation_once ON cancellation (job, handle) WHERE state = 'pending'
"""
