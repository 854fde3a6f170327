"""User Identity Negotiation: who says who he is, and who proves it; dcmtk's clients on both wires."""

import argparse
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from dicom_node import cli, transfers
from dicom_node.auditing import AuditEvent, AuditKind, NoAuditTrail
from dicom_node.config import EngineSettings, JwtSettings, NodeConfig, UserIdentitySettings
from dicom_node.dimse import identification as identification_module
from dicom_node.dimse import users as users_module
from dicom_node.dimse.identification import Identification, Identified, Unidentified
from dicom_node.dimse.policy import Policy
from dicom_node.dimse.session import DimseSender
from dicom_node.dimse.tokens import Tokens
from dicom_node.dimse.upper_layer.pdus import UserIdentity
from dicom_node.dimse.users import UsersFile, hash_passcode, user_line
from dicom_node.dimse.wires import open_link
from dicom_node.engines.dicom_engine import DicomEngine
from dicom_node.errors import ConfigError, DeliveryRefused, DeliveryUnavailable, EngineUnavailable
from dicom_node.model import Destination, UserCredentials

VERIFICATION = (1, "1.2.840.10008.1.1", ["1.2.840.10008.1.2"])
NOT_IDENTIFIED, TOO_OFTEN = (3, b"\0\1\1\1"), (3, b"\0\2\3\1")
SECRET = "correct horse"
ISSUER, AUDIENCE = "https://login.example", "dicom-node"


@pytest.fixture(scope="session", autouse=True)
def _cheap() -> Any:
    """What a passcode costs is not what is tested."""
    patch = pytest.MonkeyPatch()
    patch.setattr(users_module, "_N", 2**14)
    patch.setattr(users_module, "_P", 1)
    yield
    patch.undo()


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    path = tmp_path / "users"
    path.write_text(f"# who may\n\n{user_line('anna', hash_passcode(SECRET.encode()))}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def signer() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def public(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def token(key: Any, algorithm: str = "ES256", headers: Any = None, **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "anna", "exp": time.time() + 300, **changes}
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers=headers)


@pytest.fixture
def with_tokens(tmp_path: Path, signer: Any) -> dict[str, Any]:
    """A `jwt` block."""
    path = tmp_path / "issuer.pem"
    path.write_bytes(public(signer))
    return {"algorithms": ["ES256"], "issuer": ISSUER, "audience": AUDIENCE, "key": path}


class Trail:
    """An audit trail that is a list."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    def record(self, event: AuditEvent) -> None:
        self.events.append(event)

    def settled(self, timeout_s: float = 5.0) -> bool:
        return True


def item(kind: int, primary: bytes, secondary: bytes = b"", response: int = 0) -> bytes:
    body = struct.pack(">BBH", kind, response, len(primary)) + primary
    body += struct.pack(">H", len(secondary)) + secondary
    return struct.pack(">BxH", 0x58, len(body)) + body


# --- on the wire


def test_dcmtk_comes_with_name_and_passcode(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    make_file: Callable[..., Path],
    users_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trail = Trail()
    node = serve(audit=trail, user_identity={"users_file": users_file, "mode": "required"})

    def store(*words: str) -> Any:
        return dcmtk(
            "storescu",
            "-v",
            *words,
            "-aet",
            "CT1",
            "-aec",
            "DICOM_NODE",
            "127.0.0.1",
            node.port,
            make_file(),
            check=False,
        )

    assert store("-usr", "anna", "-pwd", SECRET).returncode == 0
    assert store("-usr", "anna", "-pwd", SECRET, "-rsp").returncode == 0, "a positive response, when it is asked for"
    for words in (("-usr", "anna", "-pwd", "wrong"), ("-usr", "nobody", "-pwd", SECRET), ("-usr", "anna"), ()):
        refused = store(*words)
        assert refused.returncode != 0 and "Rejected Permanent" in refused.stdout, refused.stdout
    assert node.counted.rejected == ["user"] * 4
    node.counted.wait_for(lambda c: len(c.ended) == 2)
    about = [one for one in trail.events if one.kind in (AuditKind.USER_AUTHENTICATED, AuditKind.SECURITY_ALERT)]
    kinds = [event.kind for event in about]
    assert kinds == [AuditKind.USER_AUTHENTICATED] * 5 + [AuditKind.SECURITY_ALERT]
    assert [event.participants[0].user for event in about][:4] == ["anna", "anna", "anna", "nobody"]
    transfers = [event for event in trail.events if event not in about]
    assert {event.kind for event in transfers} == {AuditKind.TRANSFER_BEGUN, AuditKind.TRANSFERRED}
    assert {event.participants[0].user for event in transfers} == {"anna"}, "what was sent was sent by somebody"
    logged = " ".join(str(vars(record)) for record in caplog.records)
    assert "nobody" not in logged and "anna" not in logged and SECRET not in logged and "wrong" not in logged


def test_dcmtk_comes_with_a_token(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    make_file: Callable[..., Path],
    with_tokens: Any,
    signer: Any,
    tmp_path: Path,
) -> None:
    node = serve(user_identity={"kinds": ["jwt"], "jwt": with_tokens, "mode": "required"})

    def store(text: str) -> int:
        path = tmp_path / "token"
        path.write_text(text)
        done = dcmtk(
            *("storescu", "--jwt", path, "-rsp", "-aec", "DICOM_NODE", "127.0.0.1", node.port, make_file()), check=False
        )
        return int(done.returncode)

    assert store(token(signer)) == 0
    assert store(token(signer, exp=time.time() - 60)) != 0
    assert store(token(ec.generate_private_key(ec.SECP256R1()))) != 0
    assert node.counted.rejected == ["user", "user"]


@pytest.mark.parametrize(("flag", "what"), [("-kt", "a Kerberos ticket"), ("--saml", "a SAML assertion")])
def test_what_cannot_be_verified_here_is_refused_and_the_log_says_so(
    serve: Callable[..., Any],
    dcmtk: Callable[..., Any],
    make_file: Callable[..., Path],
    users_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    flag: str,
    what: str,
) -> None:
    node = serve(user_identity={"users_file": users_file})
    ticket = tmp_path / "ticket"
    ticket.write_bytes(b"ticket")
    done = dcmtk(*("storescu", flag, ticket, "-aec", "DICOM_NODE", "127.0.0.1", node.port, make_file()), check=False)
    assert done.returncode != 0
    assert any(what in str(getattr(record, "why", "")) for record in caplog.records)


def test_the_positive_response_is_there_when_it_is_asked_for_and_has_no_length(
    serve: Callable[..., Any], raw_peer: Any, users_file: Path
) -> None:
    node = serve(user_identity={"users_file": users_file})
    for asked in (0, 1):
        kind, body = raw_peer(node.port).associate([VERIFICATION], user=item(2, b"anna", SECRET.encode(), asked))
        assert kind == 2
        assert (b"\x59\0\0\2\0\0" in body) is bool(asked)
    assert raw_peer(node.port).associate([VERIFICATION])[0] == 2, "optional: who names nobody is taken"
    assert raw_peer(node.port).associate([VERIFICATION], user=item(2, b"anna", b"wrong", 1)) == NOT_IDENTIFIED


def test_whoever_is_not_configured_to_ask_does_not_look(serve: Callable[..., Any], raw_peer: Any) -> None:
    node = serve()
    kind, body = raw_peer(node.port).associate([VERIFICATION], user=item(2, b"anna", b"x", 1))
    assert kind == 2 and b"\x59\0\0\2" not in body


def test_peers_have_their_own_users(serve: Callable[..., Any], raw_peer: Any, users_file: Path) -> None:
    with users_file.open("a") as file:
        file.write(user_line("berta", hash_passcode(b"b")) + "\n")
    node = serve(
        user_identity={"users_file": users_file, "mode": "off"},
        peers={
            "ct": {"ae_title": "CT1"},
            "console": {"ae_title": "CONSOLE", "user_identity": "required", "users": ["berta"]},
        },
    )

    def kind(calling: str, user: bytes = b"") -> int:
        return int(raw_peer(node.port).associate([VERIFICATION], calling=calling, user=user)[0])

    anna, berta = item(2, b"anna", SECRET.encode()), item(2, b"berta", b"b")
    assert [kind("CT1"), kind("CT1", item(2, b"x", b"y")), kind("CONSOLE", berta)] == [2, 2, 2]
    assert [kind("CONSOLE"), kind("CONSOLE", anna)] == [3, 3]


def test_too_many_wrong_passcodes_from_one_address_are_not_looked_at(
    serve: Callable[..., Any], raw_peer: Any, users_file: Path
) -> None:
    node = serve(user_identity={"users_file": users_file, "attempts_per_minute": 3})
    right = item(2, b"anna", SECRET.encode())
    for _ in range(6):
        assert raw_peer(node.port).associate([VERIFICATION], user=right)[0] == 2, "what was right is remembered"
    answers = [raw_peer(node.port).associate([VERIFICATION], user=item(2, b"anna", b"no")) for _ in range(5)]
    assert answers == [NOT_IDENTIFIED] * 3 + [TOO_OFTEN] * 2
    assert raw_peer(node.port).associate([VERIFICATION], user=right)[0] == 2
    assert node.counted.rejected == ["user"] * 3 + ["rate"] * 2


# --- the verdict by itself


def judge(made: Identification, identity: UserIdentity | None, **changes: Any) -> Identified | Unidentified:
    facts: dict[str, Any] = {"calling": "CT1", "address": "192.0.2.9", "encrypted": True}
    return made.judge(identity, Policy(identity="optional"), **(facts | changes))


def passcode(secret: str = SECRET, name: str = "anna") -> UserIdentity:
    return UserIdentity(kind=2, primary=name.encode(), secondary=secret.encode())


def test_secrets_in_clear_from_elsewhere_are_refused_unless_that_is_allowed(users_file: Path) -> None:
    closed = Identification(UserIdentitySettings(users_file=users_file), NoAuditTrail())
    allowed = Identification(UserIdentitySettings(users_file=users_file, allow_plain=True), NoAuditTrail())
    plain = judge(closed, passcode(), encrypted=False)
    assert isinstance(plain, Unidentified) and "TLS" in plain.why
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert isinstance(judge(closed, passcode(), encrypted=False, address=address), Identified)
    assert isinstance(judge(closed, passcode()), Identified)
    assert isinstance(judge(allowed, passcode(), encrypted=False), Identified)


def test_a_changed_file_holds_at_once_and_a_broken_one_never(
    users_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Identification(UserIdentitySettings(users_file=users_file), NoAuditTrail())
    assert isinstance(judge(made, passcode()), Identified)
    users_file.write_text("nonsense\n")
    assert isinstance(judge(made, passcode()), Identified), "what was read before holds on"
    assert isinstance(judge(made, passcode()), Identified)
    assert caplog.text.count("cannot be read") == 1, "once, and not for each who comes"
    users_file.write_text(user_line("anna", hash_passcode(b"another one")) + "\n")
    assert isinstance(judge(made, passcode()), Unidentified), "and is not remembered"
    assert isinstance(judge(made, passcode("another one")), Identified)


def test_what_was_right_is_not_computed_again_for_a_while(users_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, computed = [0.0], []
    real = UsersFile.check
    monkeypatch.setattr(UsersFile, "check", lambda *words: computed.append(1) or real(*words))
    made = Identification(UserIdentitySettings(users_file=users_file), NoAuditTrail(), lambda: now[0])
    for _ in range(5):
        assert isinstance(judge(made, passcode()), Identified)
    assert len(computed) == 1
    assert isinstance(judge(made, passcode("wrong")), Unidentified), "nor is a wrong one taken for it"
    now[0] = 61.0
    assert isinstance(judge(made, passcode()), Identified)
    assert len(computed) == 3


def test_associations_that_ask_at_once_pay_for_one_passcode(users_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    real = UsersFile.check
    monkeypatch.setattr(UsersFile, "check", lambda *words: computed.append(1) or real(*words))
    made = Identification(UserIdentitySettings(users_file=users_file), NoAuditTrail())
    verdicts: list[Any] = []
    threads = [threading.Thread(target=lambda: verdicts.append(judge(made, passcode()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert verdicts == [Identified("anna")] * 8 and len(computed) == 1


def test_a_flood_waits_for_one_check_at_a_time_and_no_longer(users_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, go_on = threading.Semaphore(0), threading.Event()
    most, now = [0], [0]

    def check(self: UsersFile, name: str, secret: bytes) -> bool:
        now[0] += 1
        most[0] = max(most[0], now[0])
        at_work.release()
        assert go_on.wait(10.0)
        now[0] -= 1
        return False

    monkeypatch.setattr(UsersFile, "check", check)
    monkeypatch.setattr(identification_module, "WAIT_S", 10.0)
    made = Identification(UserIdentitySettings(users_file=users_file, attempts_per_minute=1000), NoAuditTrail())
    verdicts: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=number: verdicts.append(judge(made, passcode(f"{n}")))) for number in range(20)
    ]
    for thread in threads:
        thread.start()
    assert at_work.acquire(timeout=10.0)
    deadline = time.monotonic() + 10.0
    while len(verdicts) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {verdict.rejection.reason for verdict in verdicts} == {"rate"} and len(verdicts) == 4
    go_on.set()
    for thread in threads:
        thread.join(10.0)
    assert most == [1]


# --- the users file


def test_a_passcode_is_kept_as_a_salted_hash_that_only_it_fits() -> None:
    first, second = hash_passcode(b"one"), hash_passcode(b"one")
    assert first.salt != second.salt and first.digest != second.digest
    assert first.is_of(b"one") and second.is_of(b"one") and not first.is_of(b"two")
    with pytest.raises(ConfigError):
        hash_passcode(b"")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o700])
def test_a_file_that_others_may_read_or_change_is_refused(users_file: Path, mode: int) -> None:
    users_file.chmod(mode)
    with pytest.raises(ConfigError, match="expected 0600 or 0640: run `chmod 600"):
        UsersFile(users_file)


@pytest.mark.parametrize(
    "line",
    [
        "anna:secret",
        "anna",
        ":scrypt$16384$8$1$" + "A" * 24 + "$" + "A" * 43 + "=",
        "anna:scrypt$16384$8$1$AAAA$" + "A" * 43 + "=",
        "anna:scrypt$2$8$1$" + "A" * 22 + "==$" + "A" * 43 + "=",
        "anna:scrypt$1073741824$8$1$" + "A" * 22 + "==$" + "A" * 43 + "=",
        "anna:scrypt$16384$8$1000000$" + "A" * 22 + "==$" + "A" * 43 + "=",
    ],
)
def test_a_line_that_is_none_or_costs_too_much_is_refused_without_being_shown(users_file: Path, line: str) -> None:
    users_file.write_text(f"# \n{line}\n")
    with pytest.raises(ConfigError, match="line 2 is no NAME:scrypt") as refused:
        UsersFile(users_file)
    assert "secret" not in str(refused.value)


def test_the_command_hashes_what_the_command_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str, says: bytes) -> int:
        read, write = os.pipe()
        os.write(write, says + b"\n")
        os.close(write)
        with os.fdopen(read) as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return cli.main(["users", *words])

    assert run("hash", "Anna Müller:x", says=b"pass code") == 0
    line = capsys.readouterr().out
    assert line.startswith("Anna Müller:x:scrypt$")
    users, config = tmp_path / "users", tmp_path / "node.yaml"
    users.write_text(line)
    users.chmod(0o640)
    config.write_text(json.dumps({"user_identity": {"users_file": str(users)}}))
    assert run("check", "Anna Müller:x", "--config", str(config), says=b"pass code") == 0
    assert run("check", "Anna Müller:x", "--config", str(config), says=b"passcode") == 2
    assert run("hash", " x", says=b"y") == 2 and run("hash", "x", says=b"") == 2


# --- tokens


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"exp": 1}, "expired"),
        ({"exp": None}, "lacks"),
        ({"aud": None}, "lacks"),
        ({"iss": "https://evil.example"}, "another issuer"),
        ({"aud": "other"}, "another audience"),
        ({"sub": None}, "lacks"),
        ({"sub": ""}, "names no user"),
        ({"sub": "a\nb"}, "names no user"),
        ({"nbf": 9_999_999_999}, "not valid yet"),
    ],
)
def test_a_token_that_says_something_else_is_not_taken(
    with_tokens: Any, signer: Any, changes: dict[str, Any], why: str
) -> None:
    tokens = Tokens(JwtSettings.model_validate(with_tokens))
    assert tokens.user(token(signer).encode()) == ("anna", "")
    name, said = tokens.user(token(signer, **changes).encode())
    assert (name, why in said) == ("", True), said


def test_the_token_does_not_choose_how_it_is_verified(with_tokens: Any, signer: Any) -> None:
    """RFC 8725 2.1: `none`, and HMAC with the public key as its secret."""
    tokens = Tokens(JwtSettings.model_validate(with_tokens))
    claims = token(signer).split(".")[1]

    def forged(header: dict[str, str], secret: bytes = b"") -> bytes:
        import base64
        import hmac

        def plain(value: bytes) -> str:
            return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

        text = f"{plain(json.dumps(header).encode())}.{claims}"
        signature = hmac.digest(secret, text.encode(), "sha256") if secret else b""
        return f"{text}.{plain(signature)}".encode()

    assert tokens.user(forged({"alg": "none"}))[0] == ""
    assert tokens.user(forged({"alg": "HS256"}, public(signer)))[0] == ""
    assert tokens.user(forged({"alg": "ES384"}))[0] == ""
    for nested in (b"[" * 6000, b'{"a":' * 2000, b'{"alg":"ES256","kid":[1]}', b"7", b"null", b'{"alg":{}}'):
        import base64

        forgery = base64.urlsafe_b64encode(nested).rstrip(b"=") + b".e30.eA"
        assert tokens.user(forgery)[0] == "" and tokens.user(forgery)[1].startswith("the token")
    assert tokens.user(b"\xff.x.y")[0] == tokens.user(b"x" * 20_000)[0] == tokens.user(b"")[0] == ""
    with pytest.raises(ValueError, match="algorithms"):
        JwtSettings.model_validate({**with_tokens, "algorithms": ["HS256"]})


@pytest.mark.parametrize("exp", [1e400, -1e400, "9" * 5000, [1], {"a": 1}])
def test_a_token_of_the_issuer_that_is_nonsense_is_not_taken(with_tokens: Any, signer: Any, exp: Any) -> None:
    from jwt.api_jws import PyJWS

    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "anna", "exp": exp}
    signed = PyJWS().encode(json.dumps(claims).encode(), signer, algorithm="ES256")
    name, why = Tokens(JwtSettings.model_validate(with_tokens)).user(signed.encode())
    assert name == "" and why.startswith("the token")


def test_a_key_set_is_read_by_key_id_and_taken_in_when_it_changes(with_tokens: Any, tmp_path: Path) -> None:
    first, second = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    path = tmp_path / "issuer.json"

    def write(**keys: Any) -> None:
        from jwt.algorithms import RSAAlgorithm

        entries = [{**json.loads(RSAAlgorithm.to_jwk(key.public_key())), "kid": kid} for kid, key in keys.items()]
        entries.append({"kty": "oct", "kid": "shared", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"})
        path.write_text(json.dumps({"keys": entries}))

    write(a=first, b=second)
    tokens = Tokens(JwtSettings.model_validate({**with_tokens, "algorithms": ["RS256", "PS256"], "key": path}))
    assert tokens.user(token(second, "PS256", {"kid": "b"}).encode()) == ("anna", "")
    assert tokens.user(token(second, "RS256", {"kid": "a"}).encode())[1] == "the signature of the token is wrong"
    assert tokens.user(token(first, "RS512", {"kid": "a"}).encode())[1].startswith("the token is signed by an algor")
    assert "key that is not known" in tokens.user(token(second, "RS256", {"kid": "c"}).encode())[1]
    write(c=second, d=first)
    os.utime(path, ns=(1, 1))
    tokens.look()
    assert tokens.user(token(second, "RS256", {"kid": "c"}).encode()) == ("anna", "")


@pytest.mark.parametrize("content", [b"nothing", b"private", b"weak", b"{}"])
def test_a_key_that_cannot_be_used_is_an_error_of_the_configuration(
    with_tokens: Any, signer: Any, content: bytes
) -> None:
    if content == b"private":
        content = signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if content == b"weak":
        content = public(ec.generate_private_key(ec.SECP384R1()))
    with_tokens["key"].write_bytes(content)
    with pytest.raises(ConfigError, match=r"user_identity\.jwt\.key"):
        Tokens(JwtSettings.model_validate(with_tokens))


# --- the node as the one who comes


def destination(port: int, user: UserCredentials | None, host: str = "127.0.0.1") -> Destination:
    return Destination(name="pacs", ae_title="DICOM_NODE", host=host, port=port, user=user)


def test_the_node_says_who_it_is_to_another(
    serve: Callable[..., Any],
    wire: Any,
    users_file: Path,
    with_tokens: Any,
    signer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ["username", "passcode", "jwt"]
    node = serve(user_identity={"users_file": users_file, "kinds": kinds, "jwt": with_tokens, "mode": "required"})
    secret, pass_token = tmp_path / "passcode", tmp_path / "token"
    secret.write_text(SECRET + "\n")
    pass_token.write_text(token(signer))
    monkeypatch.setenv("PACS_PASSCODE", SECRET)
    for path in (secret, pass_token):
        path.chmod(0o600)
    sender = DimseSender(NodeConfig().delivery, "OTHER", open_link(wire))
    for user in (
        UserCredentials(name="anna"),
        UserCredentials(name="anna", passcode_env="PACS_PASSCODE"),
        UserCredentials(name="anna", passcode_file=str(secret)),
        UserCredentials(jwt_file=str(pass_token)),
    ):
        assert sender.echo(destination(node.port, user)) == 0, user
    with pytest.raises(DeliveryRefused, match=r"1,1,1"):
        sender.echo(destination(node.port, None))
    with pytest.raises(DeliveryUnavailable, match="NO_SUCH_VARIABLE is not set"):
        sender.echo(destination(node.port, UserCredentials(name="anna", passcode_env="NO_SUCH_VARIABLE")))
    secret.chmod(0o644)
    with pytest.raises(DeliveryUnavailable, match="expected 0600 or 0640"):
        sender.echo(destination(node.port, UserCredentials(name="anna", passcode_file=str(secret))))


def test_the_node_tells_no_secret_in_clear_to_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACS_PASSCODE", SECRET)
    user = UserCredentials(name="anna", passcode_env="PACS_PASSCODE")
    with pytest.raises(DeliveryUnavailable, match="in clear; use TLS") as refused:
        DimseSender(NodeConfig().delivery, "OTHER").echo(destination(104, user, "192.0.2.1"))
    assert SECRET not in str(refused.value) and "anna" not in str(refused.value) + repr(user)


@pytest.mark.parametrize("wire", ["own"])
def test_an_engine_that_speaks_dicom_is_told_who_comes(
    serve: Callable[..., Any], users_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = serve(user_identity={"users_file": users_file, "mode": "required"})
    monkeypatch.setenv("BOX_PASSCODE", SECRET)

    def engine(**more: Any) -> DicomEngine:
        options = {"ae_title": "DICOM_NODE", "host": "127.0.0.1", "port": node.port, **more}
        settings = EngineSettings(kind="dicom", options=options)
        return DicomEngine("ai-box", settings, sender=DimseSender(NodeConfig().delivery, "NODE"))

    reached = dict(engine(user={"name": "anna", "passcode_env": "BOX_PASSCODE"}).report())["reached"]
    assert reached.endswith("answers C-ECHO with status 0x0000")
    with pytest.raises(EngineUnavailable, match=r"1,1,1"):
        engine().report()
    with pytest.raises(EngineUnavailable, match=r"user\.passcode_env: the variable NO_SUCH is not set"):
        engine(user={"name": "anna", "passcode_env": "NO_SUCH"}).report()
    with pytest.raises(ConfigError, match=r"engines\.ai-box\.options\.user"):
        engine(user={"passcode_env": "BOX_PASSCODE"})


@pytest.mark.parametrize("wire", ["own"])
def test_a_person_sends_as_a_user(
    serve: Callable[..., Any], make_file: Callable[..., Path], users_file: Path, tmp_path: Path
) -> None:
    node = serve(user_identity={"users_file": users_file, "mode": "required"})
    to = [sys.executable, "-m", "dicom_node.cli", "send", make_file(), "--to", f"127.0.0.1:{node.port}/DICOM_NODE"]

    def send(*words: str) -> tuple[int, str]:
        variables = {**os.environ, "MY_PASSCODE": SECRET}
        done = subprocess.run(
            [*map(str, to), *words],
            capture_output=True,
            text=True,
            timeout=60,
            env=variables,
            cwd=tmp_path,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    assert send("--user", "anna", "--passcode-env", "MY_PASSCODE") == (0, "1 of 1 files stored by DICOM_NODE\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"passcode_env": "X"}, "--user NAME"),
        ({"user": "anna", "jwt_file": "t"}, "give one of them"),
        ({"passcode_env": "X", "jwt_file": "t"}, "needs no passcode"),
    ],
)
def test_a_person_is_told_what_goes_with_what(given: dict[str, str], said: str) -> None:
    asked = {"tls": False, "allow_plain": False, "user": None, "passcode_env": None, "jwt_file": None}
    with pytest.raises(ConfigError, match=said):
        transfers._asked(NodeConfig(), "127.0.0.1:104/PACS", argparse.Namespace(**asked | given))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"user_identity": {}}, "users_file"),
        (
            {"host": "0.0.0.0", "allow_any_peer": True, "user_identity": {"users_file": "users"}},
            "cross the network in clear",
        ),
        ({"user_identity": {"kinds": ["jwt"]}}, "kinds, jwt"),
        ({"user_identity": {"kinds": ["kerberos"]}}, "kinds"),
        ({"destinations": {"a": {"ae_title": "A", "host": "h", "port": 1, "user": {}}}}, "exactly one"),
        (
            {"destinations": {"a": {"ae_title": "A", "host": "h", "port": 1, "user": {"name": "a", "jwt_file": "b"}}}},
            "exactly one",
        ),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NodeConfig.model_validate(settings)
