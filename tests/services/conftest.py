"""A real catalog with instances made here, and the services over it."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import generate_uid

from dicom_node.clock import SystemClock
from dicom_node.config import FindSettings, StorageSettings
from dicom_node.model import ConflictPolicy, Origin, Source
from dicom_node.pipeline.ingest import Ingest
from dicom_node.services.find import FindOptions, FindResponse, FindService
from dicom_node.services.identifier import BadIdentifier, InformationModel, identifier_of
from dicom_node.services.scanner import scan_identifier
from dicom_node.store.catalog import Catalog, open_catalog

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """An empty catalog without a disk reserve."""
    opened = open_catalog(tmp_path / "data", SystemClock(), StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    yield opened
    opened.close()


@pytest.fixture
def keep(catalog: Catalog) -> Callable[..., Dataset]:
    """`keep(PatientID=..., ...)`: store one small instance through the real intake; returns its data set."""
    ingest = Ingest(
        catalog.archive,
        catalog.index,
        conflict_policy_for=lambda source: ConflictPolicy.KEEP_FIRST,
        origin_for=lambda source: Origin.RECEIVED,
        max_object_bytes=1 << 30,
        max_inflated_header_bytes=1 << 24,
        clock=SystemClock(),
    )

    def store(**attributes: Any) -> Dataset:
        ds = Dataset()
        ds.SpecificCharacterSet = attributes.pop("SpecificCharacterSet", "ISO_IR 192")
        ds.SOPClassUID, ds.SOPInstanceUID = CT, generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
        ds.PatientID, ds.PatientName, ds.Modality = "P1", "Doe^Jane", "CT"
        ds.InstanceNumber = "1"
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)
        out = DicomBytesIO()
        out.is_implicit_VR, out.is_little_endian = False, True
        write_dataset(out, ds)
        result = ingest.accept(
            sop_class_uid=ds.SOPClassUID,
            sop_instance_uid=ds.SOPInstanceUID,
            transfer_syntax_uid=EXPLICIT_LE,
            fragments=[out.getvalue()],
            source=Source(calling_ae_title="CT1", called_ae_title="DICOM_NODE", address="127.0.0.1"),
        )
        assert result.status == 0, result.comment
        return ds

    return store


@pytest.fixture
def find(catalog: Catalog) -> Callable[..., list["Told"]]:
    """`find("STUDY", PatientName="D*", ...)`: every response; the identifier goes through its encoding first."""

    def ask(
        level: str | None,
        *,
        model: InformationModel = InformationModel.STUDY_ROOT,
        settings: FindSettings | None = None,
        options: FindOptions | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        extra: Dataset | None = None,
        **keys: Any,
    ) -> list[Told]:
        identifier = Dataset()
        if "SpecificCharacterSet" in keys:
            identifier.SpecificCharacterSet = keys.pop("SpecificCharacterSet")
        if level is not None:
            identifier.QueryRetrieveLevel = level
        for keyword, value in keys.items():
            setattr(identifier, keyword, value)
        for element in extra or ():
            identifier.add(element)
        service = FindService(catalog.index, "DICOM_NODE", settings or FindSettings())
        encoded = as_bytes(identifier)
        try:
            asked = identifier_of(read_dataset(io.BytesIO(encoded), True, True))
        except BadIdentifier as exc:  # as whoever reads it from the wire
            return [Told(exc.dimse_status, None, exc.comment, (exc.tag,))]
        scanned = scan_identifier(encoded, implicit_vr=True, little_endian=True)
        assert scanned in (None, asked)
        responses = service.find(model, asked, options or FindOptions(), cancelled)
        return [each for response in responses for each in told(response)]

    return ask


@dataclass(frozen=True)
class Told:
    """A response as the requester reads it."""

    status: int
    identifier: Dataset | None
    comment: str
    offending: tuple[int, ...]


def told(response: FindResponse) -> list[Told]:
    """The responses, an identifier read from the same bytes in each native transfer syntax, which must agree."""
    if response.answers is None:
        return [Told(response.status, None, response.comment, response.offending)]
    forms = [(True, True), (False, True), (False, False)]
    encoded = [response.answers.encoded(implicit_vr=implicit, little_endian=little) for implicit, little in forms]
    found = []
    for same in zip(*encoded, strict=True):
        read, *others = [
            read_dataset(io.BytesIO(one), implicit, little) for one, (implicit, little) in zip(same, forms, strict=True)
        ]
        for other in others:
            assert [(item.tag, item.value) for item in other] == [(item.tag, item.value) for item in read]
        found.append(Told(response.status, read, response.comment, response.offending))
    return found


def as_bytes(ds: Dataset) -> bytes:
    """In Implicit VR Little Endian."""
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = True, True
    write_dataset(out, ds)
    return out.getvalue()


def recoded(ds: Dataset) -> Dataset:
    """The data set as it arrives on the wire."""
    return read_dataset(io.BytesIO(as_bytes(ds)), True, True)


@pytest.fixture(name="recoded")
def recoded_fixture() -> Callable[[Dataset], Dataset]:
    """`recoded(ds)`: the data set as it arrives on the wire."""
    return recoded
