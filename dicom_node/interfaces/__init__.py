"""Every contract between the parts; the semantics are in the docstrings and in `tests/contract/`.

Implementations never import each other, only this package, `model` and `errors`; `node` wires them.
"""

from dicom_node.interfaces.archive import (
    Archive,
    ArchivedObject,
    AssociationLog,
    CheckedArchive,
    CheckedIndex,
    InstanceIndex,
    InstanceSink,
    JournaledObject,
    KnownFile,
    Spool,
)
from dicom_node.interfaces.clock import Clock, seconds_since
from dicom_node.interfaces.engines import (
    CommitmentAsker,
    CommitmentReporter,
    Engine,
    Heartbeat,
    PollingEngine,
    ResultEncoder,
    Sender,
)
from dicom_node.interfaces.outbox import CommitmentBook, Commitments, Outbox, ReportBook
from dicom_node.interfaces.queue import (
    EngineLedger,
    JobQueue,
    OpenJob,
    OpenStudies,
    ReturnedObject,
    Returns,
    RoutedSeries,
    Status,
    StudyLedger,
    WorkQueue,
)

__all__ = [
    "Archive",
    "ArchivedObject",
    "AssociationLog",
    "CheckedArchive",
    "CheckedIndex",
    "Clock",
    "CommitmentAsker",
    "CommitmentBook",
    "CommitmentReporter",
    "Commitments",
    "Engine",
    "EngineLedger",
    "Heartbeat",
    "InstanceIndex",
    "InstanceSink",
    "JobQueue",
    "JournaledObject",
    "KnownFile",
    "OpenJob",
    "OpenStudies",
    "Outbox",
    "PollingEngine",
    "ReportBook",
    "ResultEncoder",
    "ReturnedObject",
    "Returns",
    "RoutedSeries",
    "Sender",
    "Spool",
    "Status",
    "StudyLedger",
    "WorkQueue",
    "seconds_since",
]
