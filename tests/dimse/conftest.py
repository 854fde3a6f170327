"""A real server over a real catalog on a free port, dcmtk as the client, and a byte-level peer."""

import io
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import generate_uid

from dicom_node.audited import ReceivedStudies
from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, StorageSettings
from dicom_node.dimse.commands import encode_command
from dicom_node.dimse.pynetdicom_scp import PynetdicomServer
from dicom_node.dimse.server import DicomServer
from dicom_node.model import ConflictPolicy, Origin
from dicom_node.pipeline.ingest import Ingest
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.wiring import CountedIngest

CT = "1.2.840.10008.5.1.4.1.1.2"
NO_RESERVE = {"reserve_bytes": 0, "reserve_ratio": 0.0}


@dataclass
class Counted:
    """What the server told its observer."""

    ended: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    answered: list[tuple[str, int]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def _add(self, target: list[Any], item: Any) -> None:
        with self.changed:
            target.append(item)
            self.changed.notify_all()

    def association_ended(self, calling_ae_title: str, result: str) -> None:
        self._add(self.ended, (calling_ae_title, result))

    def association_rejected(self, reason: str) -> None:
        self._add(self.rejected, reason)

    def context_refused(self, kind: str) -> None:
        self._add(self.refused, kind)

    def request_answered(self, service: str, status: int, seconds: float) -> None:
        self._add(self.answered, (service, status))

    def wait_for(self, condition: Callable[["Counted"], object]) -> None:
        """Until `condition(self)`; fails after 20 s."""
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), timeout=20.0), vars(self)


class Uncounted:
    """Counts nothing of intake."""

    def instance_received(self, *_: object, **__: object) -> None:
        """Nothing."""


@dataclass
class Running:
    """A server that runs."""

    server: PynetdicomServer | DicomServer
    port: int
    catalog: Catalog
    counted: Counted
    sink: Ingest

    def association_ends(self) -> list[tuple[str, int]]:
        """How each recorded association ended, and whether a store failed on it."""
        with self.catalog.database.read() as connection:
            rows = connection.execute("SELECT ended, store_failed FROM association ORDER BY opened_at").fetchall()
        return [(row[0], row[1]) for row in rows]


@pytest.fixture(params=["own", "pynetdicom"])
def wire(request: pytest.FixtureRequest) -> str:
    """Which upper layer carries the test: each test that serves runs on both."""
    return str(request.param)


@pytest.fixture
def serve(tmp_path: Path, wire: str) -> Iterator[Callable[..., Running]]:
    """`serve(**settings)`: start a server on its own data folder; stopped at the end."""
    with ExitStack() as stack:

        def start(
            *,
            sock: socket.socket | None = None,
            associations: Any = None,
            sink: Any = None,
            neighbours: Any = None,
            audit: Any = None,
            **settings: Any,
        ) -> Running:
            config = NodeConfig.model_validate({"dicom_port": 0, "storage": NO_RESERVE, **settings})
            folder = tmp_path / f"data-{len(list(tmp_path.glob('data-*')))}"
            catalog = open_catalog(folder, SystemClock(), StorageSettings.model_validate(NO_RESERVE))
            stack.callback(catalog.close)
            ingest = Ingest(
                catalog.archive,
                catalog.index,
                conflict_policy_for=lambda source: ConflictPolicy.KEEP_FIRST,
                origin_for=lambda source: Origin.RECEIVED,
                max_object_bytes=config.storage.max_object_bytes,
                max_inflated_header_bytes=config.storage.max_inflated_header_bytes,
                clock=SystemClock(),
            )
            counted = Counted()
            received = None
            if audit is not None:
                received = ReceivedStudies(audit)
                sink = CountedIngest(catalog, config, SystemClock(), Uncounted(), received)
            server = (DicomServer if wire == "own" else PynetdicomServer)(
                config,
                sink=sink or ingest,
                index=catalog.index,
                associations=associations or catalog.index,
                observe=counted,
                commitments=catalog.queue,
                sock=sock,
                neighbours=neighbours,
                audit=audit,
                received=received,
            )
            port = server.start()
            stack.callback(server.stop, 2.0)
            return Running(server, port, catalog, counted, ingest)

        yield start


@pytest.fixture
def dcmtk(tool: Callable[[str], str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`dcmtk("findscu", "-S", ...)`: run a dcmtk client; standard output and error together in `stdout`."""

    def run(name: str, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [tool(name), *map(str, words)],
            check=False,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
            env={**os.environ, "TCP_NODELAY": "1"},
        )
        assert not check or done.returncode == 0, done.stdout
        return done

    return run


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., Path]:
    """`make_file(PatientID=..., ...)`: a small Part-10 file, `syntax` Explicit VR Little Endian unless given."""
    folder = tmp_path / "files"
    folder.mkdir()

    def make(*, syntax: str = "1.2.840.10008.1.2.1", pixels: int = 0, **attributes: Any) -> Path:
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = attributes.pop("SOPClassUID", CT), generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
        ds.PatientID, ds.PatientName, ds.Modality = "P1", "Doe^Jane", "CT"
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)
        if pixels:
            ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = pixels, pixels, 16, 16, 15
            ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 0, 1, "MONOCHROME2"
            ds.PixelData = os.urandom(pixels * pixels * 2)
            ds["PixelData"].VR = "OW"
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
        path = folder / f"{ds.SOPInstanceUID}.dcm"
        ds.save_as(
            path,
            enforce_file_format=True,
            implicit_vr=syntax == "1.2.840.10008.1.2",
            little_endian=syntax != "1.2.840.10008.1.2.2",
        )
        return path

    return make


def data_set_bytes(path: Path) -> bytes:
    """The bytes of the data set of a Part-10 file."""
    with path.open("rb") as file:
        file.seek(132)
        read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        return file.read()


@pytest.fixture(name="data_set_bytes", scope="session")
def data_set_bytes_fixture() -> Callable[[Path], bytes]:
    """`data_set_bytes(path)`."""
    return data_set_bytes


@pytest.fixture(scope="session")
def header_of() -> Callable[[Path], Dataset]:
    """`header_of(path)`: the data set without pixel data."""
    return lambda path: dcmread(path, stop_before_pixels=True)


class RawPeer:
    """A peer that says exactly what a test wants on the wire (PS3.8 9.3)."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=15.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self.socket.close()

    def associate(
        self,
        contexts: Sequence[tuple[int, str, Sequence[str]]],
        *,
        called: str = "DICOM_NODE",
        calling: str = "TEST",
        user: bytes = b"",
        maximum_length: int = 16384,
    ) -> tuple[int, bytes]:
        """Send an A-ASSOCIATE-RQ; type and body of the answer."""
        items = _item(0x10, b"1.2.840.10008.3.1.1.1")
        for number, abstract, syntaxes in contexts:
            inner = _item(0x30, abstract.encode()) + b"".join(_item(0x40, uid.encode()) for uid in syntaxes)
            items += _item(0x20, bytes([number, 0, 0, 0]) + inner)
        items += _item(0x50, _item(0x51, struct.pack(">I", maximum_length)) + _item(0x52, b"1.2.3") + user)
        head = struct.pack(">HH16s16s32x", 1, 0, called.encode().ljust(16), calling.encode().ljust(16))
        self.send_pdu(1, head + items)
        return self.read_pdu()

    def send_pdu(self, kind: int, body: bytes) -> None:
        """One PDU."""
        self.socket.sendall(struct.pack(">BBI", kind, 0, len(body)) + body)

    def send_command(self, context_id: int, data_set: bytes | None = None, **fields: Any) -> None:
        """One message; the data set in fragments of at most 64 KiB."""
        self.send_fragment(context_id, 3, encode_command(fields))
        if data_set is not None:
            pieces = [data_set[start : start + 65536] for start in range(0, len(data_set), 65536)] or [b""]
            for piece in pieces[:-1]:
                self.send_fragment(context_id, 0, piece)
            self.send_fragment(context_id, 2, pieces[-1])

    def send_fragment(self, context_id: int, control: int, data: bytes) -> None:
        """One PDV in a P-DATA-TF PDU of its own."""
        self.send_pdu(4, struct.pack(">IBB", len(data) + 2, context_id, control) + data)

    def read_pdu(self) -> tuple[int, bytes]:
        """Type and body of the next PDU; (0, b'') when the connection is closed, ConnectionError inside a PDU."""
        head = self._exactly(6)
        if len(head) < 6:
            return 0, b""
        kind, _, length = struct.unpack(">BBI", head)
        body = self._exactly(length)
        if len(body) < length:
            raise ConnectionError(f"the connection ended after {len(body)} of {length} bytes of a PDU of type {kind}")
        return kind, body

    def read_command(self) -> Dataset:
        """The command set of the next message that is a single P-DATA PDU."""
        kind, body = self.read_pdu()
        assert kind == 4, (kind, body)
        command = read_dataset(io.BytesIO(body[6:]), True, True)
        assert "CommandField" in command, (kind, body)
        return command

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.socket.recv(size - len(data))
            except ConnectionResetError:
                break
            if not part:
                break
            data += part
        return data


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


@pytest.fixture
def raw_peer() -> Iterator[Callable[[int], RawPeer]]:
    """`raw_peer(port)`: connect; closed at the end."""
    peers: list[RawPeer] = []

    def connect(port: int) -> RawPeer:
        peers.append(RawPeer(port))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()
