"""Beyond the probe that `make faults` runs: ten thousand malformed associations, five hundred that never say a word.

Plain, over TLS and with two receivers: nobody dies, nothing is left over, and a C-ECHO is answered all the while.
"""

import json
import os
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from dicom_node.dimse.commands import encode_command
from dicom_node.dimse.upper_layer.connection import data_header
from dicom_node.dimse.upper_layer.pdus import (
    AssociateRQ,
    ProposedContext,
    ReleaseRQ,
    UserInformation,
    encode_pdu,
)

VERIFICATION, IMPLICIT = "1.2.840.10008.1.1", "1.2.840.10008.1.2"
MALFORMED, CALLERS, HALF_OPEN = 10_000, 8, 500
MIB = 1024 * 1024


@dataclass
class Door:
    """Where the node takes associations, and how to get in."""

    port: int
    context: ssl.SSLContext | None

    def open(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return sock if self.context is None else self.context.wrap_socket(sock, server_hostname="127.0.0.1")

    def echo(self) -> float:
        """Seconds from the connection to the answer of a C-ECHO."""
        started = time.monotonic()
        with self.open() as sock:
            sock.sendall(request())
            assert answered(sock)[0] == 2, "no association"
            sock.sendall(echo())
            assert answered(sock)[0] == 4, "no answer"
            took = time.monotonic() - started
            sock.sendall(encode_pdu(ReleaseRQ()))
            assert answered(sock)[0] == 6
        return took


def answered(sock: socket.socket) -> bytes:
    """One PDU."""
    found = b""
    while len(found) < 6 or len(found) < 6 + int.from_bytes(found[2:6], "big"):
        piece = sock.recv(65536)
        assert piece, "closed"
        found += piece
    return found


def request() -> bytes:
    context = ProposedContext(context_id=1, abstract_syntax=VERIFICATION, transfer_syntaxes=(IMPLICIT,))
    user = UserInformation(maximum_length=16384, implementation_class_uid="1.2.3")
    return encode_pdu(
        AssociateRQ(called_ae_title="DICOM_NODE", calling_ae_title="FAULTS", contexts=(context,), user=user)
    )


def echo() -> bytes:
    command = encode_command(
        {"AffectedSOPClassUID": VERIFICATION, "CommandField": 0x30, "MessageID": 1, "CommandDataSetType": 0x0101}
    )
    return data_header(1, is_command=True, last=True, length=len(command)) + command


def malformed(chance: random.Random) -> bytes:
    """A conversation with something wrong in it: bytes changed, cut, doubled, lengths that lie, noise."""
    said = bytearray(request() + echo() * chance.randrange(3) + encode_pdu(ReleaseRQ()))
    kind = chance.randrange(6)
    if kind == 0:
        return chance.randbytes(chance.randrange(1, 400))
    if kind == 1:
        return bytes([chance.randrange(9), 0]) + chance.randbytes(4) + chance.randbytes(chance.randrange(200))
    for _ in range(chance.randrange(1, 8)):
        at = chance.randrange(len(said))
        if kind == 2:
            said[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            said[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
        elif kind == 4:
            del said[at : at + chance.randrange(1, 40)]
        else:
            said[at:at] = said[at : at + chance.randrange(1, 80)]
        if not said:
            return b"\0"
    return bytes(said)


@pytest.fixture(params=["plain", "tls", "two receivers"])
def node(request: pytest.FixtureRequest, running_node: Callable[..., Any], tool: Any, tmp_path: Path) -> Any:
    """A node under an allow-list, and its door."""
    settings: dict[str, Any] = {"engines": {}, "jobs": {"workers": 0}, "peers": {"faults": {"ae_title": "FAULTS"}}}
    context = None
    if request.param == "tls":
        certificate, key = str(tmp_path / "node.pem"), str(tmp_path / "node.key")
        words = ["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1"]
        words += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", key, "-out", certificate]
        subprocess.run([tool("openssl"), *words], check=True, capture_output=True, timeout=60)
        os.chmod(key, 0o600)
        settings["tls"] = {"certificate": certificate, "key": key, "ca": certificate}
        context = ssl.create_default_context(cafile=certificate)
        context.load_cert_chain(certificate, key)
    if request.param == "two receivers":
        settings["receivers"] = 2
    started = running_node(**settings)
    return started, Door(started.dicom_port, context)


def receivers(node: Any) -> list[psutil.Process]:
    folder = Path(node.data_dir, "run")
    found = [json.loads(path.read_text())["pid"] for path in sorted(folder.glob("receiver*.json"))]
    return [psutil.Process(pid) for pid in found]


def held(processes: list[psutil.Process]) -> list[tuple[int, int, int]]:
    """Threads, descriptors and resident bytes of each."""
    return [(one.num_threads(), one.num_fds(), one.memory_info().rss) for one in processes]


def storm(door: Door, seed: int, count: int, heard: list[int], hung: list[int]) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        with suppress(OSError), door.open() as sock:
            sock.settimeout(20)
            heard.append(seed)
            sock.sendall(malformed(chance))
            if isinstance(sock, ssl.SSLSocket):
                sock.settimeout(0.02)  # a half close is not to be had; what is unfinished is left
            else:
                sock.shutdown(socket.SHUT_WR)
            try:
                while sock.recv(65536):
                    pass
            except TimeoutError:
                if not isinstance(sock, ssl.SSLSocket):
                    hung.append(seed)


@pytest.mark.crash
@pytest.mark.timeout(1500)
def test_ten_thousand_malformed_associations_leave_nothing_behind(node: Any, wait_for: Callable[..., None]) -> None:
    running, door = node
    for _ in range(20):
        door.echo()
    processes = receivers(running)
    base = held(processes)
    heard: list[int] = []
    hung: list[int] = []
    threads = [
        threading.Thread(target=storm, args=(door, seed, MALFORMED // CALLERS, heard, hung)) for seed in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        slowest = max(slowest, door.echo())
        time.sleep(0.2)
    assert len(heard) == MALFORMED, f"{MALFORMED - len(heard)} connections were not taken"
    assert not hung, f"{len(hung)} connections were neither answered nor closed"
    assert slowest < 5.0, "a C-ECHO waited"
    assert [one.pid for one in receivers(running)] == [one.pid for one in processes], "a receiver died"

    def is_back() -> bool:
        now = held(processes)
        return all(
            threads <= before[0] + 4 and fds <= before[1] + 8
            for before, (threads, fds, _) in zip(base, now, strict=True)
        )

    wait_for(is_back, 60, f"threads and descriptors to come back to {base}; now {held(processes)}")
    after = held(processes)
    grown = [now[2] - before[2] for before, now in zip(base, after, strict=True)]
    assert max(grown) <= 50 * MIB, f"{max(grown) / MIB:.0f} MiB more"
    assert door.echo() < 5.0
    assert "Traceback" not in running.log.read_text()


@pytest.fixture
def half_open(node: Any) -> Iterator[None]:
    """Connections that have begun to say something."""
    _, door = node
    begun = b"\x16\x03\x01\x02\x00\x01" if door.context else request()[:60]
    with ExitStack() as stack:
        for _ in range(HALF_OPEN):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=30))
            sock.sendall(begun)
        yield


@pytest.mark.crash
@pytest.mark.timeout(300)
def test_five_hundred_half_open_connections_do_not_delay_a_c_echo(node: Any, half_open: None) -> None:
    _, door = node
    assert sorted(door.echo() for _ in range(9))[4] < 1.0
