"""Syslog to collectors: the wire by a strict reader, outages, and rsyslogd itself over TLS with certificates."""

import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest

from dicom_node.audit.chain import file_names
from dicom_node.audit.forward import Forwarder, read_place
from dicom_node.audit.syslog import TlsConnection, UdpConnection, syslog_message
from dicom_node.auditing import AuditEvent, AuditKind, Participant
from dicom_node.config import NodeConfig
from dicom_node.trails import collector

Make = Callable[..., AuditEvent]
WaitFor = Callable[..., None]
# RFC 5424 6: PRI VERSION TIMESTAMP HOSTNAME APP-NAME PROCID MSGID STRUCTURED-DATA BOM MSG
SYSLOG = re.compile(
    rb"<(8[45])>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00) ([\x21-\x7e]{1,255}) dicom-node - DICOM\+RFC3881 "
    rb'\[meta sequenceId="([1-9]\d{0,9})"\] \xef\xbb\xbf(<AuditMessage>.*</AuditMessage>)',
    re.S,
)


def frames(received: bytes) -> list[bytes]:
    """The SYSLOG-MSGs of a stream of RFC 5425; the last may not be whole yet."""
    found, position = [], 0
    while (match := re.compile(rb"([1-9]\d*) ").match(received, position)) is not None:
        start, end = match.end(), match.end() + int(match[1])
        if end > len(received):
            break
        found.append(received[start:end])
        position = end
    else:
        assert position == len(received), received[position : position + 40]
    return found


class Collector:
    """Takes connections over TLS and keeps what comes; `close` cuts all of them."""

    def __init__(self, context: ssl.SSLContext, port: int = 0) -> None:
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.streams: list[bytearray] = []
        self._open: list[ssl.SSLSocket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            with suppress(OSError):
                sock = self._context.wrap_socket(plain, server_side=True)
                self.streams.append(stream := bytearray())
                self._open.append(sock)
                threading.Thread(target=self._read, args=(sock, stream), daemon=True).start()

    @staticmethod
    def _read(sock: ssl.SSLSocket, stream: bytearray) -> None:
        with suppress(OSError):
            while received := sock.recv(65536):
                stream += received

    def sequences(self) -> list[int]:
        found = []
        for stream in self.streams:
            for frame in frames(bytes(stream)):
                match = SYSLOG.fullmatch(frame)
                assert match is not None, frame[:200]
                found.append(int(match[4]))
        return found

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._thread.join(5)


@pytest.fixture(scope="module")
def certificates(tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca, collector (for 127.0.0.1) and node: PEM pairs of one authority; `other-ca` is another's."""
    folder = tmp_path_factory.mktemp("certificates")
    openssl = tool("openssl")

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True, timeout=60)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other-ca"):
        run("req", "-x509", *new, "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("collector", "node"):
        run("req", *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san")
        run("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    for key in folder.glob("*.key"):
        key.chmod(0o600)
    return folder


@pytest.fixture
def server_context(certificates: Path) -> ssl.SSLContext:
    """A collector's: it asks for a certificate of the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "collector.pem", certificates / "collector.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.fixture
def forward(tmp_path: Path, certificates: Path) -> Iterator[Callable[..., Forwarder]]:
    """`forward(port, ca=...)`: send the trail to a collector as the node would; stopped at the end."""
    with ExitStack() as stack:

        def start(port: int, ca: str = "ca.pem", protocol: str = "tls", settle_s: float = 0.3) -> Forwarder:
            tls = {name: str(certificates / file) for name, file in (("certificate", "node.pem"), ("key", "node.key"))}
            one = {
                "host": "127.0.0.1",
                "port": port,
                "protocol": protocol,
                "tls": {**tls, "ca": str(certificates / ca)},
            }
            config = NodeConfig.model_validate({"audit": {"collectors": {"arr": one}}})
            assert config.audit is not None
            connect = collector(config, config.audit, "arr")
            made = Forwarder("arr", tmp_path / "audit", connect, settle_s=settle_s, backoff_s=0.1)
            stack.callback(made.stop)
            made.start()
            return made

        yield start


def record(open_trail: Callable[..., Any], event: Make, count: int) -> None:
    with open_trail(file_bytes=65536) as trail:
        for _ in range(count):
            trail.record(event())


def test_a_message_is_what_rfc_5424_says() -> None:
    message = b'<AuditMessage><EventIdentification EventOutcomeIndicator="0" /></AuditMessage>'
    found = SYSLOG.fullmatch(syslog_message(2**31, "2026-11-21T12:00:00.000+00:00", message, "node-1"))
    assert found is not None
    assert (found[1], found[3], found[4], found[5]) == (b"85", b"node-1", b"1", message)
    failed = message.replace(b'"0"', b'"4"')
    assert syslog_message(1, "t", failed, "n").startswith(b"<84>1 ")


def test_every_message_arrives_over_tls_in_order(
    forward: Callable[..., Forwarder],
    server_context: ssl.SSLContext,
    open_trail: Callable[..., Any],
    event: Make,
    wait_for: WaitFor,
    tmp_path: Path,
) -> None:
    record(open_trail, event, 300)
    there = Collector(server_context)
    sent = forward(there.port)
    wait_for(lambda: sent.sequence == 300, 30, "all to be settled")
    record(open_trail, event, 3)  # another process, meanwhile
    wait_for(lambda: sent.sequence == 303, 30, "the rest to be settled")
    assert there.sequences() == list(range(1, 304)) and sent.is_up
    sent.stop()
    assert read_place(tmp_path / "audit" / "position-arr.json").sequence == 303
    again = forward(there.port)
    wait_for(lambda: len(there.streams) == 2, 30, "the next connection")
    record(open_trail, event, 1)
    wait_for(lambda: again.sequence == 304, 30, "the last to be settled")
    assert there.sequences() == list(range(1, 305))  # none twice
    there.close()


def test_an_outage_of_the_collector_loses_nothing(
    forward: Callable[..., Forwarder],
    server_context: ssl.SSLContext,
    open_trail: Callable[..., Any],
    event: Make,
    wait_for: WaitFor,
) -> None:
    first = Collector(server_context)
    record(open_trail, event, 50)
    sent = forward(first.port, settle_s=0.5)
    wait_for(lambda: len(first.sequences()) == 50, 30, "the first to come")
    first.close()  # perhaps before anybody there has looked at them
    record(open_trail, event, 100)
    wait_for(lambda: not sent.is_up, 30, "the outage to be seen")
    second = Collector(server_context, first.port)
    wait_for(lambda: sent.sequence == 150, 30, "all to be settled")
    assert set(first.sequences()) | set(second.sequences()) == set(range(1, 151))
    assert sorted(second.sequences()) == second.sequences()
    second.close()


def test_a_collector_that_cannot_show_who_it_is_gets_nothing(
    forward: Callable[..., Forwarder],
    server_context: ssl.SSLContext,
    open_trail: Callable[..., Any],
    event: Make,
    wait_for: WaitFor,
) -> None:
    record(open_trail, event, 1)
    there = Collector(server_context)
    sent = forward(there.port, ca="other-ca.pem")
    wait_for(lambda: not sent.is_up, 30, "the refusal")
    assert there.sequences() == [] and sent.sequence == 0
    there.close()


def test_a_message_is_one_datagram_over_udp(
    forward: Callable[..., Forwarder],
    open_trail: Callable[..., Any],
    event: Make,
    wait_for: WaitFor,
    parsed: Callable[[bytes], Element],
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there, open_trail() as trail:
        there.bind(("127.0.0.1", 0))
        there.settimeout(20)
        trail.record(event())
        trail.record(event(kind=AuditKind.QUERY, query=bytes(1 << 20)))  # what does not fit is left out, not cut
        sent = forward(there.getsockname()[1], protocol="udp")
        for _ in range(2):
            found = SYSLOG.fullmatch(there.recv(65536))
            assert found is not None
            parsed(found[5])
        wait_for(lambda: sent.sequence == 2, 20, "both to be settled")


def test_datagrams_that_nobody_takes_are_sent_again(
    forward: Callable[..., Forwarder],
    free_port: Callable[[], int],
    open_trail: Callable[..., Any],
    event: Make,
    wait_for: WaitFor,
) -> None:
    port = free_port()
    record(open_trail, event, 1)
    sent = forward(port, protocol="udp")
    wait_for(lambda: not sent.is_up, 20, "ICMP to say that nobody is there")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", port))
        there.settimeout(20)
        assert SYSLOG.fullmatch(there.recv(65536))
        wait_for(lambda: sent.sequence == 1, 20, "it to be settled")


def test_files_that_went_before_they_were_sent_are_named_and_a_trail_begun_anew_is_sent(
    forward: Callable[..., Forwarder],
    open_trail: Callable[..., Any],
    event: Make,
    wait_for: WaitFor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "audit"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", 0))
        port = there.getsockname()[1]
        record(open_trail, event, 10)
        sent = forward(port, protocol="udp")
        wait_for(lambda: sent.sequence == 10, 20, "the first to be settled")
        sent.stop()
        record(open_trail, event, 100)
        record(open_trail, event, 1)  # in a file of its own
        first, *_, last = file_names(folder)
        (folder / first).unlink()
        sent = forward(port, protocol="udp")
        wait_for(lambda: sent.sequence == 111, 20, "the rest to be settled")
        (gone,) = [one for one in caplog.records if "moved away before" in one.message]
        assert (vars(gone)["first"], vars(gone)["last"]) == (11, int(last[6:18]) - 1)
        sent.stop()
        (folder / last).unlink()
        record(open_trail, event, 3)
        sent = forward(port, protocol="udp")
        wait_for(lambda: sent.sequence == 3, 20, "the new trail to be settled")


RSYSLOG = """
global(workDirectory="{folder}" maxMessageSize="64k" defaultNetstreamDriver="gtls"
       defaultNetstreamDriverCAFile="{certificates}/ca.pem"
       defaultNetstreamDriverCertFile="{certificates}/collector.pem"
       defaultNetstreamDriverKeyFile="{certificates}/collector.key")
module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="x509/certvalid")
module(load="imudp")
template(name="kept" type="string" string="%pri% %msgid% %structured-data% %msg%\\n")
input(type="imtcp" address="127.0.0.1" port="{port}")
input(type="imudp" address="127.0.0.1" port="{udp_port}")
action(type="omfile" file="{folder}/got" template="kept")
"""


def test_rsyslogd_gets_every_message_whole(
    tool: Callable[[str], str],
    free_port: Callable[[], int],
    forward: Callable[..., Forwarder],
    certificates: Path,
    open_trail: Callable[..., Any],
    event: Make,
    wait_for: WaitFor,
    parsed: Callable[[bytes], Element],
    tmp_path: Path,
) -> None:
    folder, port, udp_port = tmp_path / "rsyslog", free_port(), free_port()
    folder.mkdir()
    settings = folder / "rsyslog.conf"
    settings.write_text(RSYSLOG.format(folder=folder, certificates=certificates, port=port, udp_port=udp_port))
    hostile = Participant(ae_title="<&\"\n\x00'é患", host="192.0.2.1", is_requestor=True)
    with open_trail(max_message_bytes=32768) as trail:
        for _ in range(100):
            trail.record(event(participants=(hostile,)))
        trail.record(event(kind=AuditKind.QUERY, query=bytes(22_000)))
    words = [tool("rsyslogd"), "-n", "-f", str(settings), "-i", str(folder / "pid")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as rsyslogd:
        try:
            sent = forward(port)
            wait_for(lambda: sent.sequence == 101, 30, "all to be settled")
            got = folder / "got"
            wait_for(lambda: got.exists() and got.read_bytes().count(b"\n") == 101, 30, "rsyslogd to write them")
            lines = got.read_bytes().splitlines()
        finally:
            rsyslogd.terminate()
    for number, line in enumerate(lines, 1):
        found = re.fullmatch(rb'85 DICOM\+RFC3881 \[meta sequenceId="(\d+)"\] \s*(?:\xef\xbb\xbf)?(<A.*>)', line)
        assert found is not None, line[:200]
        assert int(found[1]) == number
        parsed(found[2])
    assert len(lines[-1]) > 29_000  # as large as PS3.15 A.6 asks for


def test_a_place_that_cannot_be_read_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "position-x.json"
    assert read_place(path).sequence == 0
    path.write_text(json.dumps({"file": "audit-000000000001.log", "offset": 5, "sequence": 1})[:20])
    assert read_place(path).sequence == 0


def test_connections_are_bounded_in_time(free_port: Callable[[], int], server_context: ssl.SSLContext) -> None:
    began = time.monotonic()
    with pytest.raises(OSError, match="refused"):
        TlsConnection("127.0.0.1", free_port(), ssl.create_default_context(), "localhost")
    assert time.monotonic() - began < 5
    UdpConnection("127.0.0.1", free_port()).close()
