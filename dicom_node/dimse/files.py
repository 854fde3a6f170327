"""Folders of DICOM files and remote AEs: `send` files by C-STORE, `fetch` a study by C-GET, bytes as they are.

For the command line: no catalog, no archive, no configuration of the node.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import dcmread, read_dataset, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import UID

from dicom_node.config import DeliverySettings
from dicom_node.dimse.commands import NO_DATA_SET, WITH_DATA_SET, CommandField, CommandValue, element, encode_command
from dicom_node.dimse.contexts import (
    EXPLICIT_LE,
    IMPLICIT_LE,
    STUDY_ROOT_FIND,
    STUDY_ROOT_GET,
    TRANSFER_SYNTAXES,
    ProposedContext,
)
from dicom_node.dimse.link import AssociationLost, Fragments, Message, gathered
from dicom_node.dimse.request import MAX_IDENTIFIER_BYTES, encode_identifier
from dicom_node.dimse.session import MAX_CONTEXTS, Session, batches, status_of, with_following
from dicom_node.errors import DeliveryUnavailable, InvalidInstance
from dicom_node.identity import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.model import Destination, Origin, StoredInstance

__all__ = ["Fetched", "get_study", "instance_of_file", "send_files"]

log = logging.getLogger(__name__)

# What a remote archive is likely to hold when it does not say: PS3.4 B.5, the classes of daily use
_COMMON_SOP_CLASSES = tuple(
    f"1.2.840.10008.5.1.4.1.1.{suffix}"
    for suffix in (
        *("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "2", "2.1", "3.1", "4", "4.1", "6.1", "7", "7.1", "7.2", "7.3"),
        *("7.4", "11.1", "12.1", "12.2", "13.1.3", "20", "30", "66", "66.1", "66.4", "66.7", "67", "77.1.1", "77.1.4"),
        *("77.1.5.1", "77.1.6", "88.11", "88.22", "88.33", "88.34", "88.59", "88.67", "104.1", "128", "130"),
        *("91.1", "104.3", "481.1", "481.2", "481.3", "481.5"),
    )
)
# In the order in which they are proposed while there is room: one context for each, so that the stored one is taken
_DAILY = (
    *(EXPLICIT_LE, IMPLICIT_LE),
    *(
        f"1.2.840.10008.1.2.{suffix}"
        for suffix in ("4.50", "4.70", "4.90", "4.91", "4.80", "5", "4.51", "4.57", "1.99")
    ),
)
_SYNTAXES = (*_DAILY, *sorted(TRANSFER_SYNTAXES.difference(_DAILY)))


def instance_of_file(path: Path) -> StoredInstance:
    """A Part-10 file as an instance that can be sent. Raises InvalidInstance when it is none, OSError."""
    try:
        with path.open("rb") as file:
            read_preamble(file, force=False)
            meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
            offset = file.tell()
        keywords = ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality"]
        header = dcmread(path, stop_before_pixels=True, specific_tags=list(keywords))
        syntax = str(meta.TransferSyntaxUID)
        texts = [str(header.get(keyword, "") or "") for keyword in keywords]
    except (InvalidDicomError, AttributeError, ValueError, TypeError, KeyError, NotImplementedError, EOFError) as exc:
        raise InvalidInstance("no readable DICOM file") from exc
    if not texts[0] or not texts[1]:
        raise InvalidInstance("the file has no SOP Class or Instance UID (a DICOMDIR?)")
    return StoredInstance(
        sop_class_uid=texts[0],
        sop_instance_uid=texts[1],
        study_instance_uid=texts[2],
        series_instance_uid=texts[3],
        transfer_syntax_uid=syntax,
        path=str(path),
        data_set_offset=offset,
        data_set_length=path.stat().st_size - offset,
        sha256="",
        origin=Origin.RECEIVED,
        modality=texts[4],
    )


def send_files(
    paths: Iterable[Path],
    destination: Destination,
    on_result: Callable[[Path, int | None, str], None],
    *,
    settings: DeliverySettings,
    calling_ae_title: str,
) -> None:
    """C-STORE every DICOM file of `paths`; `on_result(path, status, error)` for each, status None: it was not sent.

    Raises DeliveryUnavailable or DeliveryRefused when the association cannot be had or breaks.
    """
    instances: list[StoredInstance] = []
    for path in paths:
        try:
            instances.append(instance_of_file(path))
        except (InvalidInstance, OSError) as exc:
            on_result(path, None, str(exc) if isinstance(exc, InvalidInstance) else "the file cannot be read")
    for batch, contexts in batches(instances):
        with Session(settings, destination, contexts, calling_ae_title=calling_ae_title) as session:
            for instance, following in with_following(batch):
                try:
                    status, error = session.store(instance, following=following)
                except AssociationLost as exc:
                    raise DeliveryUnavailable(f"{destination.ae_title}: {exc}") from exc
                on_result(Path(instance.path), status, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a C-GET brought: the files written, and what the peer said at the end."""

    files: tuple[Path, ...]
    status: int
    completed: int
    failed: int
    warning: int
    comment: str = ""


def get_study(
    remote: Destination,
    study_instance_uid: str,
    folder: Path,
    *,
    settings: DeliverySettings,
    calling_ae_title: str,
    storage: Sequence[ProposedContext] | None = None,
) -> Fetched:
    """Fetch one study by C-GET (Study Root) into `folder`: Part-10 files around the received bytes, named by UID.

    `storage` are the contexts to receive in (at most 127, `as_scp`). Without them the peer is asked first which SOP
    classes the study has; a peer that does not say gets the common ones proposed. `study_instance_uid` may be a list,
    joined by backslashes. Raises DeliveryUnavailable, DeliveryRefused; OSError when a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contexts = [ProposedContext(abstract_syntax=STUDY_ROOT_GET, transfer_syntaxes=(EXPLICIT_LE, IMPLICIT_LE))]
    try:
        if storage is None:
            classes = _classes_in_study(remote, study_instance_uid, settings, calling_ae_title)
            storage = _storage_contexts(classes or _COMMON_SOP_CLASSES)
        contexts += storage
        with Session(settings, remote, contexts, calling_ae_title=calling_ae_title) as session:
            return _Getter(session, folder, settings).run(study_instance_uid)
    except AssociationLost as exc:
        raise DeliveryUnavailable(f"{remote.ae_title}: {exc}") from exc


def _storage_contexts(classes: Sequence[str]) -> list[ProposedContext]:
    room = MAX_CONTEXTS - 1
    classes = classes[:room]
    syntaxes = _SYNTAXES[: room // len(classes)]
    if len(syntaxes) == 1:  # no room for one context each: the peer chooses
        return [ProposedContext(abstract_syntax=uid, transfer_syntaxes=_SYNTAXES, as_scp=True) for uid in classes]
    return [
        ProposedContext(abstract_syntax=uid, transfer_syntaxes=(item,), as_scp=True)
        for uid in classes
        for item in syntaxes
    ]


def _classes_in_study(
    remote: Destination, study_instance_uid: str, settings: DeliverySettings, calling_ae_title: str
) -> tuple[str, ...]:
    """SOP Classes in Study (0008,0062), () when the peer cannot say."""
    contexts = [ProposedContext(abstract_syntax=STUDY_ROOT_FIND, transfer_syntaxes=(EXPLICIT_LE, IMPLICIT_LE))]
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "STUDY"
    identifier.StudyInstanceUID = study_instance_uid
    identifier.SOPClassesInStudy = ""
    found: list[str] = []
    with Session(settings, remote, contexts, calling_ae_title=calling_ae_title) as session:
        for (_, syntax), context_id in list(session.contexts.items())[:1]:
            message_id = session.next_message_id()
            fields = _request(CommandField.C_FIND, STUDY_ROOT_FIND, message_id)
            session.link.send_message(context_id, encode_command(fields), [encode_identifier(identifier, syntax)])
            while True:
                response = session.link.await_response(message_id, settings.response_timeout_s)
                if status_of(response) not in (0xFF00, 0xFF01):
                    break
                answer = _read_identifier(response, syntax)
                value = answer.get("SOPClassesInStudy") or ()
                found += [str(uid) for uid in ([value] if isinstance(value, str) else value)]
    return tuple(dict.fromkeys(found))


class _Getter:
    """One C-GET and the C-STORE requests that come within it."""

    def __init__(self, session: Session, folder: Path, settings: DeliverySettings) -> None:
        self._session, self._folder, self._settings = session, folder, settings
        self._files: list[Path] = []

    def run(self, study_instance_uid: str) -> Fetched:
        context = next((item for item in self._session.contexts.items() if item[0][0] == STUDY_ROOT_GET), None)
        if context is None:
            return Fetched(
                files=(), status=0x0122, completed=0, failed=0, warning=0, comment="the peer does not accept C-GET"
            )
        (_, syntax), context_id = context
        identifier = Dataset()
        identifier.QueryRetrieveLevel = "STUDY"
        identifier.StudyInstanceUID = study_instance_uid
        link, message_id = self._session.link, self._session.next_message_id()
        fields = _request(CommandField.C_GET, STUDY_ROOT_GET, message_id)
        link.send_message(context_id, encode_command(fields), [encode_identifier(identifier, syntax)])
        while True:
            received = link.next_message(self._settings.response_timeout_s)
            if received is None:
                raise AssociationLost("no response in time")
            command = received.command
            if command.field == CommandField.C_STORE:
                self._store(received)
            elif command.responded_to != message_id:
                raise AssociationLost("the peer sent an unexpected message")
            elif status_of(received) != 0xFF00:
                return Fetched(
                    files=tuple(self._files),
                    status=status_of(received),
                    completed=command.number(element("NumberOfCompletedSuboperations")) or 0,
                    failed=command.number(element("NumberOfFailedSuboperations")) or 0,
                    warning=command.number(element("NumberOfWarningSuboperations")) or 0,
                    comment=command.text(element("ErrorComment")) or "",
                )

    def _store(self, message: Message) -> None:
        _, syntax = self._session.context_ids[message.context_id]
        sop_class_uid = message.command.text(element("AffectedSOPClassUID")) or ""
        sop_instance_uid = message.command.text(element("AffectedSOPInstanceUID")) or ""
        status = 0x0000
        if message.data_set is None or not sop_instance_uid or not sop_class_uid:
            status = 0xC000
        else:
            meta = _file_meta(sop_class_uid, sop_instance_uid, syntax)
            self._files.append(_write(self._folder, sop_instance_uid, meta, message.data_set))
        fields: dict[str, CommandValue] = {
            "CommandField": CommandField.RESPONSE | CommandField.C_STORE,
            "MessageIDBeingRespondedTo": message.command.message_id or 0,
            "CommandDataSetType": NO_DATA_SET,
            "Status": status,
            "AffectedSOPClassUID": sop_class_uid,
            "AffectedSOPInstanceUID": sop_instance_uid,
        }
        self._session.link.send_message(message.context_id, encode_command(fields))


def _file_meta(sop_class_uid: str, sop_instance_uid: str, syntax: str) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(sop_class_uid), UID(sop_instance_uid)
    meta.TransferSyntaxUID = UID(syntax)
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return meta


def _write(folder: Path, uid: str, meta: FileMetaDataset, data_set: Fragments) -> Path:
    # the name is a peer's text: a UID and nothing else, or a digest of whatever it is
    name = uid if re.fullmatch(r"[0-9.]{1,64}", uid) else hashlib.sha256(uid.encode()).hexdigest()
    path = folder / f"{name}.dcm"
    head = DicomBytesIO(b"\0" * 128 + b"DICM")
    head.seek(0, os.SEEK_END)
    write_file_meta_info(head, meta)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        file.write(head.getvalue())
        for fragment in data_set:
            file.write(fragment)
    partial.replace(path)
    return path


def _request(command: int, sop_class_uid: str, message_id: int) -> dict[str, CommandValue]:
    return {
        "AffectedSOPClassUID": sop_class_uid,
        "CommandField": command,
        "MessageID": message_id,
        "Priority": 0,
        "CommandDataSetType": WITH_DATA_SET,
    }


def _read_identifier(response: Message, syntax: str) -> Dataset:
    """What a peer answers. Raises AssociationLost when it cannot be read: it may be anything."""
    try:
        encoded = gathered(response.data_set, MAX_IDENTIFIER_BYTES) or b""
        return read_dataset(BytesIO(encoded), syntax == IMPLICIT_LE, True)
    except Exception as exc:
        raise AssociationLost("the peer's answer cannot be read") from exc
