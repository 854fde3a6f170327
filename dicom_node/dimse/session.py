"""The node as SCU: sends stored bytes, asks whether a peer is there, fetches a study. Only bytes go out and come in.

`Session` is one association to one AE; C-MOVE sub-operations use it too. Contexts: for each SOP class that is sent, the
stored transfer syntax, Explicit and Implicit VR Little Endian, each in a context of its own, so that the peer's answer
says all it takes. What was accepted as stored goes out byte for byte; the rest is re-encoded on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import BinaryIO, Protocol, Self

from dicom_node.config import DeliverySettings
from dicom_node.dimse.commands import NO_DATA_SET, CommandField, StoreRequests, encode_command
from dicom_node.dimse.contexts import EXPLICIT_LE, IMPLICIT_LE, VERIFICATION, ProposedContext
from dicom_node.dimse.link import AssociationLost, Fragments, Link, Message
from dicom_node.dimse.outgoing import TEMPLATES, ShortFile, StoredDataSet, Template
from dicom_node.dimse.requestor import open_link as open_own_link
from dicom_node.errors import DeliveryRefused, DeliveryUnavailable, TranscodeError
from dicom_node.interfaces import Heartbeat
from dicom_node.model import Destination, StoredInstance
from dicom_node.transcode import transcode

__all__ = [
    "MAX_CONTEXTS",
    "DimseSender",
    "MoveOriginator",
    "OpenLink",
    "Session",
    "StoreSender",
    "batches",
    "is_stored",
    "status_of",
    "with_following",
]

log = logging.getLogger(__name__)

MAX_CONTEXTS = 128  # PS3.8 table 9-13: odd ids 1 .. 255
_CHUNK = 1024 * 1024
_LATER = range(0xA700, 0xA800)  # PS3.4 table B.2-1: out of resources


class OpenLink(Protocol):
    """Opens an association: one of the wires."""

    def __call__(
        self,
        destination: Destination,
        contexts: Sequence[ProposedContext],
        *,
        calling_ae_title: str,
        settings: DeliverySettings,
        max_data_set_bytes: int,
    ) -> Link:
        """The association, with what was accepted of `contexts`. Raises DeliveryRefused, DeliveryUnavailable."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOriginator:
    """Who asked for a C-MOVE, for the sub-operations' requests (PS3.7 9.1.1.1)."""

    ae_title: str
    message_id: int


def is_stored(status: int) -> bool:
    """Whether this status of a C-STORE means that the peer has the object: Success, Warning, Duplicate SOP Instance
    (PS3.7 Annex C).
    """
    return status in (0x0000, 0x0001, 0x0107, 0x0111, 0x0116) or status >> 12 == 0xB


def batches(instances: Sequence[StoredInstance]) -> Iterator[tuple[list[StoredInstance], list[ProposedContext]]]:
    """The instances in order, cut where the contexts they need no longer fit one association."""
    batch: list[StoredInstance] = []
    contexts: dict[tuple[str, str], ProposedContext] = {}
    known: set[tuple[str, str]] = set()  # SOP classes and stored syntaxes whose contexts are there
    for instance in instances:
        kind = (instance.sop_class_uid, instance.transfer_syntax_uid)
        if kind not in known:
            needed = {
                (instance.sop_class_uid, syntax): ProposedContext(
                    abstract_syntax=instance.sop_class_uid, transfer_syntaxes=(syntax,)
                )
                for syntax in dict.fromkeys((instance.transfer_syntax_uid, EXPLICIT_LE, IMPLICIT_LE))
            }
            if batch and len(contexts | needed) > MAX_CONTEXTS:
                yield batch, list(contexts.values())
                batch, contexts, known = [], {}, set()
            contexts |= needed
            known.add(kind)
        batch.append(instance)
    if batch:
        yield batch, list(contexts.values())


def with_following(
    instances: Sequence[StoredInstance],
) -> Iterator[tuple[StoredInstance, StoredInstance | None]]:
    """Each one, and the one after it; None after the last."""
    return zip_longest(instances, instances[1:])


class Session:
    """One association as requestor, used from one thread. A context manager: released at the end, aborted on errors.

    Raises DeliveryRefused for a permanent rejection, DeliveryUnavailable for everything else that keeps the
    association from being had: no TCP connection, transient rejection, abort, no answer.
    """

    def __init__(
        self,
        settings: DeliverySettings,
        destination: Destination,
        contexts: Sequence[ProposedContext],
        *,
        calling_ae_title: str,
        max_data_set_bytes: int = 8 * 1024**3,
        open_link: OpenLink = open_own_link,
        originator: MoveOriginator | None = None,
    ) -> None:
        self._settings = settings
        self._message_id = 0
        self._link = open_link(
            destination,
            contexts,
            calling_ae_title=destination.calling_ae_title or calling_ae_title,
            settings=settings,
            max_data_set_bytes=max_data_set_bytes,
        )
        self._closed = False
        agreed = self._link.contexts.values()
        self.contexts: Mapping[tuple[str, str], int] = {
            (context.abstract_syntax, context.transfer_syntax): context.context_id
            for context in agreed
            if context.we_ask
        }
        self.context_ids: Mapping[int, tuple[str, str]] = {
            context.context_id: (context.abstract_syntax, context.transfer_syntax) for context in agreed
        }
        self._sender = StoreSender(self._link, self.contexts, settings.response_timeout_s, originator)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(abort=kind is not None)

    @property
    def link(self) -> Link:
        """The association itself."""
        return self._link

    def close(self, *, abort: bool = False) -> None:
        """Release (or abort) the association. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._sender.close()
        if abort:
            self._link.abort()
        else:
            self._link.release()

    def next_message_id(self) -> int:
        """A fresh Message ID."""
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id

    def echo(self) -> int:
        """C-ECHO; the status. Raises AssociationLost."""
        message_id = self.next_message_id()
        context_id = next((cx for (uid, _), cx in self.contexts.items() if uid == VERIFICATION), None)
        if context_id is None:
            raise DeliveryRefused("the peer does not accept Verification")
        command = encode_command(
            {
                "AffectedSOPClassUID": VERIFICATION,
                "CommandField": CommandField.C_ECHO,
                "MessageID": message_id,
                "CommandDataSetType": NO_DATA_SET,
            }
        )
        self._link.send_message(context_id, command)
        return status_of(self._link.await_response(message_id, self._settings.response_timeout_s))

    def store(
        self,
        instance: StoredInstance,
        *,
        following: StoredInstance | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> tuple[int | None, str]:
        """C-STORE one instance; status and error. Status None: no context for it, unreadable, or not re-encodable.

        `following`: what will be stored next, as far as that is known: it is opened meanwhile. Raises AssociationLost.
        """
        return self._sender.store(instance, self.next_message_id(), following=following, on_wait=on_wait)


class StoreSender:
    """C-STORE requests on one link, one after the other, from one thread. A context manager.

    While the peer answers one, the next is opened, and what of it goes out in one write is read: only where it goes
    out as stored, and what goes wrong with it then is found again, and told, in its own turn.
    """

    def __init__(
        self,
        link: Link,
        contexts: Mapping[tuple[str, str], int],
        timeout_s: float,
        originator: MoveOriginator | None = None,
    ) -> None:
        self._link, self._timeout_s = link, timeout_s
        self._originator = None if originator is None else (originator.ae_title, originator.message_id)
        self._accepted: dict[str, dict[str, int]] = {}  # by SOP class: transfer syntax to context id
        for (sop_class_uid, syntax), context_id in contexts.items():
            self._accepted.setdefault(sop_class_uid, {}).setdefault(syntax, context_id)
        self._ahead: tuple[StoredInstance, StoredDataSet] | None = None
        self._template: Template | None = None
        self._requests: dict[str, StoreRequests] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back what it has taken. Idempotent."""
        if self._ahead is not None:
            self._ahead[1].close()
            self._ahead = None
        if self._template is not None:
            TEMPLATES.give_back(self._template)
            self._template = None

    def store(
        self,
        instance: StoredInstance,
        message_id: int,
        *,
        following: StoredInstance | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> tuple[int | None, str]:
        """See `Session.store`. `following`: what the next call will be about, as far as that is known."""
        accepted = self._accepted.get(instance.sop_class_uid)
        if not accepted:
            return None, "no presentation context was accepted for its SOP class"
        try:
            syntax, content = self._opened(instance, accepted)
        except ShortFile:
            return None, "the stored file is shorter than its index entry says"
        except TranscodeError as exc:
            return None, str(exc)
        except OSError:
            log.error("stored file cannot be read", extra={"sop_instance": instance.sop_instance_uid})
            return None, "the stored file cannot be read"
        with content:
            try:
                data_set = content if isinstance(content, StoredDataSet) else _fragments(content)
                self._link.send_message(accepted[syntax], self._request(instance, message_id), data_set)
            except OSError as exc:
                # half a data set is out: only an abort keeps the peer from taking it for a whole one
                self._link.abort()
                raise AssociationLost("the stored file could not be read to its end") from exc
        if following is not None:
            self._open_ahead(following)
        status = status_of(self._link.await_response(message_id, self._timeout_s, on_wait))
        return status, "" if is_stored(status) else f"the peer answered 0x{status:04X}"

    def _request(self, instance: StoredInstance, message_id: int) -> bytes:
        requests = self._requests.get(instance.sop_class_uid)
        if requests is None:
            requests = self._requests[instance.sop_class_uid] = StoreRequests(instance.sop_class_uid, self._originator)
        return requests.encode(message_id, instance.sop_instance_uid)

    def _opened(self, instance: StoredInstance, accepted: Mapping[str, int]) -> tuple[str, StoredDataSet | BinaryIO]:
        """Its data set, in which transfer syntax. Raises OSError, TranscodeError."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            if ahead[0] is instance:
                return instance.transfer_syntax_uid, ahead[1]
            ahead[1].close()
        syntax = instance.transfer_syntax_uid
        if syntax in accepted:
            return syntax, self._opened_as_stored(instance, accepted[syntax])
        return transcode(
            instance.path,
            instance.data_set_offset,
            syntax,
            tuple(accepted),
            data_set_length=instance.data_set_length,
        )

    def _opened_as_stored(self, instance: StoredInstance, context_id: int) -> StoredDataSet:
        """Opened, and what goes out with the request is read: a file that cannot be read costs no association."""
        data_set = StoredDataSet(instance.path, instance.data_set_offset, instance.data_set_length)
        try:
            if self._template is None and self._link.pdu_bytes:
                self._template = TEMPLATES.take(self._link.pdu_bytes)
            if self._template is not None:
                data_set.read_ahead(self._template, context_id)
        except OSError:
            data_set.close()
            raise
        return data_set

    def _open_ahead(self, instance: StoredInstance) -> None:
        context_id = self._accepted.get(instance.sop_class_uid, {}).get(instance.transfer_syntax_uid)
        if context_id is not None:
            with suppress(OSError):
                self._ahead = (instance, self._opened_as_stored(instance, context_id))


def _fragments(content: BinaryIO) -> Fragments:
    while chunk := content.read(_CHUNK):
        yield chunk


def status_of(response: Message) -> int:
    """The status of a response. Raises AssociationLost for one that has none."""
    status = response.command.status
    if status is None:
        raise AssociationLost("a response without a status")
    return status


class DimseSender:
    """Sends instances to configured destinations (`interfaces.Sender`). Keeps no connection between calls."""

    def __init__(
        self, settings: DeliverySettings, default_calling_ae_title: str, open_link: OpenLink = open_own_link
    ) -> None:
        self._settings = settings
        self._calling = default_calling_ae_title
        self._open_link = open_link

    def send(
        self,
        destination: Destination,
        instances: Sequence[StoredInstance],
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        """See `interfaces.Sender.send`. 0xA7xx and 0x0110 from the peer end the call as DeliveryUnavailable: the rest
        would meet the same, and nothing was lost by waiting.
        """
        for batch, contexts in batches(instances):
            heartbeat()
            with self._session(destination, contexts) as session:
                for instance, following in with_following(batch):
                    heartbeat()
                    self._send_one(session, destination, instance, following, on_result, heartbeat)

    def _session(self, destination: Destination, contexts: Sequence[ProposedContext]) -> Session:
        return Session(self._settings, destination, contexts, calling_ae_title=self._calling, open_link=self._open_link)

    def _send_one(
        self,
        session: Session,
        destination: Destination,
        instance: StoredInstance,
        following: StoredInstance | None,
        on_result: Callable[[StoredInstance, int | None, str], None],
        heartbeat: Heartbeat,
    ) -> None:
        try:
            status, error = session.store(instance, following=following, on_wait=heartbeat)
        except AssociationLost as exc:
            raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
        if status is not None and (status in _LATER or status == 0x0110):
            with suppress(AssociationLost):
                session.close()
            raise DeliveryUnavailable(f"destination {destination.name}: the peer answered 0x{status:04X}")
        on_result(instance, status, error)

    def echo(self, destination: Destination) -> int:
        """C-ECHO; the status answered. Raises DeliveryUnavailable, DeliveryRefused."""
        contexts = [ProposedContext(abstract_syntax=VERIFICATION, transfer_syntaxes=(EXPLICIT_LE, IMPLICIT_LE))]
        with self._session(destination, contexts) as session:
            try:
                return session.echo()
            except AssociationLost as exc:
                raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
