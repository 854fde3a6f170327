"""C-FIND as SCU: which objects of a study a destination has (PS3.4 C.4.1, Study Root, IMAGE level)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from pydicom.dataset import Dataset

from dicom_node.config import DeliverySettings
from dicom_node.dimse.commands import WITH_DATA_SET, CommandField, encode_command
from dicom_node.dimse.contexts import EXPLICIT_LE, IMPLICIT_LE, STUDY_ROOT_FIND, ProposedContext
from dicom_node.dimse.link import AssociationLost, Message
from dicom_node.dimse.request import MAX_IDENTIFIER_BYTES, encode_identifier, read_data_set
from dicom_node.dimse.requestor import open_link as open_own_link
from dicom_node.dimse.session import OpenLink, Session, status_of
from dicom_node.errors import DeliveryUnavailable
from dicom_node.model import Destination
from dicom_node.services.identifier import UNREADABLE, BadIdentifier

__all__ = ["DimseFinder"]

MOST_MATCHES = 200_000  # of one series: a peer that never ends
FIND_S = 300.0  # for one study: nor shall it take for ever
_PENDING = (0xFF00, 0xFF01)


class DimseFinder:
    """Asks destinations what they have. Keeps no connection between calls. May be used by several threads."""

    def __init__(
        self, settings: DeliverySettings, default_calling_ae_title: str, open_link: OpenLink = open_own_link
    ) -> None:
        self._settings = settings
        self._calling = default_calling_ae_title
        self._open_link = open_link

    def find_instances(
        self,
        destination: Destination,
        study_instance_uid: str,
        series_instance_uids: Collection[str],
        heartbeat: Callable[[], None],
    ) -> frozenset[str] | None:
        """SOP Instance UIDs the destination has in these series; None when it takes no queries at all.

        Raises DeliveryUnavailable, DeliveryRefused when it does not say; `heartbeat` is called meanwhile, and what it
        raises passes through.
        """
        context = ProposedContext(abstract_syntax=STUDY_ROOT_FIND, transfer_syntaxes=(EXPLICIT_LE, IMPLICIT_LE))
        found: set[str] = set()
        session = Session(
            self._settings, destination, [context], calling_ae_title=self._calling, open_link=self._open_link
        )
        with session:
            agreed = [(cx, syntax) for (uid, syntax), cx in session.contexts.items() if uid == STUDY_ROOT_FIND]
            if not agreed:
                return None
            until = time.monotonic() + FIND_S
            try:
                for series in series_instance_uids:
                    heartbeat()
                    asked = _asked(study_instance_uid, series)
                    found |= self._of_series(session, *agreed[0], asked, heartbeat, until)
            except (AssociationLost, _NoAnswer) as exc:
                raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
        return frozenset(found)

    def _of_series(
        self,
        session: Session,
        context_id: int,
        syntax: str,
        asked: Dataset,
        heartbeat: Callable[[], None],
        until: float,
    ) -> set[str]:
        message_id = session.next_message_id()
        command = encode_command(
            {
                "AffectedSOPClassUID": STUDY_ROOT_FIND,
                "CommandField": CommandField.C_FIND,
                "MessageID": message_id,
                "Priority": 2,  # low
                "CommandDataSetType": WITH_DATA_SET,
            }
        )
        session.link.send_message(context_id, command, [encode_identifier(asked, syntax)])
        found: set[str] = set()
        for _ in range(MOST_MATCHES):
            if time.monotonic() > until:
                raise _NoAnswer(f"it had not answered to the end after {FIND_S:g} s")
            message = session.link.await_response(message_id, self._settings.response_timeout_s, heartbeat)
            status = status_of(message)
            if status in _PENDING:
                found |= _matched(message, syntax, asked)
            elif status:
                raise _NoAnswer(f"it answered {status:04X}H to a query at the IMAGE level")
            else:
                return found
        raise _NoAnswer(f"it answered a query with more than {MOST_MATCHES} matches")


class _NoAnswer(Exception):
    """What came says nothing of what the destination has."""


def _asked(study: str, series: str) -> Dataset:
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "IMAGE"
    identifier.StudyInstanceUID = study
    identifier.SeriesInstanceUID = series
    identifier.SOPInstanceUID = ""
    return identifier


def _matched(message: Message, syntax: str, asked: Dataset) -> set[str]:
    """The SOP Instance UID that was found; nothing where it is of another study or series: the keys were ignored."""
    try:
        match = read_data_set(message.data_set, syntax, MAX_IDENTIFIER_BYTES)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
            if str(match.get(keyword) or asked[keyword].value) != asked[keyword].value:
                return set()
        return {str(match.get("SOPInstanceUID") or "")} - {""}
    except (BadIdentifier, *UNREADABLE) as exc:
        raise _NoAnswer("it answered a query with what cannot be read") from exc
