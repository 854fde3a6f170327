"""The same bytes to both wires: what comes back, what is kept and what is recorded must be the same.

Streams are recorded (real clients through a proxy), generated, and mutated from recorded ones. What differs is
listed in `DIFFERENCES`, each with its reason and a stream that shows it; anything else is a fault of one of them.

A stream is a sequence of turns: bytes that a peer sends before it waits. The player sends a turn, waits until the
server has said what a peer would wait for, or nothing more for a moment, and goes on; at the end it half-closes and
reads until the server closes. A difference counts when a second, patient play of the same stream shows it too.
"""

import itertools
import json
import logging
import os
import queue
import random
import re
import select
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node.clock import SystemClock
from dicom_node.config import DeliverySettings, NodeConfig, StorageSettings
from dicom_node.dimse import pynetdicom_requestor, requestor
from dicom_node.dimse.commands import encode_command
from dicom_node.dimse.files import instance_of_file
from dicom_node.dimse.messages import CommandReceived, MessageReader
from dicom_node.dimse.pynetdicom_scp import PynetdicomServer
from dicom_node.dimse.server import DicomServer
from dicom_node.dimse.session import DimseSender
from dicom_node.dimse.upper_layer import pdus
from dicom_node.dimse.upper_layer.connection import Data
from dicom_node.model import ConflictPolicy, Destination, Origin
from dicom_node.pipeline.ingest import Ingest
from dicom_node.store.catalog import Catalog, open_catalog

SEED = int(os.environ.get("TEST_WIRE_SEED", "20261121"))
MUTANTS = int(os.environ.get("TEST_WIRE_STREAMS", "120"))  # `make fuzz-wire` asks for more
EXAMPLES = max(MUTANTS // 2, 10)
MOMENT_S, PATIENCE_S, HANG_S = 0.12, 1.5, 8.0

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
VERIFICATION = "1.2.840.10008.1.1"
STUDY_FIND, STUDY_MOVE, STUDY_GET = (f"1.2.840.10008.5.1.4.1.2.2.{n}" for n in (1, 2, 3))
IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
NO_RESERVE = {"reserve_bytes": 0, "reserve_ratio": 0.0}
# seven digits in UIDs that a recorded stream creates: each play of it puts others in their place
MARK = b"7000001"
ROOT = f"1.2.826.0.1.3680043.10.99.{MARK.decode()}"
KEPT = "1.2.826.0.1.3680043.10.98"  # the study that is there from the start

SETTINGS = DeliverySettings(connect_timeout_s=2.0, response_timeout_s=5.0)
VOLATILE = {
    *("at", "location", "received_at", "source", "association_id", "epoch", "last_boot_s", "last_boot_id"),
    *("opened_at", "address"),
}
NO_DATA_SET = bytes.fromhex("00000008020000000101")  # (0000,0800) in a command set
HANGS = {"the server does not close", "the association does not end"}
NAMES = {1: "RQ", 2: "AC", 3: "RJ", 5: "RELEASE-RQ", 6: "RELEASE-RP", 7: "ABORT"}

WELL_FORMED = re.compile(r"(?=.{1,64}$)(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")

Stream = tuple[bytes, ...]
Fact = tuple[Any, ...]


# --- the pair of servers ----------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What one server told its observer since it was last asked."""

    facts: list[tuple[Any, ...]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def _add(self, *fact: Any) -> None:
        with self.changed:
            self.facts.append(fact)
            self.changed.notify_all()

    def association_ended(self, calling_ae_title: str, result: str) -> None:
        self._add("ended", calling_ae_title, result)

    def association_rejected(self, reason: str) -> None:
        self._add("rejected", reason)

    def context_refused(self, kind: str) -> None:
        self._add("refused", kind)

    def request_answered(self, service: str, status: int, seconds: float) -> None:
        self._add("answered", service, status)

    def take(self, wait_s: float = HANG_S) -> tuple[Fact, ...]:
        """All of it, in order, once an end or a rejection was told, or after `wait_s`."""
        with self.changed:
            self.changed.wait_for(lambda: any(fact[0] in ("ended", "rejected") for fact in self.facts), wait_s)
            facts, self.facts = tuple(self.facts), []
        return facts


@dataclass
class Side:
    """One server with its archive."""

    server: DicomServer | PynetdicomServer
    port: int
    catalog: Catalog
    told: Told
    seen: dict[str, int] = field(default_factory=dict)

    def wait_idle(self) -> bool:
        """Whether it has no connection any more, after a while."""
        deadline = time.monotonic() + HANG_S
        while (living := self.server._living()) and time.monotonic() < deadline:
            time.sleep(0.001)
        return not living

    def news(self) -> tuple[Fact, ...]:
        """What was kept and recorded since the last call."""
        found: list[Fact] = []
        with self.catalog.database.read() as connection:
            for table in ("instance", "variant", "association"):
                cursor = connection.execute(
                    f"SELECT rowid AS at, * FROM {table} WHERE rowid > ? ORDER BY rowid", (self.seen.get(table, 0),)
                )
                names = [column[0] for column in cursor.description]
                for row in cursor.fetchall():
                    self.seen[table] = row[0]
                    found.append((table, *((n, v) for n, v in zip(names, row, strict=True) if n not in VOLATILE)))
        return tuple(found)


@dataclass(frozen=True)
class Outcome:
    """All that can be seen of one play. `closed_first`: the server closed before the peer had said everything."""

    replies: tuple[Fact, ...]
    closed_first: bool
    told: tuple[Fact, ...]
    news: tuple[Fact, ...]


class Pair:
    """Both servers on archives of their own with the same study in them, and one sink that both may move to."""

    def __init__(self, folder: Path) -> None:
        self._parent = folder
        self._numbers = iter(range(8_000_000, 9_000_000))
        self.faults = _Faults()
        self._start()

    def renew(self) -> None:
        """With new archives: after a difference in what is kept, every query would differ."""
        self.close()
        self._start()

    def close(self) -> None:
        """Stop both. Fails when a thread is left."""
        self._stack.close()

    def _start(self) -> None:
        self._stack = stack = ExitStack()
        self._folder = folder = self._parent / str(next(self._numbers))
        stack.enter_context(self.faults)
        before = set(threading.enumerate())
        stack.callback(self._ended, before)
        self.sink = self._serve("sink", DicomServer, {})
        to_sink = {"sink": {"ae_title": "SINK", "host": "127.0.0.1", "port": self.sink.port}}
        config = {"destinations": to_sink, "extra_sop_classes": [], "association_idle_timeout_s": 30}
        self.own = self._serve("own", DicomServer, config)
        self.recorder = self._serve("recorder", DicomServer, config)
        self.other = self._serve("pynetdicom", PynetdicomServer, config)
        self._pool = stack.enter_context(ThreadPoolExecutor(2))
        kept = [write_file(folder, data_set(f"{KEPT}.{n}", study=KEPT, InstanceNumber=n)) for n in (1, 2, 3)]
        for side in (self.own, self.other, self.recorder):
            DimseSender(SETTINGS, "SENDER").send(
                destination(side.port), [instance_of_file(path) for path in kept], lambda *_: None, lambda: None
            )
            side.told.take()
            side.news()

    def _serve(self, name: str, kind: Any, settings: Mapping[str, Any]) -> Side:
        config = NodeConfig.model_validate(
            {"dicom_port": 0, "storage": NO_RESERVE, "any_called_ae_title": name == "sink", **settings}
        )
        catalog = open_catalog(self._folder / name, SystemClock(), StorageSettings.model_validate(NO_RESERVE))
        self._stack.callback(catalog.close)
        ingest = Ingest(
            catalog.archive,
            catalog.index,
            conflict_policy_for=lambda source: ConflictPolicy.KEEP_FIRST,
            origin_for=lambda source: Origin.RECEIVED,
            max_object_bytes=config.storage.max_object_bytes,
            max_inflated_header_bytes=config.storage.max_inflated_header_bytes,
            clock=SystemClock(),
        )
        told = Told()
        server = kind(config, sink=ingest, index=catalog.index, associations=catalog.index, observe=told)
        port = server.start()
        self._stack.callback(server.stop, 2.0)
        return Side(server, port, catalog, told)

    def _ended(self, before: set[threading.Thread]) -> None:
        begun, deadline = [thread for thread in threading.enumerate() if thread not in before], time.monotonic() + 20.0
        for thread in begun:
            thread.join(max(deadline - time.monotonic(), 0.0))
        left = [thread.name for thread in begun if thread.is_alive()]
        assert not left, f"threads that did not end: {left}"

    def play(self, stream: Stream, *, patient: bool = False) -> tuple[Outcome, Outcome]:
        """One stream on both, under a number of its own."""
        number = str(next(self._numbers)).encode()
        numbered = tuple(turn.replace(MARK, number) for turn in stream)
        moment_s = PATIENCE_S if patient else MOMENT_S
        own, other = self._pool.map(lambda side: _play_on(side, numbered, moment_s), (self.own, self.other))
        return own, other


class _Faults(logging.Handler):
    """What the node itself took for a fault of its own: a traceback in its log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.found.append(f"{record.threadName}: {record.getMessage()}: {error!r}")

    def __enter__(self) -> "_Faults":
        logging.getLogger("dicom_node").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("dicom_node").removeHandler(self)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """See `Pair`. Pending responses come after each object: how many there are else depends on the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dicom_node.dimse.retrieval.PENDING_S", 0.0)
        found = Pair(tmp_path_factory.mktemp("pair"))
        yield found
        found.close()


# --- playing ----------------------------------------------------------------------------------------------------------


def _play_on(side: Side, stream: Stream, moment_s: float) -> Outcome:
    with socket.create_connection(("127.0.0.1", side.port), timeout=HANG_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ears = _Ears(connection)
        with suppress(OSError):  # the server may close before it has heard everything
            for turn in stream:
                connection.sendall(turn)
                ears.listen(moment_s)
                if ears.closed:
                    break
        ears.listen(moment_s, to_quiet=True)
        closed_first = ears.closed
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        ears.listen(HANG_S, to_quiet=True)
        if not ears.closed:
            ears.replies.append(("the server does not close",))
    accepted = any(reply[0] == "AC" for reply in ears.replies)
    if not side.wait_idle():
        ears.replies.append(("the association does not end",))
    return Outcome(tuple(ears.replies), closed_first, side.told.take(HANG_S if accepted else 0.05), side.news())


class _Ears:
    """Makes facts of what a server says."""

    def __init__(self, connection: socket.socket) -> None:
        self.replies: list[Fact] = []
        self.closed = False
        self._connection = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._bytes = b""
        self._messages = MessageReader()
        self._message: list[Any] = []
        self._answered = False

    def listen(self, moment_s: float, *, to_quiet: bool = False) -> None:
        """Until it has said what a peer waits for (or closed, `to_quiet`), or nothing for a moment."""
        self._answered = False
        while not self.closed and not (self._answered and not to_quiet) and self._poll.poll(moment_s * 1000):
            try:
                received = self._connection.recv(1 << 20)
            except OSError:
                received = b""
            self.closed = not received
            self._bytes += received
            self._cut()
        if self.closed and self._bytes:
            self.replies.append(("bytes of no PDU", self._bytes.hex()))
            self._bytes = b""

    def _cut(self) -> None:
        while len(self._bytes) >= 6:
            kind, length = struct.unpack_from(">BxI", self._bytes)
            if len(self._bytes) < 6 + length:
                return
            body, self._bytes = self._bytes[6 : 6 + length], self._bytes[6 + length :]
            if kind == 4:
                self._values(body)
            else:
                self.replies.append(_association_fact(kind, body))
                self._answered = kind == 2

    def _values(self, body: bytes) -> None:
        while body:
            length, context_id, control = struct.unpack_from(">IBB", body)
            data = Data(context_id, bool(control & 1), memoryview(body)[6 : 4 + length], bool(control & 2))
            body = body[4 + length :]
            for item in self._messages.feed(data):
                if isinstance(item, CommandReceived):
                    elements = tuple((f"{e:04x}", v.hex()) for e, v in item.command.elements.items())
                    self._message = ["message", context_id, elements, b"" if item.command.has_data_set else None]
                    self._pending = item.command.status in (0xFF00, 0xFF01)
                    whole = not item.command.has_data_set
                else:
                    self._message[3] += bytes(item.content)
                    whole = item.last
                if whole:
                    self.replies.append(tuple(self._message))
                    self._answered = not self._pending


def _association_fact(kind: int, body: bytes) -> Fact:
    pdu = pdus.decode_pdu(kind, body)
    if isinstance(pdu, pdus.AssociateAC):
        contexts = tuple((c.context_id, c.result, c.transfer_syntax) for c in pdu.contexts)
        user = pdu.user
        roles = tuple(sorted((r.sop_class_uid, r.scu, r.scp) for r in user.roles))
        extended = tuple(sorted((e.sop_class_uid, e.application_information.hex()) for e in user.extended))
        more = (user.asynchronous_window, user.common_extended, user.identity_response)
        titles = (body[4:20], body[20:36], body[36:68])
        who = (user.implementation_class_uid, user.implementation_version_name)
        return ("AC", pdu.protocol_version, titles, contexts, user.maximum_length, roles, extended, more, who)
    return (NAMES[kind], *body)


# --- streams ----------------------------------------------------------------------------------------------------------


def data_set(uid: str, *, study: str = "", **attributes: Any) -> Dataset:
    """A small object."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = attributes.pop("SOPClassUID", CT), uid
    ds.StudyInstanceUID = study or f"{uid}.1"
    ds.SeriesInstanceUID = f"{ds.StudyInstanceUID}.2"
    ds.PatientID, ds.PatientName, ds.Modality, ds.StudyDate = "P1", "Doe^Jane", "CT", "20200102"
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return ds


def write_file(folder: Path, ds: Dataset) -> Path:
    """It as a Part-10 file."""
    folder.mkdir(exist_ok=True, parents=True)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = EXPLICIT
    path = folder / f"{ds.SOPInstanceUID}.dcm"
    ds.save_as(path, enforce_file_format=True, implicit_vr=False, little_endian=True)
    return path


def destination(port: int) -> Destination:
    """The node at that port."""
    return Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=port)


class Proxy:
    """Passes connections on to a port and keeps what was said, turn by turn of the client."""

    def __init__(self, target: int) -> None:
        self._streams: queue.Queue[Stream] = queue.Queue()
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port = int(self._listener.getsockname()[1])
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    def _run(self) -> None:
        relays = []
        while not self._closing.is_set():
            with suppress(TimeoutError):
                client, _ = self._listener.accept()
                relays.append(threading.Thread(target=self._keep, args=(client,), name="relay"))
                relays[-1].start()
        for relay in relays:
            relay.join()

    def _keep(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            self._streams.put(tuple(self._relay(client, server)))

    def _relay(self, client: socket.socket, server: socket.socket) -> list[bytes]:
        turns: list[bytes] = []
        speaks: socket.socket | None = None
        for connection in (client, server):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while not self._closing.is_set():
            for source in select.select([client, server], [], [], 0.1)[0]:
                received = source.recv(1 << 20)
                if not received:
                    return turns
                if source is client:
                    if speaks is not client:
                        turns.append(b"")
                    turns[-1] += received
                speaks = source
                (server if source is client else client).sendall(received)
        return turns

    def take(self) -> Stream:
        """The next stream that came to its end."""
        return self._streams.get(timeout=HANG_S)

    def all(self) -> list[Stream]:
        """Every stream there was, when it is closed."""
        return [self._streams.get_nowait() for _ in range(self._streams.qsize())]

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._listener.close()


def pdus_of(stream: Stream) -> list[list[bytes]]:
    """The PDUs of each turn."""
    turns = []
    for turn in stream:
        found = []
        while turn:
            length = 6 + struct.unpack_from(">I", turn, 2)[0] if len(turn) >= 6 else len(turn)
            found.append(turn[:length])
            turn = turn[length:]
        turns.append(found)
    return turns


# --- mutated streams --------------------------------------------------------------------------------------------------


class Mutations:
    """Ways to spoil a stream, each on the PDUs of its turns, in place."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.ways: Sequence[Callable[[list[list[bytes]]], None]] = (
            *(self.flip, self.flip, self.overwrite, self.pdu_length, self.pdu_length, self.inner_length, self.retype),
            *(self.swap, self.drop, self.double, self.insert, self.control, self.recut, self.join, self.truncate),
        )

    def of(self, stream: Stream) -> tuple[str, Stream]:
        """A mutant and how it was made."""
        turns = pdus_of(stream)
        done = []
        for _ in range(self._rng.choice((1, 1, 1, 2))):
            way = self._rng.choice(self.ways)
            way(turns)
            done.append(way.__name__)
        return "+".join(done), in_turns(b"".join(pdu for turn in turns for pdu in turn))

    def _place(self, turns: list[list[bytes]], wanted: Callable[[bytes], object] = len) -> tuple[list[bytes], int]:
        places = [(turn, i) for turn in turns for i, pdu in enumerate(turn) if wanted(pdu)]
        return self._rng.choice(places) if places else ([b""], 0)

    def _change(self, turns: list[list[bytes]], at: int | None, change: Callable[[int], int], width: int = 1) -> None:
        turn, i = self._place(turns, lambda pdu: len(pdu) >= 10)
        pdu = bytearray(turn[i])
        if len(pdu) < 10:
            return
        if at is None:  # heads are where the meaning is
            at = self._rng.randrange(min(len(pdu), self._rng.choice((24, 110, 400, 1 << 20))) - width + 1)
        value = change(int.from_bytes(pdu[at : at + width], "big")) % (1 << 8 * width)
        pdu[at : at + width] = value.to_bytes(width, "big")
        turn[i] = bytes(pdu)

    def flip(self, turns: list[list[bytes]]) -> None:
        bit = 1 << self._rng.randrange(8)
        self._change(turns, None, lambda value: value ^ bit)

    def overwrite(self, turns: list[list[bytes]]) -> None:
        byte = self._rng.choice((0, 1, 0x20, 0x7F, 0xFF, self._rng.randrange(256)))
        self._change(turns, None, lambda value: byte)

    def pdu_length(self, turns: list[list[bytes]]) -> None:
        by = self._rng.choice((-7, -2, -1, 1, 2, 6, 1 << 16, 1 << 24, 1 << 31))
        self._change(turns, 2, lambda value: value + by, 4)

    def inner_length(self, turns: list[list[bytes]]) -> None:
        by, width = self._rng.choice((-2, -1, 1, 2, 1 << 8)), self._rng.choice((2, 4))
        at = self._rng.choice((6, 6, 76, 103, None))
        self._change(turns, at if at is None or at == 6 else None, lambda value: value + by, width)

    def retype(self, turns: list[list[bytes]]) -> None:
        kind = self._rng.randrange(10)
        self._change(turns, 0, lambda value: kind)

    def control(self, turns: list[list[bytes]]) -> None:
        turn, i = self._place(turns, lambda pdu: pdu[:1] == b"\x04" and len(pdu) > 12)
        pdu = bytearray(turn[i])
        if len(pdu) > 12:
            pdu[self._rng.choice((10, 11))] ^= 1 << self._rng.randrange(8)
        turn[i] = bytes(pdu)

    def swap(self, turns: list[list[bytes]]) -> None:
        (a, i), (b, j) = self._place(turns), self._place(turns)
        a[i], b[j] = b[j], a[i]

    def drop(self, turns: list[list[bytes]]) -> None:
        turn, i = self._place(turns)
        turn[i] = b""

    def double(self, turns: list[list[bytes]]) -> None:
        turn, i = self._place(turns)
        turn[i] += turn[i]

    def insert(self, turns: list[list[bytes]]) -> None:
        turn, i = self._place(turns)
        kind = self._rng.randrange(1, 9)
        length = self._rng.choice((0, 3, 4, 4, 5, 68))
        pdu = struct.pack(">BxI", kind, length) + bytes(length)
        turn[i] = self._rng.choice((pdu + turn[i], turn[i] + pdu))

    def recut(self, turns: list[list[bytes]]) -> None:
        """The same message in other PDUs: no fault at all."""
        for turn in turns:
            turn[:] = [piece for pdu in turn for piece in recut(pdu, lambda: self._rng.choice((1, 7, 50, 1000)))]

    def join(self, turns: list[list[bytes]]) -> None:
        """All values of a turn in one PDU: no fault at all."""
        for turn in turns:
            if len(turn) > 1 and all(pdu[:1] == b"\x04" for pdu in turn):
                body = b"".join(pdu[6:] for pdu in turn)
                turn[:] = [struct.pack(">BxI", 4, len(body)) + body]

    def truncate(self, turns: list[list[bytes]]) -> None:
        turn, i = self._place(turns)
        turn[i] = turn[i][: self._rng.randrange(len(turn[i]))] if turn[i] else b""
        del turn[i + 1 :]
        del turns[next(n for n, item in enumerate(turns) if item is turn) + 1 :]


def recut(pdu: bytes, size: Callable[[], int]) -> Iterator[bytes]:
    """A P-DATA-TF PDU of one value as several; any other as it is."""
    if pdu[:1] != b"\x04" or len(pdu) < 12 or len(pdu) != 10 + struct.unpack_from(">I", pdu, 6)[0]:
        yield pdu
        return
    context_id, control, content = pdu[10], pdu[11], pdu[12:]
    while True:
        taken = size()
        piece, content = content[:taken], content[taken:]
        yield p_data(context_id, control if not content else control & ~2, piece)
        if not content:
            return


def in_turns(said: bytes) -> Stream:
    """Cut where a peer would wait for an answer: after each message, and each PDU that is no data."""
    turns, turn, command = [], b"", b""
    for pdu in pdus_of((said,))[0]:
        turn += pdu
        answered = True
        for control, content in values_of(pdu):
            command = command + content if control & 1 else b""
            answered = bool(control & 2) and (not control & 1 or NO_DATA_SET in command)
        if answered:
            turns.append(turn)
            turn, command = b"", b""
    return (*turns, turn) if turn else tuple(turns)


def values_of(pdu: bytes) -> Iterator[tuple[int, bytes]]:
    """The message control header and content of each value in a P-DATA-TF PDU, as far as there are any."""
    at = 6
    while pdu[:1] == b"\x04" and at + 6 <= len(pdu):
        end = at + 4 + max(struct.unpack_from(">I", pdu, at)[0], 2)
        yield pdu[at + 5], pdu[at + 6 : end]
        at = end


def p_data(context_id: int, control: int, content: bytes) -> bytes:
    """One value in a PDU of its own."""
    return struct.pack(">BxIIBB", 4, len(content) + 6, len(content) + 2, context_id, control) + content


def told_apart(own: Outcome, other: Outcome) -> str:
    """Where they differ, to be read."""
    lines = []
    for name in ("replies", "closed_first", "told", "news"):
        a, b = getattr(own, name), getattr(other, name)
        if a == b:
            continue
        if isinstance(a, tuple):
            same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            a, b = ([*(fact[0] for fact in facts[:same]), *facts[same:]] for facts in (a, b))
        lines += [f"{name}:", f"  own        {a}", f"  pynetdicom {b}"]
    return "\n".join(lines)


# --- what may differ --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A way in which the wires differ, and why that stays.

    `settled` gives the two outcomes of a stream without it: they are what they were where it is not the case.
    `witness` is a stream that shows it.
    """

    name: str
    paragraph: str
    reason: str
    settled: Callable[[Stream, Outcome, Outcome], tuple[Outcome, Outcome]]
    witness: Callable[[], Stream]


def _abort_reasons(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    def without(outcome: Outcome) -> Outcome:
        return replace(outcome, replies=tuple(fact[:1] if fact[0] == "ABORT" else fact for fact in outcome.replies))

    return without(own), without(other)


def _context_order(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    def ordered(outcome: Outcome) -> Outcome:
        facts = ((*f[:3], tuple(sorted(f[3])), *f[4:]) if f[0] == "AC" else f for f in outcome.replies)
        return replace(outcome, replies=tuple(facts))

    return ordered(own), ordered(other)


def _no_role(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    def told(outcome: Outcome) -> Outcome:
        facts = ((*f[:5], tuple(r for r in f[5] if any(r[1:])), *f[6:]) if f[0] == "AC" else f for f in outcome.replies)
        return replace(outcome, replies=tuple(facts))

    return told(own), told(other)


def _opened_early(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    row = own.news[-1:]
    if row and row[0][0] == "association" and ("ended", "aborted") in row[0] and own.news[:-1] == other.news:
        return replace(own, news=own.news[:-1]), other
    return own, other


def _said_before(own: Outcome, other: Outcome) -> bool:
    """Whether the own wire said what the other said, and more, before both ended the association."""
    ended = ({"ABORT"}, {"ABORT", "RELEASE-RP"})
    said = other.replies
    if said and said[-1][0] in ended[1]:
        said = said[:-1]
    return (
        own.replies[: len(said)] == said
        and set(other.news) - set(own.news) <= {row for row in other.news if row[0] == "association"}
        and [fact for fact in other.told if fact[0] == "answered"]
        == [fact for fact in own.told if fact[0] == "answered"][: sum(fact[0] == "answered" for fact in other.told)]
    )


def _acts_before_the_end(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    return (own, own) if any(map(_is_broken, stream)) and _said_before(own, other) else (own, other)


def _is_broken(turn: bytes) -> bool:
    """Whether a P-DATA-TF PDU in it is not whole, or its values do not fill it."""
    for pdu in pdus_of((turn,))[0]:
        if pdu[:1] == b"\x04":
            length, at = struct.unpack_from(">I", pdu.ljust(6, b"\0"), 2)[0], 6
            while at + 4 <= len(pdu):
                at += 4 + struct.unpack_from(">I", pdu, at)[0]
            if len(pdu) != 6 + length or at != len(pdu):
                return True
    return False


def _looks_ahead(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    ahead = any(len(in_turns(turn)) > 1 for turn in stream)
    return (own, own) if ahead and _said_before(own, other) else (own, other)


def _request_of(stream: Stream) -> pdus.AssociateRQ | None:
    with suppress(pdus.InvalidPdu, IndexError):
        first = pdus_of(stream)[0][0]
        found = pdus.decode_pdu(1, first[6:]) if first[:1] == b"\x01" else None
        return found if isinstance(found, pdus.AssociateRQ) else None
    return None


def _unknown_items(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    known: dict[int, Sequence[int]] = {0x20: (0x30, 0x40), 0x50: range(0x51, 0x5A)}
    kinds: list[tuple[int, Sequence[int]]] = []
    for kind, content in _items(stream[0][74:] if stream else b""):
        kinds.append((kind, (0x10, 0x20, 0x50)))
        kinds += [(inner, known[kind]) for inner, _ in _items(content[4 if kind == 0x20 else 0 :]) if kind in known]
    strange = any(kind not in expected for kind, expected in kinds)
    return (own, own) if strange and [fact[0] for fact in other.replies] == ["ABORT"] else (own, other)


def _item_twice(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    kinds = [kind for kind, _ in _items(stream[0][74:] if stream else b"")]
    twice = kinds.count(0x10) > 1 or kinds.count(0x50) > 1
    return (own, own) if twice and [fact[0] for fact in own.replies] == ["ABORT"] else (own, other)


def _items(content: bytes) -> Iterator[tuple[int, bytes]]:
    while len(content) >= 4:
        kind, length = struct.unpack_from(">BxH", content)
        yield kind, content[4 : 4 + length]
        content = content[4 + length :]


def _uids(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    request = _request_of(stream)
    if request is None or other.replies[:1] not in ((("ABORT",),), (("ABORT", 0, 0, 0, 0),)):
        return own, other
    user = request.user
    found = [
        *(request.application_context, user.implementation_class_uid),
        *(uid for context in request.contexts for uid in (context.abstract_syntax, *context.transfer_syntaxes)),
        *(item.sop_class_uid for item in (*user.roles, *user.extended, *user.common_extended)),
        *(item.service_class_uid for item in user.common_extended),
        *(uid for item in user.common_extended for uid in item.related_general_sop_class_uids),
    ]
    return (own, other) if all(WELL_FORMED.fullmatch(uid) for uid in found) else (own, own)


def _texts(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    request, said = _request_of(stream), stream[0] if stream else b""
    if request is None:
        return own, other
    name = request.user.implementation_version_name
    texts = (said[10:26].strip(b" "), said[26:42].strip(b" "), name.encode("latin-1", "replace") or b"X")
    strange = any(not text or any(not 0x20 <= byte < 0x7F for byte in text) for text in texts)
    return (own, own) if strange else (own, other)


def _versions(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    request = _request_of(stream)
    newer = request is not None and request.protocol_version & 1 and request.protocol_version != 1
    return (own, own) if newer and other.replies == (("RJ", 0, 1, 2, 2),) else (own, other)


def _too_short(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    least = {4: 12, 5: 10}
    said = [pdu for turn in pdus_of(stream) for pdu in turn]
    short = any(6 <= len(pdu) < least.get(pdu[0], 0) for pdu in said)
    return (own, own) if short and [f[0] for f in own.replies[-1:]] == ["ABORT"] else (own, other)


def _release_inside(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    if (
        own.told == other.told
        and [f[0] for f in own.replies[-1:]] == ["ABORT"]
        and other.replies[-1:] == (("RELEASE-RP", 0, 0, 0, 0),)
    ):
        return own, replace(other, replies=(*other.replies[:-1], own.replies[-1]))
    return own, other


def associate(*contexts: tuple[int, str, Sequence[str]], version: int = 1, **user: Any) -> bytes:
    """An A-ASSOCIATE-RQ."""
    return pdus.encode_pdu(
        pdus.AssociateRQ(
            called_ae_title="DICOM_NODE",
            calling_ae_title="TEST",
            contexts=tuple(
                pdus.ProposedContext(context_id=number, abstract_syntax=abstract, transfer_syntaxes=tuple(syntaxes))
                for number, abstract, syntaxes in contexts
            ),
            user=pdus.UserInformation(maximum_length=16384, implementation_class_uid="1.2.3", **user),
            protocol_version=version,
        )
    )


def message(context_id: int, data: bytes | None = None, **fields: Any) -> bytes:
    """A message in PDUs of one value each; without a data set when `data` is None."""
    fields.setdefault("CommandDataSetType", 0x0101 if data is None else 1)
    command = p_data(context_id, 3, encode_command(fields))
    return command if data is None else command + p_data(context_id, 2, data)


def echo(context_id: int = 1, **fields: Any) -> bytes:
    """A C-ECHO request."""
    return message(context_id, **{"AffectedSOPClassUID": VERIFICATION, "CommandField": 0x30, "MessageID": 1, **fields})


def store(context_id: int = 1, number: int = 1, **fields: Any) -> bytes:
    """A C-STORE request."""
    uid = f"{ROOT}.{number}"
    about = {"AffectedSOPClassUID": CT, "CommandField": 1, "MessageID": 1, "Priority": 0, "AffectedSOPInstanceUID": uid}
    return message(context_id, encoded(data_set(uid, study=ROOT)), **{**about, **fields})


def encoded(ds: Dataset) -> bytes:
    """It in Explicit VR Little Endian."""
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = False, True
    write_dataset(out, ds)
    return out.getvalue()


NEITHER = pdus.RoleSelection(sop_class_uid=STUDY_MOVE, scu=False, scp=False)


def _doubled(request: bytes) -> bytes:
    """It with its application context item twice, which is the first item."""
    item = request[74 : 78 + struct.unpack_from(">H", request, 76)[0]]
    return struct.pack(">BxI", 1, len(request) - 6 + len(item)) + request[6:74] + item + request[74:]


RELEASE = bytes.fromhex("05000000000400000000")
TO_ECHO = associate((1, VERIFICATION, (IMPLICIT,)))
TO_NAMED_ECHO = associate((1, VERIFICATION, (IMPLICIT,)), implementation_version_name="X")
TO_STORE = associate((1, CT, (EXPLICIT,)))

DIFFERENCES = (
    Difference(
        "the reason of an A-ABORT",
        "PS3.8 9.3.8",
        "The own wire says what was wrong (1, 2 or 6 of the provider), and aborts as service user what is no DIMSE "
        "message; pynetdicom's provider always says 'not specified'. Nobody may act on it.",
        _abort_reasons,
        lambda: (TO_ECHO, RELEASE.replace(b"\x05", b"\x08", 1)),
    ),
    Difference(
        "the order of the contexts in an A-ASSOCIATE-AC",
        "PS3.8 9.3.3.2",
        "In the order of their ids, or those that are accepted first: each item carries its id.",
        _context_order,
        lambda: (associate((1, "1.2.3", (IMPLICIT,)), (3, VERIFICATION, (IMPLICIT,))), RELEASE),
    ),
    Difference(
        "the reply that gives neither role",
        "PS3.7 D.3.3.4.2",
        "A role selection item with 0 and 0 for a SOP class whose context is refused: the own wire sends it, "
        "pynetdicom cannot encode it. The context's result says the same.",
        _no_role,
        lambda: (associate((1, STUDY_MOVE, (IMPLICIT,)), roles=(NEITHER,)), RELEASE),
    ),
    Difference(
        "an association is on record from its first C-STORE command set, or from its first whole object",
        "PS3.4 B.2.3",
        "The own wire hands a data set on as it comes, so an object that never ends has begun; pynetdicom's gathers it "
        "first. Nothing was acknowledged; the record then says 'aborted' and keeps nothing waiting.",
        _opened_early,
        lambda: (TO_STORE, store().replace(b"\x01\x02\x08\x00", b"\x01\x00\x08\x00", 1)),
    ),
    Difference(
        "a value is taken when it is whole, or when its PDU is",
        "PS3.8 9.3.5, annex E",
        "A P-DATA-TF PDU that does not end where it says: the own wire has taken the values before the fault by then, "
        "and has answered the messages that they end; pynetdicom's takes none, and waits for the rest of a length.",
        _acts_before_the_end,
        lambda: (TO_ECHO, echo()[:2] + b"\0\1" + echo()[4:] + bytes(40)),
    ),
    Difference(
        "what is sent before the answer was awaited",
        "PS3.7 D.3.3.3, PS3.8 7.2",
        "Only one operation may be under way (no asynchronous window is agreed), and no release meanwhile. The own "
        "wire reads on when it has answered; pynetdicom's reads ahead, and drops its answers to what a release or a "
        "fault follows.",
        _looks_ahead,
        lambda: (TO_ECHO, echo() + RELEASE),
    ),
    Difference(
        "UIDs that are none",
        "PS3.8 annex F, PS3.5 9.1",
        "A UID with other characters than its own, in an A-ASSOCIATE-RQ: to the own wire the name of something it does "
        "not know, to be refused by itself; pynetdicom's cannot decode it and aborts.",
        _uids,
        lambda: (associate((1, "1.2.?", (IMPLICIT,))).replace(b"1.2.?", b"1.2.\xff"), RELEASE),
    ),
    Difference(
        "items of a type that the Standard does not know",
        "PS3.8 9.3.1, PS3.7 D.3.3",
        "'Items of unrecognized types shall be ignored and skipped': so the own wire; pynetdicom aborts.",
        _unknown_items,
        lambda: (TO_NAMED_ECHO.replace(b"\x55\0\0\1", b"\x5a\0\0\1"), RELEASE),
    ),
    Difference(
        "an item twice of which there is one",
        "PS3.8 9.3.2, 9.3.8",
        "Two application contexts or user informations: an unexpected parameter to the own wire, which aborts; "
        "pynetdicom takes the last.",
        _item_twice,
        lambda: (_doubled(TO_ECHO), RELEASE),
    ),
    Difference(
        "AE titles and version names of blanks or of other characters than may be",
        "PS3.8 9.3.2, 9.3.4, PS3.7 D.3.3.2.3",
        "To the own wire an AE that it does not know, to be rejected, or a name that it does not look at; pynetdicom "
        "cannot decode it and aborts, or strips it.",
        _texts,
        lambda: (TO_ECHO.replace(b"TEST", b"    "), RELEASE),
    ),
    Difference(
        "other bits of the protocol version",
        "PS3.8 9.3.2",
        "'A receiver implementing only this version shall only test that bit 0 is set': so the own wire; pynetdicom "
        "wants the whole field to be 1.",
        _versions,
        lambda: (associate((1, VERIFICATION, (IMPLICIT,)), version=3), RELEASE),
    ),
    Difference(
        "an A-RELEASE-RQ or P-DATA-TF shorter than it must be",
        "PS3.8 9.3.5, 9.3.6",
        "A release is 4 bytes long, data has a value: anything less is no PDU to the own wire, and passes with "
        "pynetdicom.",
        _too_short,
        lambda: (TO_ECHO, bytes.fromhex("0500000000020000")),
    ),
    Difference(
        "a release in the middle of a message",
        "PS3.8 7.2, PS3.7 8.1",
        "The own wire aborts: to agree would be to say that all was well. pynetdicom's agrees, but does not record the "
        "association as released either.",
        _release_inside,
        lambda: (TO_ECHO, p_data(1, 1, bytes(8)), RELEASE),
    ),
)


def settled(stream: Stream, own: Outcome, other: Outcome) -> tuple[Outcome, Outcome]:
    """The outcomes without the differences that are listed."""
    for difference in DIFFERENCES:
        own, other = difference.settled(stream, own, other)
    return own, other


def _kept(outcome: Outcome) -> list[Fact]:
    return [fact for fact in outcome.news if fact[0] == "instance"]


def check(pair: Pair, stream: Stream, how: str) -> None:
    """Fails unless both wires do the same with it, end it, and find no fault in themselves."""
    pair.faults.found.clear()
    raw = pair.play(stream)
    own, other = settled(stream, *raw)
    if own != other:  # the machine may have been busy
        raw = pair.play(stream, patient=True)
        own, other = settled(stream, *raw)
    if _kept(raw[0]) != _kept(raw[1]):
        pair.renew()
    said = "\n".join(turn.hex() for turn in stream)
    assert own == other, f"{how}\n{told_apart(own, other)}\nstream:\n{said}"
    assert not {fact[0] for fact in own.replies} & HANGS, f"{how}: {own.replies}\nstream:\n{said}"
    assert not pair.faults.found, f"{how}: {pair.faults.found}\nstream:\n{said}"


# --- recorded ---------------------------------------------------------------------------------------------------------


def record(pair: Pair, tool: Callable[[str], str], folder: Path) -> dict[str, Stream]:
    """What real clients send to the node, by their names."""
    files = [write_file(folder, data_set(f"{ROOT}.{n}", study=ROOT, InstanceNumber=n)) for n in (1, 2)]
    streams: dict[str, Stream] = {}
    with Proxy(pair.recorder.port) as proxy:
        to = ("-aec", "DICOM_NODE", "127.0.0.1", str(proxy.port))
        query = ("-S", "-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={KEPT}")
        for name, *words in (
            ("echoscu", "echoscu", *to),
            ("storescu", "storescu", *to, *files),
            ("storescu -R", "storescu", "-R", *to, *files),
            ("findscu", "findscu", *query, "-k", "PatientName", *to),
            ("findscu -W", "findscu", "-P", "-k", "QueryRetrieveLevel=PATIENT", "-k", "PatientID=P*", *to),
            ("getscu", "getscu", *query, *to, "-od", folder),
            ("movescu", "movescu", *query, "-aem", "SINK", *to),
        ):
            subprocess.run(
                [tool(words[0]), *map(str, words[1:])], check=True, timeout=20, env={**os.environ, "TCP_NODELAY": "1"}
            )
            streams[name] = proxy.take()
        for name, open_link in (
            ("sender", requestor.open_link),
            ("pynetdicom's sender", pynetdicom_requestor.open_link),
        ):
            instances = [instance_of_file(path) for path in files]
            DimseSender(SETTINGS, "SENDER", open_link).send(
                destination(proxy.port), instances, lambda *_: None, lambda: None
            )
            streams[name] = proxy.take()
    return streams


@pytest.fixture(scope="module")
def recorded(pair: Pair, tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stream]:
    """See `record`."""
    return record(pair, tool, tmp_path_factory.mktemp("recorded"))


def test_both_wires_do_the_same_with_what_clients_really_send(pair: Pair, recorded: dict[str, Stream]) -> None:
    for name, stream in recorded.items():
        assert len(stream) >= 3, name
        check(pair, stream, name)


@pytest.mark.peers
def test_both_wires_do_the_same_with_what_orthanc_sends(
    pair: Pair, orthanc: Callable[..., Any], free_port: Callable[[], int], tmp_path: Path
) -> None:
    with Proxy(pair.recorder.port) as proxy:
        peer = orthanc(free_port(), free_port(), proxy.port)
        file = write_file(tmp_path / "files", data_set(f"{ROOT}.1", study=ROOT))
        upload = urllib.request.Request(f"http://127.0.0.1:{peer.http}/instances", file.read_bytes(), method="POST")
        with urllib.request.urlopen(upload, timeout=30) as answer:
            instance = json.loads(answer.read())["ID"]
        peer.call("/modalities/node/echo", {})
        peer.call("/modalities/node/query", {"Level": "Study", "Query": {"PatientID": "P1"}})
        peer.call("/modalities/node/store", [instance])
    streams = proxy.all()
    assert len(streams) == 3
    for stream in streams:  # Orthanc keeps an association for its next object: that one ends without a release
        check(pair, stream, "orthanc")


# --- mutated ----------------------------------------------------------------------------------------------------------


def test_both_wires_do_the_same_with_mutants_of_recorded_streams(pair: Pair, recorded: dict[str, Stream]) -> None:
    rng = random.Random(SEED)
    mutations = Mutations(rng)
    names = [name for name in recorded if name not in ("storescu", "pynetdicom's sender")]  # long; the same as another
    for number in range(MUTANTS):
        name = rng.choice(names)
        way, stream = mutations.of(recorded[name])
        check(pair, stream, f"mutant {number} of {name}: {way}")


# --- generated --------------------------------------------------------------------------------------------------------

UIDS = st.sampled_from((VERIFICATION, CT, MR, STUDY_FIND, STUDY_MOVE, STUDY_GET, "1.2.3.4", "1.2.840.10008.1.3.10"))
SYNTAXES = st.sampled_from((IMPLICIT, EXPLICIT, BIG, "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.50", "1.2.3"))
BYTES = st.binary(max_size=12)
GENERATED = settings(
    max_examples=EXAMPLES,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=(HealthCheck.too_slow,),
)


def some(strategy: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[Any]:
    """A tuple of at most so many, each of another SOP class."""
    return st.lists(strategy, max_size=most, unique_by=lambda item: item.sop_class_uid).map(tuple)


USERS = st.builds(
    pdus.UserInformation,
    maximum_length=st.sampled_from((0, 1, 6, 127, 128, 4096, 16384, 1 << 20, 0xFFFFFFFF)),
    implementation_class_uid=st.just("1.2.3"),
    implementation_version_name=st.sampled_from(("", "X", "SIXTEEN_LETTERS_")),
    asynchronous_window=st.none() | st.builds(pdus.AsynchronousWindow, invoked=st.integers(0, 9), performed=st.just(1)),
    roles=some(st.builds(pdus.RoleSelection, sop_class_uid=UIDS, scu=st.booleans(), scp=st.booleans()), 4),
    extended=some(st.builds(pdus.ExtendedNegotiation, sop_class_uid=UIDS, application_information=BYTES), 3),
    common_extended=some(
        st.builds(
            pdus.CommonExtendedNegotiation,
            sop_class_uid=UIDS,
            service_class_uid=st.just("1.2.840.10008.4.2"),
            related_general_sop_class_uids=st.lists(UIDS, max_size=2).map(tuple),
        ),
        2,
    ),
    identity=st.none()
    | st.builds(
        pdus.UserIdentity,
        kind=st.integers(1, 5),
        primary=st.binary(min_size=1, max_size=12),
        secondary=BYTES,
        response_requested=st.booleans(),
    ),
)
REQUESTS = st.builds(
    pdus.AssociateRQ,
    called_ae_title=st.sampled_from((*["DICOM_NODE"] * 5, "OTHER", "")),
    calling_ae_title=st.sampled_from((*["TEST"] * 3, "SIXTEEN LETTERS_", "a b", "")),
    contexts=st.lists(
        st.builds(
            pdus.ProposedContext,
            context_id=st.integers(0, 127).map(lambda n: 2 * n + 1),
            abstract_syntax=UIDS,
            transfer_syntaxes=st.lists(SYNTAXES, min_size=1, max_size=4).map(tuple),
        ),
        max_size=6,
    ).map(tuple),
    user=USERS,
    application_context=st.sampled_from((*[pdus.APPLICATION_CONTEXT] * 5, "1.2.840.10008.3.1.1.2")),
    protocol_version=st.sampled_from((1, 1, 1, 1, 0, 3)),
)


@seed(SEED)
@GENERATED
@given(request=REQUESTS)
def test_both_wires_answer_a_request_for_an_association_alike(pair: Pair, request: pdus.AssociateRQ) -> None:
    first = request.contexts[0].context_id if request.contexts else 1
    check(pair, (pdus.encode_pdu(request), echo(first), RELEASE), repr(request))


CONTEXTS = (
    *((1, VERIFICATION, (IMPLICIT,)), (3, CT, (EXPLICIT,)), (5, STUDY_FIND, (EXPLICIT,))),
    *((7, STUDY_MOVE, (EXPLICIT,)), (9, STUDY_GET, (EXPLICIT,)), (11, MR, (IMPLICIT,)), (13, "1.2.3", (IMPLICIT,))),
)
LIKELY = {0x01: (3, 11), 0x10: (9,), 0x20: (5,), 0x21: (7,), 0x30: (1,)}
COMMANDS = st.fixed_dictionaries(
    {
        "CommandField": st.sampled_from(
            (*[*LIKELY] * 3, *(0x8001, 0x8030, 0x0100, 0x0110, 0x0120, 0x0130, 0x0140, 0x0150, 0x0002, 0x0FFF))
        )
    },
    optional={
        "AffectedSOPClassUID": UIDS,
        "MessageID": st.sampled_from((1, 1, 7, 0, 0xFFFF)),
        "MessageIDBeingRespondedTo": st.sampled_from((1, 9)),
        "Priority": st.integers(0, 3),
        "Status": st.sampled_from((0, 0xFF00)),
        "AffectedSOPInstanceUID": st.sampled_from((f"{ROOT}.1", f"{ROOT}.2", "x" * 70, "")),
        "MoveDestination": st.sampled_from(("SINK", "NOBODY", "", "MORE THAN SIXTEEN")),
    },
)


def _identifier(attributes: dict[str, Any]) -> bytes:
    ds = Dataset()
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    return encoded(ds)


IDENTIFIERS = st.fixed_dictionaries(
    {},
    optional={
        "QueryRetrieveLevel": st.sampled_from(("STUDY", "STUDY", "PATIENT", "SERIES", "IMAGE", "", "X")),
        "StudyInstanceUID": st.sampled_from((KEPT, KEPT, "", "1.2.9", f"{KEPT}\\1.2")),
        "PatientID": st.sampled_from(("P1", "P*", "")),
        "StudyDate": st.sampled_from(("20200102", "20190101-", "-", "2020")),
        "NumberOfStudyRelatedInstances": st.none(),
    },
).map(_identifier)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A DIMSE message, or nearly one, in PDUs of some sizes."""
    fields = dict(draw(COMMANDS))
    kind = fields["CommandField"]
    if draw(st.integers(0, 9)):  # mostly a request that can be understood
        fields.setdefault("MessageID", 1)
        if kind in LIKELY:
            fields.pop("MessageIDBeingRespondedTo", None)
    usual = draw(st.integers(0, 7)) and kind in LIKELY
    context_id = draw(st.sampled_from(LIKELY[kind] if usual else (1, 3, 5, 7, 9, 11, 13, 2, 255)))
    if usual and kind != 0x01:
        data = None if kind == 0x30 else draw(IDENTIFIERS)
    else:
        objects = (encoded(data_set(f"{ROOT}.{n}", study=ROOT)) for n in (1, 2))
        data = draw(st.sampled_from((*objects, None, b"")) | IDENTIFIERS | st.binary(max_size=40))
    if not draw(st.integers(0, 9)):
        fields["CommandDataSetType"] = draw(st.sampled_from((0, 1, 0x0101, 0x0102, 0xFFFF)))
    sizes = itertools.cycle(draw(st.lists(st.integers(1, 300), min_size=1, max_size=6)))
    whole = pdus_of((message(context_id, data, **fields),))[0]
    return b"".join(piece for pdu in whole for piece in recut(pdu, lambda: next(sizes)))


@seed(SEED)
@GENERATED
@given(said=st.lists(messages(), min_size=1, max_size=3))
def test_both_wires_answer_messages_alike(pair: Pair, said: list[bytes]) -> None:
    roles = (pdus.RoleSelection(sop_class_uid=CT, scu=True, scp=True),)
    check(pair, in_turns(associate(*CONTEXTS, roles=roles) + b"".join(said) + RELEASE), "messages")


# --- the table --------------------------------------------------------------------------------------------------------


def test_each_difference_that_is_listed_occurs_and_is_the_only_one_of_its_stream(pair: Pair) -> None:
    for difference in DIFFERENCES:
        stream = difference.witness()
        own, other = pair.play(stream)
        for listed in DIFFERENCES:
            if listed is not difference:
                own, other = listed.settled(stream, own, other)
        assert own != other, difference.name
        own, other = difference.settled(stream, own, other)
        assert own == other, f"{difference.name}\n{told_apart(own, other)}"
