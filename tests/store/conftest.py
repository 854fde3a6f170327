"""Fixtures of the store's tests: a clock that is moved by hand, data sets, records in a real archive."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import generate_uid

from dicom_node.config import StorageSettings
from dicom_node.headers import scan
from dicom_node.model import (
    BootTime,
    InstanceRecord,
    Origin,
    Source,
)
from dicom_node.store.catalog import Catalog, open_catalog

EXPLICIT = "1.2.840.10008.1.2.1"


@dataclass
class HandClock:
    """A clock that stands still until it is moved."""

    seconds: float = 1000.0
    boot_id: str = "boot-1"
    set_s: float = 0.0  # of the wall clock alone

    def boot(self) -> BootTime:
        return BootTime(boot_id=self.boot_id, seconds=self.seconds)

    def wall(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds + self.set_s)

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def catalog(tmp_path: Path, clock: HandClock) -> Iterator[Catalog]:
    opened = open_catalog(tmp_path / "data", clock, StorageSettings(reserve_bytes=0, reserve_ratio=0.0))
    yield opened
    opened.close()


DataSet = Callable[..., bytes]


@pytest.fixture
def data_set() -> DataSet:
    """`data_set(**attributes)`: a CT image as Explicit VR Little Endian bytes; None leaves an attribute out."""

    def build(implicit: bool = False, little: bool = True, **attributes: Any) -> bytes:
        ds = pydicom.Dataset()
        values: dict[str, Any] = {
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
            "SOPInstanceUID": generate_uid(),
            "StudyInstanceUID": "1.2.826.1",
            "SeriesInstanceUID": "1.2.826.1.1",
            "PatientID": "P1",
            "PatientName": "Doe^Jane",
            "Modality": "CT",
            "InstanceNumber": 1,
            "Rows": 2,
            "Columns": 2,
            "BitsAllocated": 16,
            "PixelData": b"\x01\x02\x03\x04\x05\x06\x07\x08",
        } | attributes
        for keyword, value in values.items():
            if value is not None:
                setattr(ds, keyword, value)
        if "PixelData" in ds:
            ds["PixelData"].VR = "OW"
        out = io.BytesIO()
        pydicom.dcmwrite(out, ds, implicit_vr=implicit, little_endian=little, force_encoding=True)
        return out.getvalue()

    return build


@pytest.fixture
def record(catalog: Catalog, clock: HandClock, data_set: DataSet) -> Callable[..., InstanceRecord]:
    """`record(**attributes)`: an instance whose bytes are in the catalog's archive, ready to be indexed."""

    def build(
        *,
        origin: Origin = Origin.RECEIVED,
        association_id: str | None = "assoc-1",
        calling: str = "SCANNER",
        syntax: str = EXPLICIT,
        **attributes: Any,
    ) -> InstanceRecord:
        body = data_set(**attributes)
        header = scan(memoryview(body), syntax, max_inflated_header_bytes=1 << 20)
        spool = catalog.archive.begin(
            sop_class_uid=header.sop_class_uid,
            sop_instance_uid=header.sop_instance_uid,
            transfer_syntax_uid=syntax,
            source_ae=calling,
        )
        spool.write(body)
        return InstanceRecord(
            header=header,
            file=spool.commit(),
            source=Source(
                calling_ae_title=calling,
                called_ae_title="DICOM_NODE",
                address="127.0.0.1",
                association_id=association_id,
            ),
            origin=origin,
            received_at=clock.wall(),
            received_boot=clock.boot(),
        )

    return build
