"""C-STORE: what a storage request is answered (PS3.4 B.2). Knows no wire; the sink does the work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dicom_node.errors import IdentityMismatch, InvalidInstance
from dicom_node.interfaces import InstanceSink
from dicom_node.model import Source, StoreOutcome, StoreResult

__all__ = ["StoreRequest", "StoreService"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """A C-STORE request as it came: UIDs may be missing (None), and nothing of it is trusted.

    `context_sop_class_uid` is the abstract syntax of the presentation context it came in.
    """

    context_sop_class_uid: str
    transfer_syntax_uid: str
    sop_class_uid: str | None
    sop_instance_uid: str | None


class StoreService:
    """Answers storage requests through the one door for instances."""

    def __init__(self, sink: InstanceSink) -> None:
        self._sink = sink

    def store(
        self, request: StoreRequest, fragments: Iterable[bytes | memoryview] | None, source: Source
    ) -> StoreResult:
        """The status to answer; Success only when the instance would survive a power cut.

        `fragments` are the data set's bytes, None when the request came without one. Raises only what the sink
        raises, and the sink raises nothing for what a peer sent.
        """
        if not request.sop_class_uid or not request.sop_instance_uid:
            return _refused(InvalidInstance.dimse_status, "the request lacks a SOP Class or Instance UID")
        if fragments is None:
            return _refused(InvalidInstance.dimse_status, "the request has no data set")
        if request.sop_class_uid != request.context_sop_class_uid:
            return _refused(IdentityMismatch.dimse_status, "the SOP Class is not the one of the context")
        return self._sink.accept(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            fragments=fragments,
            source=source,
        )


def _refused(status: int, comment: str) -> StoreResult:
    return StoreResult(status=status, outcome=StoreOutcome.REFUSED, comment=comment)
