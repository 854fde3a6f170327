"""DICOM over TLS: dcmtk as the foreign side both ways, and peers that behave badly in the handshake."""

import hashlib
import logging
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet

from dicom_node.config import DeliverySettings, NodeConfig
from dicom_node.dimse import credentials as credentials_module
from dicom_node.dimse import identification as identification_module
from dicom_node.dimse import lobby as lobby_module
from dicom_node.dimse import server as server_module
from dicom_node.dimse import tls as tls_module
from dicom_node.dimse import transport as transport_module
from dicom_node.dimse.commands import NO_DATA_SET
from dicom_node.dimse.committing import DimseCommitment
from dicom_node.dimse.files import get_study
from dicom_node.dimse.lobby import Lobby
from dicom_node.dimse.session import DimseSender
from dicom_node.dimse.tls import Credentials, check_tls, for_listener
from dicom_node.dimse.users import hash_passcode, user_line
from dicom_node.errors import ConfigError, DeliveryRefused, DeliveryUnavailable
from dicom_node.model import CommitmentRequest, Destination, ObjectReference, UserCredentials

EXPLICIT, VERIFICATION, CT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.1.2"
CONTEXTS = [(1, VERIFICATION, [EXPLICIT]), (3, CT, [EXPLICIT])]
STORE_RQ = {"CommandField": 1, "Priority": 0, "CommandDataSetType": 0, "AffectedSOPClassUID": CT}


@pytest.fixture
def wire() -> str:
    """pynetdicom's carries no TLS."""
    return "own"


class Authority:
    """A laboratory's certificate authority in a folder, by openssl."""

    def __init__(self, folder: Path, openssl: str) -> None:
        self.folder, self._openssl = folder, openssl
        folder.mkdir()
        self.ca, self._key = folder / "ca.pem", folder / "ca.key"
        self._run("req", "-x509", "-days", "2", "-subj", "/CN=Lab CA", *self._new(self._key), "-out", self.ca)

    def issue(self, name: str, *, days: int = 2, host: str = "IP:127.0.0.1,DNS:localhost") -> tuple[Path, Path]:
        """A certificate and its key (0600), for `host`; ended already with negative `days`."""
        certificate, key, request = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={host}\n")
        self._run("req", "-subj", f"/CN={name}", *self._new(key), "-out", request)
        self._run(
            *("x509", "-req", "-in", request, "-CA", self.ca, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", days, "-extfile", extensions, "-out", certificate),
        )
        key.chmod(0o600)
        return certificate, key

    def encrypted(self, key: Path, passphrase: str) -> Path:
        """That key under a passphrase."""
        path = key.with_suffix(".enc")
        self._run("ec", "-in", key, "-aes256", "-passout", f"pass:{passphrase}", "-out", path)
        path.chmod(0o600)
        return path

    def client(self, pair: tuple[Path, Path] | None) -> ssl.SSLContext:
        """What a peer with that certificate speaks with."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if pair is not None:
            context.load_cert_chain(*pair)
        return context

    @staticmethod
    def _new(key: Path) -> tuple[object, ...]:
        return ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", key)

    def _run(self, *words: object) -> None:
        subprocess.run([self._openssl, *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str], str]) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "lab", tool("openssl"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, tool: Callable[[str], str]) -> Authority:
    """An authority that the node does not know."""
    return Authority(tmp_path_factory.mktemp("tls") / "stranger", tool("openssl"))


@pytest.fixture(scope="module")
def pairs(authority: Authority) -> dict[str, tuple[Path, Path]]:
    return {name: authority.issue(name) for name in ("node", "client")}


@pytest.fixture
def settings(authority: Authority, pairs: dict[str, tuple[Path, Path]]) -> Callable[..., dict[str, Any]]:
    """`settings(**more)`: a `tls` block."""
    certificate, key = pairs["node"]
    return lambda **more: {"certificate": certificate, "key": key, "ca": authority.ca, **more}


@pytest.fixture
def secure(serve: Callable[..., Any], settings: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """`secure(**more)`: a server whose only DICOM port speaks TLS."""
    return lambda tls=None, **more: serve(tls=settings(**(tls or {})), **more)


@pytest.fixture
def tls_peer(raw_peer: Any, authority: Authority, pairs: dict[str, tuple[Path, Path]]) -> Callable[..., Any]:
    """`tls_peer(port)`: a byte-level peer over TLS."""

    def connect(port: int, context: ssl.SSLContext | None = None) -> Any:
        peer = raw_peer(port)
        context = context or authority.client(pairs["client"])
        peer.socket = context.wrap_socket(peer.socket, server_hostname="127.0.0.1")
        return peer

    return connect


@pytest.fixture
def plus_tls(authority: Authority, pairs: dict[str, tuple[Path, Path]]) -> Callable[..., tuple[object, ...]]:
    """`plus_tls("client")`: what dcmtk is told to speak TLS with that certificate."""

    def words(name: str = "client") -> tuple[object, ...]:
        certificate, key = pairs[name]
        return ("+tls", key, certificate, "+cf", authority.ca)

    return words


def echo_works(peer: Any, message_id: int = 1) -> bool:
    """One C-ECHO."""
    peer.send_command(
        1, CommandField=0x30, MessageID=message_id, CommandDataSetType=NO_DATA_SET, AffectedSOPClassUID=VERIFICATION
    )
    answer = peer.read_command()
    return (answer.Status, answer.MessageIDBeingRespondedTo) == (0, message_id)


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why TLS failed, as logged."""
    return [record.__dict__["reason"] for record in caplog.records if record.message == "TLS failed"]


# --- with dcmtk


@pytest.mark.parametrize(
    ("profile", "spoken"),
    [
        *(("bcp195", spoken) for spoken in ("+px", "+py", "+pz")),
        *(("bcp195-non-downgrading", "+py"), ("bcp195-extended", "+px"), ("bcp195-extended", "+pz")),
    ],
)
def test_dcmtk_echoes_in_every_profile(
    secure: Callable[..., Any], dcmtk: Callable[..., Any], plus_tls: Any, profile: str, spoken: str
) -> None:
    node = secure({"profile": profile})
    dcmtk("echoscu", *plus_tls(), spoken, "-aec", "DICOM_NODE", "127.0.0.1", node.port)
    node.counted.wait_for(lambda c: c.ended)
    assert node.counted.ended[0][1] == "released"


def test_dcmtk_stores_finds_and_gets_large_objects_byte_for_byte(
    secure: Callable[..., Any],
    dcmtk: Callable[..., Any],
    plus_tls: Any,
    make_file: Callable[..., Path],
    data_set_bytes: Callable[[Path], bytes],
    authority: Authority,
    pairs: dict[str, tuple[Path, Path]],
    called: Callable[..., Destination],
    tmp_path: Path,
) -> None:
    node = secure()
    study = {"StudyInstanceUID": "1.2.3.4", "SeriesInstanceUID": "1.2.3.4.5"}
    paths = [make_file(pixels=pixels, **study) for pixels in (16, 512, 3000)]
    call = (*plus_tls(), "-aec", "DICOM_NODE")
    dcmtk("storescu", *call, "127.0.0.1", node.port, *paths)
    for path in paths:
        stored = node.catalog.index.instance(path.stem)
        assert Path(stored.path).read_bytes()[stored.data_set_offset :] == data_set_bytes(path)

    query = ("-S", "-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3.4")
    found = dcmtk("findscu", "-v", *call, *query, "-k", "PatientID", "127.0.0.1", node.port)
    assert "[P1]" in found.stdout

    sent = {data_set_bytes(path) for path in paths}
    assert set(retrieved(node.port, authority.client(pairs["client"]), "1.2.3.4")) == sent
    fetched = get_study(
        called(node.port), "1.2.3.4", tmp_path / "got", settings=DeliverySettings(), calling_ae_title="CALLER"
    )
    assert {data_set_bytes(path) for path in fetched.files} == sent


def retrieved(port: int, context: ssl.SSLContext, study: str) -> list[bytes]:
    """The data sets of a study by C-GET, with pynetdicom: dcmtk's getscu speaks no TLS."""
    received: list[bytes] = []

    def store(event: Any) -> int:
        received.append(event.request.DataSet.getvalue())
        return 0

    entity, query = AE(), Dataset()
    entity.add_requested_context(StudyRootQueryRetrieveInformationModelGet, EXPLICIT)
    entity.add_requested_context(CT, EXPLICIT)
    query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", study
    association = entity.associate(
        *("127.0.0.1", port),
        ae_title="DICOM_NODE",
        ext_neg=[build_role(CT, scp_role=True)],
        evt_handlers=[(evt.EVT_C_STORE, store)],
        tls_args=(context, "127.0.0.1"),
    )
    assert association.is_established
    statuses = [status.Status for status, _ in association.send_c_get(query, StudyRootQueryRetrieveInformationModelGet)]
    association.release()
    assert statuses[-1] == 0
    return received


@pytest.fixture
def sink(
    tool: Callable[[str], str], free_port: Callable[[], int], plus_tls: Any, tmp_path: Path
) -> Iterator[tuple[int, Path]]:
    """A storescp that speaks TLS and asks for a certificate: its port and its folder."""
    port, folder = free_port(), tmp_path / "sink"
    folder.mkdir()
    words = [tool("storescp"), *plus_tls("node"), "+B", "-od", folder, port]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10.0
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "storescp does not listen"
                time.sleep(0.02)
        yield port, folder
    finally:
        process.kill()
        process.wait()


def test_c_move_goes_to_a_destination_over_tls(
    serve: Callable[..., Any],
    settings: Callable[..., dict[str, Any]],
    dcmtk: Callable[..., Any],
    plus_tls: Any,
    sink: tuple[int, Path],
    make_file: Callable[..., Path],
    data_set_bytes: Callable[[Path], bytes],
) -> None:
    port, folder = sink
    destination = {"ae_title": "SINK", "host": "127.0.0.1", "port": port, "tls": True}
    node = serve(tls=settings(port=0), destinations={"sink": destination})
    paths = [make_file(pixels=pixels, StudyInstanceUID="1.2.3.4") for pixels in (16, 1500)]
    call = (*plus_tls(), "-aec", "DICOM_NODE")
    dcmtk("storescu", *call, "127.0.0.1", node.server.tls_port, *paths)
    query = (
        "-S",
        "-aec",
        "DICOM_NODE",
        "-aem",
        "SINK",
        "-k",
        "QueryRetrieveLevel=STUDY",
        "-k",
        "StudyInstanceUID=1.2.3.4",
    )
    dcmtk("movescu", *query, "127.0.0.1", node.port)  # which speaks no TLS
    assert {data_set_bytes(path) for path in folder.iterdir()} == {data_set_bytes(path) for path in paths}


# --- the node as the one who calls


def calls(destination: Destination) -> int:
    """C-ECHO as the courier would connect."""
    settings = DeliverySettings(connect_timeout_s=1.0, response_timeout_s=5.0)
    return DimseSender(settings, "CALLER").echo(destination)


@pytest.fixture
def called(authority: Authority, pairs: dict[str, tuple[Path, Path]]) -> Callable[..., Destination]:
    """`called(port, **tls)`: a destination with those TLS settings."""

    def make(port: int, **tls: Any) -> Destination:
        certificate, key = pairs["client"]
        settings = {"certificate": certificate, "key": key, "ca": authority.ca, **tls}
        entry = {"ae_title": "DICOM_NODE", "host": "127.0.0.1", "port": port, "tls": settings}
        return NodeConfig.model_validate({"destinations": {"it": entry}}).destination("it")

    return make


def test_the_node_calls_over_tls_and_verifies_who_answers(
    secure: Callable[..., Any],
    called: Callable[..., Destination],
    stranger: Authority,
    authority: Authority,
) -> None:
    node = secure()
    assert calls(called(node.port)) == 0
    assert calls(called(node.port, server_name="localhost")) == 0
    with pytest.raises(DeliveryUnavailable, match=r"TLS: certificate verify failed: (self-signed|unable to get)"):
        calls(called(node.port, ca=stranger.ca))
    with pytest.raises(DeliveryUnavailable, match=r"TLS: certificate verify failed: .*mismatch"):
        calls(called(node.port, server_name="pacs.example"))
    certificate, key = authority.issue("past-node", days=-1)
    late = secure({"certificate": certificate, "key": key})
    with pytest.raises(DeliveryUnavailable, match="TLS: certificate verify failed: certificate has expired"):
        calls(called(late.port))
    with pytest.raises(DeliveryUnavailable, match="TLS: the peer refused: certificate required"):
        calls(called(node.port, certificate=None, key=None))


def test_a_plain_or_silent_server_ends_the_handshake_of_the_node_soon(
    serve: Callable[..., Any], called: Callable[..., Destination]
) -> None:
    plain = serve()
    with pytest.raises(DeliveryUnavailable, match="TLS: "):
        calls(called(plain.port))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        with pytest.raises(DeliveryUnavailable, match="TLS: "):
            calls(called(silent.getsockname()[1]))
        assert 0.5 < time.monotonic() - began < 3.0


def test_what_was_committed_to_is_reported_over_tls(authority: Authority, pairs: dict[str, tuple[Path, Path]]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pairs["client"])
    context.load_verify_locations(authority.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    reports: list[str] = []

    def told(event: Any) -> tuple[int, None]:
        reports.append(str(event.event_information.TransactionUID))
        return 0x0000, None

    modality = AE("CT1")
    modality.add_supported_context("1.2.840.10008.1.20.1", [EXPLICIT], scu_role=True, scp_role=True)
    server = modality.start_server(
        ("127.0.0.1", 0), block=False, ssl_context=context, evt_handlers=[(evt.EVT_N_EVENT_REPORT, told)]
    )
    try:
        certificate, key = pairs["node"]
        peer = {"ae_title": "CT1", "storage_commitment": True, "report_host": "127.0.0.1"}
        peer |= {"report_port": server.server_address[1], "report_tls": True}
        own = {"certificate": certificate, "key": key, "ca": authority.ca}
        config = NodeConfig.model_validate({"tls": own, "peers": {"ct": peer}})
        request = CommitmentRequest(
            id=1,
            round=1,
            calling_ae_title="CT1",
            called_ae_title="DICOM_NODE",
            transaction_uid="1.2.3",
            references=(ObjectReference(sop_class_uid=CT, sop_instance_uid="1.2.3.4"),),
            reasons=(0,),
        )
        DimseCommitment(config.delivery, "DICOM_NODE").report(config.committed_to()["CT1"], request)
    finally:
        server.shutdown()
    assert reports == ["1.2.3"]


# --- who is let in


def test_a_client_without_a_certificate_of_the_authority_is_refused_and_told_in_the_log(
    secure: Callable[..., Any],
    tls_peer: Any,
    authority: Authority,
    stranger: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = secure()
    known = (None, stranger.issue("foreign"), authority.issue("past-client", days=-1))
    for pair in known:
        context = authority.client(pair)
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):  # TLS 1.3 tells after the handshake
            peer = tls_peer(node.port, context)
            assert peer.associate(CONTEXTS)[0] == 2
    node.counted.wait_for(lambda c: len(c.rejected) == 3)
    assert node.counted.rejected == ["tls"] * 3
    told = reasons(caplog)
    assert told[0] == "peer did not return a certificate"
    assert "unable to get local issuer certificate" in told[1] and "certificate has expired" in told[2]


def test_without_client_auth_no_certificate_is_asked_for(
    secure: Callable[..., Any], tls_peer: Any, authority: Authority
) -> None:
    node = secure({"client_auth": "none", "ca": None})
    peer = tls_peer(node.port, authority.client(None))
    assert peer.associate(CONTEXTS)[0] == 2 and echo_works(peer)


def test_nothing_below_tls_1_2_and_no_weak_suite_is_spoken(
    secure: Callable[..., Any],
    tool: Callable[[str], str],
    authority: Authority,
    pairs: dict[str, tuple[Path, Path]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def offers(port: int, *words: object) -> str:
        certificate, key = pairs["client"]
        known = ("-CAfile", authority.ca, "-cert", certificate, "-key", key)
        asked = [tool("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", *known, *words]
        done = subprocess.run(
            list(map(str, asked)), check=False, text=True, input="", capture_output=True, timeout=20, errors="replace"
        )
        return done.stdout + done.stderr

    node, strict = secure(), secure({"profile": "bcp195-extended"})
    for old in ("-tls1", "-tls1_1"):
        assert "Cipher is (NONE)" in offers(node.port, old, "-cipher", "ALL:@SECLEVEL=0")
    assert "unsupported protocol" in reasons(caplog)
    for suite in ("AES256-GCM-SHA384", "ECDHE-ECDSA-AES256-SHA384"):  # no forward secrecy, no authenticated encryption
        assert "Cipher is (NONE)" in offers(node.port, "-tls1_2", "-cipher", suite)
    small, large = "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384"
    assert f"Cipher is {small}" in offers(node.port, "-tls1_2", "-cipher", small)
    assert f"Cipher is {large}" in offers(strict.port, "-tls1_2", "-cipher", large)
    assert "Cipher is (NONE)" in offers(strict.port, "-tls1_2", "-cipher", small)
    assert "TLSv1.3" in offers(node.port)


def test_a_peer_bound_to_its_certificate_comes_with_that_one_only(
    secure: Callable[..., Any],
    tls_peer: Any,
    authority: Authority,
    pairs: dict[str, tuple[Path, Path]],
) -> None:
    der = ssl.PEM_cert_to_DER_cert(pairs["client"][0].read_text())
    digest = hashlib.sha256(der).hexdigest().upper()
    colons = ":".join(digest[at : at + 2] for at in range(0, 64, 2))
    node = secure(peers={"ct": {"ae_title": "TEST", "certificates": [colons]}, "mr": {"ae_title": "MR"}})
    assert tls_peer(node.port).associate(CONTEXTS)[0] == 2
    other = authority.client(authority.issue("other"))
    assert tls_peer(node.port, other).associate(CONTEXTS) == (3, b"\0\1\1\3")
    assert tls_peer(node.port, other).associate(CONTEXTS, calling="MR")[0] == 2
    assert node.counted.rejected == ["certificate"]


def test_a_user_proves_who_he_is_over_tls_and_not_in_clear(
    serve: Callable[..., Any],
    settings: Callable[..., dict[str, Any]],
    dcmtk: Callable[..., Any],
    plus_tls: Any,
    make_file: Callable[..., Path],
    called: Callable[..., Destination],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As from another machine: nothing here is loopback."""
    for module in (identification_module, credentials_module):
        monkeypatch.setattr(module, "is_loopback", lambda host: False)
    users = tmp_path / "users"
    users.write_text(f"{user_line('anna', hash_passcode(b'correct horse'))}\n")
    users.chmod(0o600)
    node = serve(tls=settings(port=0), user_identity={"users_file": users, "mode": "required"})

    def store(passcode: str, port: int, *tls: object) -> bool:
        who = ("-usr", "anna", "-pwd", passcode, "-rsp")
        done = dcmtk("storescu", *tls, *who, "-aec", "DICOM_NODE", "127.0.0.1", port, make_file(), check=False)
        return int(done.returncode) == 0

    assert store("correct horse", node.server.tls_port, *plus_tls())
    assert not store("wrong", node.server.tls_port, *plus_tls())
    assert not store("correct horse", node.port), "the same passcode, in clear"
    assert node.counted.rejected == ["user", "user"]

    monkeypatch.setenv("PACS_PASSCODE", "correct horse")
    user = UserCredentials(name="anna", passcode_env="PACS_PASSCODE")
    assert calls(replace(called(node.server.tls_port), user=user)) == 0
    with pytest.raises(DeliveryRefused, match="1,1,1"):
        calls(called(node.server.tls_port))
    with pytest.raises(DeliveryUnavailable, match="in clear; use TLS"):
        calls(replace(called(node.port), tls=None, user=user))


def test_plain_and_tls_have_a_port_each(
    serve: Callable[..., Any], settings: Callable[..., dict[str, Any]], raw_peer: Any, tls_peer: Any
) -> None:
    node = serve(tls=settings(port=0))
    assert node.server.tls_port not in (0, node.port)
    for peer in (raw_peer(node.port), tls_peer(node.server.tls_port)):
        assert peer.associate(CONTEXTS)[0] == 2 and echo_works(peer)


def test_whoever_takes_the_wrong_port_is_closed_at_once_and_told_in_the_log(
    serve: Callable[..., Any],
    settings: Callable[..., dict[str, Any]],
    raw_peer: Any,
    tls_peer: Any,
    caplog: pytest.LogCaptureFixture,
    wait_for: Callable[..., None],
) -> None:
    node = serve(tls=settings(port=0))
    began = time.monotonic()
    plain = raw_peer(node.server.tls_port)
    kind, _ = plain.associate(CONTEXTS)
    assert kind in (0, 0x15)  # closed, maybe after a TLS alert
    with pytest.raises((ssl.SSLError, ConnectionError)):
        tls_peer(node.port)
    assert time.monotonic() - began < 2.0
    node.counted.wait_for(lambda c: c.rejected == ["tls"])
    assert reasons(caplog)
    # the other thread may tell after the peer has seen its connection closed
    wait_for(lambda: "the peer broke the protocol" in caplog.messages, 20, "the one in clear to be told")


# --- handshakes that take their time


def test_a_handshake_that_is_not_finished_holds_no_thread_and_is_closed(
    secure: Callable[..., Any], raw_peer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node = secure(bounds={"first_pdu_s": 1.0})
    lobby, hello = node.server._lobby, client_hello()
    keep, returned = lobby.keep, []
    monkeypatch.setattr(lobby, "keep", lambda visit, deadline: (returned.append(visit), keep(visit, deadline)))
    peer, began = raw_peer(node.port), time.monotonic()
    with pytest.raises((ConnectionError, AssertionError)):
        for at in range(200):  # a byte at a time
            peer.socket.sendall(hello[at : at + 1])
            time.sleep(0.02)
        assert peer.read_pdu() != (0, b"")
    assert time.monotonic() - began < 5.0
    assert returned, "a thread was with it from its first byte to its end"
    node.counted.wait_for(lambda c: c.rejected == ["tls"])
    assert reasons(caplog) == ["the handshake, or the first request, did not come to its end"]


def test_two_hundred_half_open_handshakes_hold_no_thread_and_delay_no_echo(
    secure: Callable[..., Any],
    raw_peer: Any,
    tls_peer: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., None],
    begun_threads: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(lobby_module, "SPARE_S", 0.2)
    node = secure(bounds={"first_pdu_s": 120.0})  # none is closed while this is looked at
    lobby, threads, hello = node.server._lobby, len(begun_threads()), client_hello()
    for number in range(200):
        raw_peer(node.port).socket.sendall(hello if number % 2 else hello[:20])
    began = time.monotonic()
    peer = tls_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2 and echo_works(peer)
    assert time.monotonic() - began < 1.0
    wait_for(lambda: half_open(lobby) == 200, 20.0, "each half to be heard, and given back")
    wait_for(lambda: len(begun_threads()) <= threads, 20.0, "threads begun for the moment to end")


def half_open(lobby: Lobby) -> int:
    """How many wait in the middle of their handshake."""
    with lobby._guard:
        return sum(visit.stream is not None and visit.stream.has_begun for visit in lobby._silent.values())


def client_hello() -> bytes:
    """The first bytes of a client."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


# --- associations


def test_a_parked_association_goes_on_over_tls(
    secure: Callable[..., Any],
    tls_peer: Any,
    make_file: Callable[..., Path],
    data_set_bytes: Any,
    wait_for: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "PATIENCE_S", 0.05)
    node, path = secure(), make_file(pixels=700)
    peer = tls_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2

    def parked() -> None:
        wait_for(lambda: len(node.server._lobby._parked) == 1, 5.0, "the association to be parked")

    parked()
    peer.send_command(3, data_set_bytes(path), **STORE_RQ, MessageID=1, AffectedSOPInstanceUID=path.stem)
    assert peer.read_command().Status == 0
    parked()
    assert echo_works(peer, 2)
    parked()
    peer.send_pdu(5, bytes(4))
    assert peer.read_pdu() == (6, bytes(4))
    assert peer.socket.recv(1) == b""  # with a close_notify: without one `ssl` raises
    node.counted.wait_for(lambda c: c.ended == [("TEST", "released")])
    stored = node.catalog.index.instance(path.stem)
    assert Path(stored.path).read_bytes()[stored.data_set_offset :] == data_set_bytes(path)


def test_many_messages_in_one_record_and_one_message_in_many_records_are_served(
    secure: Callable[..., Any], tls_peer: Any
) -> None:
    node = secure()
    peer = tls_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2
    sealed, sent = peer.socket, bytearray()

    class Gathering:
        sendall = staticmethod(sent.extend)

    peer.socket = Gathering()
    for number in range(1, 101):
        peer.send_command(
            1, CommandField=0x30, MessageID=number, CommandDataSetType=NO_DATA_SET, AffectedSOPClassUID=VERIFICATION
        )
    peer.socket = sealed
    sealed.sendall(bytes(sent))  # 8 KB: one record, all of it read at once
    assert [peer.read_command().MessageIDBeingRespondedTo for _ in range(100)] == list(range(1, 101))
    for at in range(0, len(sent) // 100, 7):
        sealed.sendall(bytes(sent[at : min(at + 7, len(sent) // 100)]))
    assert peer.read_command().MessageIDBeingRespondedTo == 1


def test_half_a_record_keeps_to_the_deadline_of_its_pdu(
    secure: Callable[..., Any], tls_peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "LINGER_S", 0.1)  # what comes after our A-ABORT is read this long
    node = secure(bounds={"pdu_s": 1.0})
    peer = tls_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2
    peer.socket.sendall(b"\4\0\0\0\0\x40")  # the head of a PDU, then a record that comes by drops and never ends
    fd, began = peer.socket.detach(), time.monotonic()
    with socket.socket(fileno=fd) as bare, pytest.raises(ConnectionError):
        bare.sendall(b"\x17\3\3\x40\0")
        while time.monotonic() - began < 15.0:  # the deadline of a PDU is 20 s where nobody shortens it
            bare.sendall(b"x")
            time.sleep(0.05)
    node.counted.wait_for(lambda c: c.ended == [("TEST", "aborted")])


def test_a_record_that_was_tampered_with_ends_the_association(
    secure: Callable[..., Any], tls_peer: Any, wait_for: Callable[..., None]
) -> None:
    node = secure()
    peer = tls_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2
    with socket.socket(fileno=peer.socket.detach()) as bare:
        bare.sendall(b"\x17\3\3\0\x20" + os.urandom(32))
        node.counted.wait_for(lambda c: c.ended == [("TEST", "aborted")])


def test_an_idle_association_is_aborted_over_tls_and_counts_as_released(
    secure: Callable[..., Any], tls_peer: Any
) -> None:
    node = secure(association_idle_timeout_s=0.6)
    peer = tls_peer(node.port)
    assert peer.associate(CONTEXTS)[0] == 2
    assert peer.read_pdu()[0] == 7
    peer.socket.unwrap().close()  # a close_notify is nothing that was sent
    node.counted.wait_for(lambda c: c.ended == [("TEST", "released")])


def test_a_node_that_stops_tells_associations_over_tls(secure: Callable[..., Any], tls_peer: Any) -> None:
    node = secure()
    peers = [tls_peer(node.port) for _ in range(5)]
    for peer in peers:
        assert peer.associate(CONTEXTS)[0] == 2
    node.server.stop(5.0)
    assert [peer.read_pdu()[0] for peer in peers] == [7] * 5


def test_a_peer_that_asks_for_renegotiation_is_refused(
    secure: Callable[..., Any], tool: Callable[[str], str], authority: Authority, pairs: dict[str, tuple[Path, Path]]
) -> None:
    node, (certificate, key) = secure(), pairs["client"]
    known = ("-CAfile", authority.ca, "-cert", certificate, "-key", key)
    words = [tool("openssl"), "s_client", "-connect", f"127.0.0.1:{node.port}", "-tls1_2", *known]
    with subprocess.Popen(
        list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as client:
        assert client.stdin is not None and client.stdout is not None
        seen: list[str] = []
        while "Extended master secret" not in (line := client.stdout.readline()):  # the last line about the session
            seen.append(line)
            assert line, seen
        client.stdin.write("R\n")
        client.stdin.flush()
        seen.append(client.stdout.read())
        assert client.wait(10) != 0
    assert "no renegotiation" in "".join(seen)


# --- files


def test_new_files_are_in_force_without_a_restart_and_associations_go_on(
    secure: Callable[..., Any],
    tls_peer: Any,
    authority: Authority,
    tmp_path: Path,
    wait_for: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(server_module, "TOUCH_S", 0.05)
    caplog.set_level(logging.INFO)
    certificate, key = tmp_path / "node.pem", tmp_path / "node.key"

    def put(pair: tuple[Path, Path]) -> None:
        for source, target in zip(pair, (certificate, key), strict=True):
            fresh = target.with_suffix(".new")
            fresh.write_bytes(source.read_bytes())
            fresh.chmod(0o600)
            fresh.replace(target)

    def shown() -> bytes:
        peer = tls_peer(node.port)
        return bytes(peer.socket.getpeercert(binary_form=True))

    put(authority.issue("first"))
    node = secure({"certificate": certificate, "key": key})
    old, before = tls_peer(node.port), shown()
    assert old.associate(CONTEXTS)[0] == 2
    put(authority.issue("second", days=9))
    wait_for(lambda: shown() != before, 5.0, "the new certificate")
    ends = node.server.certificate_ends
    assert 8 * 86400 < ends - time.time() < 10 * 86400
    assert echo_works(old)

    second = shown()
    certificate.write_text("no certificate")
    wait_for(lambda: "changed TLS files cannot be used; the old ones stay" in caplog.messages, 5.0, "the log line")
    assert shown() == second and node.server.certificate_ends == ends
    assert echo_works(old, 2)


def test_a_certificate_that_ends_soon_is_told_once_a_day(
    authority: Authority,
    settings: Callable[..., dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(days: int) -> list[str]:
        caplog.clear()
        certificate, key = authority.issue("ends", days=days)
        of = NodeConfig.model_validate({"tls": settings(certificate=certificate, key=key)}).tls
        assert of is not None
        credentials: Credentials = for_listener(of)
        credentials.look()
        expected = time.time() + days * 86400
        assert abs(credentials.not_after - expected) < 120
        return caplog.messages

    assert told(40) == []
    assert told(20) == ["a TLS certificate ends soon: replace its files"]
    assert told(-1) == ["a TLS certificate has ended: replace its files"]


def test_a_key_that_others_may_read_is_refused_with_the_remedy(
    authority: Authority, settings: Callable[..., dict[str, Any]]
) -> None:
    certificate, key = authority.issue("open")
    config = NodeConfig.model_validate({"tls": settings(certificate=certificate, key=key)})
    for mode in (0o600, 0o640, 0o400):
        key.chmod(mode)
        check_tls(config)
    for mode in (0o644, 0o660, 0o700):
        key.chmod(mode)
        with pytest.raises(ConfigError, match=rf"tls.key: .* has mode {mode:04o}, expected 0600 or 0640: run `chmod"):
            check_tls(config)
    key.unlink()
    with pytest.raises(ConfigError, match=r"tls.key: .* cannot be read"):
        check_tls(config)


def test_the_files_for_an_audit_collector_are_looked_at_too(
    authority: Authority, settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    collector: dict[str, Any] = {"host": "192.0.2.1", "tls": {"ca": str(tmp_path / "nowhere.pem")}}
    block = {"tls": settings(), "audit": {"collectors": {"arr": collector}}}
    with pytest.raises(ConfigError, match=r"audit.collectors.arr.tls.ca: .*nowhere.pem"):
        check_tls(NodeConfig.model_validate(block))
    check_tls(NodeConfig.model_validate({**block, "audit": {"collectors": {"arr": {**collector, "tls": {}}}}}))
    check_tls(NodeConfig.model_validate({**block, "audit": {"collectors": {"arr": {**collector, "protocol": "udp"}}}}))


def test_a_passphrase_comes_from_a_variable_or_a_file(
    authority: Authority,
    settings: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate, key = authority.issue("locked")
    locked = authority.encrypted(key, "open sesame")

    def check(**more: Any) -> None:
        check_tls(NodeConfig.model_validate({"tls": settings(certificate=certificate, key=locked, **more)}))

    with pytest.raises(ConfigError, match=r"tls.key: it is encrypted; set key_passphrase_file"):
        check()
    with pytest.raises(ConfigError, match="the variable LAB_PASSPHRASE is not set"):
        check(key_passphrase_env="LAB_PASSPHRASE")
    monkeypatch.setenv("LAB_PASSPHRASE", "open sesame")
    check(key_passphrase_env="LAB_PASSPHRASE")
    (file := tmp_path / "passphrase").write_text("open sesame\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"tls.key_passphrase_file: .* has mode 0644"):
        check(key_passphrase_file=file)
    file.chmod(0o600)
    check(key_passphrase_file=file)
    file.write_text("not it")
    with pytest.raises(ConfigError, match="make no pair") as caught:
        check(key_passphrase_file=file)
    assert "not it" not in str(caught.value)


def test_files_that_are_no_pair_or_no_certificate_are_named(
    authority: Authority, settings: Callable[..., dict[str, Any]], pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    (nothing := tmp_path / "nothing.pem").write_text("nothing")
    for more, message in (
        ({"key": pairs["client"][1]}, "tls: .* make no pair"),
        ({"ca": nothing}, "tls.ca: .* holds no certificate"),
        ({"certificate": tmp_path / "none.pem"}, "tls.certificate: .*none.pem cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_tls(NodeConfig.model_validate({"tls": settings(**more)}))


@pytest.mark.parametrize(
    "text", [b"", b"\x30", b"\x30\x82\xff\xff", b"\x30\x03\x02\x01\x01", b"\x30\x04\x30\x02\xa0\x05"]
)
def test_what_is_no_certificate_is_none_whatever_its_bytes(text: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        tls_module._not_after(text)
