"""What is sent to engines and received from them: streamed, bounded, checked, durable."""

import base64
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from dicom_node.engines._http import Checksum, HttpClient, HttpSettings, Part, WrongChecksum, crc32c_base64
from dicom_node.errors import EngineError, EngineUnavailable, StorageError

MIB = 1024**2


@pytest.fixture
def client(server: Any) -> Iterator[Callable[..., HttpClient]]:
    """`client(**settings)`: a client of `server`, quick to try again, closed at the end."""
    with ExitStack() as stack:

        def make(**settings: Any) -> HttpClient:
            made = HttpClient("probe", HttpSettings(**{"base_url": server.url, "backoff_s": 0.01, **settings}))
            stack.callback(made.close)
            return made

        yield make


# --- sent


def test_a_file_is_sent_whole_with_its_length_and_never_chunked(server: Any, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "volume.nii.gz"
    path.write_bytes(os.urandom(3 * MIB + 17))
    server.on("PUT", "/u", server.answer(200))
    client().call("PUT", "/u", idempotent=True, content=path, headers={"Content-Type": "application/gzip"})
    sent = server.received[0]
    assert sent.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sent.headers["content-length"] == str(3 * MIB + 17) and "transfer-encoding" not in sent.headers
    assert sent.headers["content-type"] == "application/gzip"


def test_multipart_has_the_names_given_and_the_length_announced(server: Any, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "Doe^John.nii.gz"
    path.write_bytes(bytes(range(256)) * 2048)
    pieces = [b"\r\n--", b"x" * 300_000]
    server.on("POST", "/v1/segmentation", server.answer(200))
    client().call(
        "POST",
        "/v1/segmentation",
        idempotent=False,
        files=[
            Part(name="params", content='{"points": "é"}'),
            Part(name="datapoint", content=path, filename="image.nii.gz"),
            Part(name='a"b\r\n', content=(pieces, 300_004), filename='"x"', content_type="application/dicom"),
        ],
    )
    sent = server.received[0]
    assert sent.length == int(sent.headers["content-length"]) and "transfer-encoding" not in sent.headers
    head = f"Content-Type: {sent.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + sent.body)
    parts = list(message.iter_parts())
    names = [part.get_param("name", header="content-disposition") for part in parts]
    assert names == ["params", "datapoint", "a%22b%0D%0A"]
    assert [part.get_filename() for part in parts] == [None, "image.nii.gz", "%22x%22"]
    assert [part["content-type"] for part in parts] == [None, "application/octet-stream", "application/dicom"]
    raw = sent.body
    assert raw.count(b'name="params"\r\n\r\n{"points": "\xc3\xa9"}\r\n--') == 1
    assert path.read_bytes() in raw and b"".join(pieces) in raw and b"Doe" not in raw


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="needs cgi, which Python 3.13 no longer has")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_multipart_is_read_by_the_parser_that_real_servers_use(server: Any, client: Any) -> None:
    import cgi
    import io

    image = os.urandom(50_002)
    server.on("POST", "/", server.answer(200))
    client().call(
        "POST",
        "/",
        idempotent=False,
        files=[Part(name="params", content="{}"), Part(name="image", content=image, filename="i.nii.gz")],
    )
    sent = server.received[0]
    environ = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": sent.headers["content-length"]}
    fields = cgi.FieldStorage(io.BytesIO(sent.body), headers=sent.headers, environ=environ)
    assert fields["params"].value == "{}" and fields["params"].filename is None
    assert fields["image"].file.read() == image and fields["image"].filename == "i.nii.gz"
    fields["image"].file.close()


def test_a_body_that_can_be_read_again_is_sent_again(server: Any, client: Any, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"again" * 1000)
    server.on("PUT", "/u", server.answer(503), server.drop(), server.answer(200))
    client().call("PUT", "/u", idempotent=True, files=[Part(name="f", content=path, filename="f")])
    assert len({request.sha256 for request in server.received}) == 1 and len(server.received) == 3


def test_pieces_that_come_but_once_are_not_sent_twice(server: Any, client: Any) -> None:
    server.on("PUT", "/u", server.answer(503), server.answer(200))
    with pytest.raises(EngineUnavailable, match="503"):
        client().call("PUT", "/u", idempotent=True, content=(iter([b"once"]), 4))
    assert len(server.received) == 1


@pytest.mark.parametrize("pieces", [[b"short"], [b"longer", b" than said"]])
def test_a_body_of_another_length_than_announced_is_no_whole_request(
    server: Any, client: Any, pieces: list[bytes]
) -> None:
    server.on("PUT", "/u", server.answer(200))
    one = client()
    with pytest.raises(StorageError, match="8 bytes"):
        one.call("PUT", "/u", idempotent=True, content=(pieces, 8))
    assert one.state.name == "CLOSED" and one.held == 0


def test_a_file_that_is_not_there_is_told_before_anything_is_sent(server: Any, client: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        client().call("PUT", "/u", idempotent=True, content=tmp_path / "none")
    assert server.received == []


def test_an_engine_that_refuses_early_is_heard(client: Any, start_server: Any) -> None:
    """It answers 413 after the header and closes; the answer is read although sending broke."""
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1 << 20):
                    pass

        thread = threading.Thread(target=refuse)
        thread.start()
        one = client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(EngineError, match="status 413"):
            one.call("PUT", "/", idempotent=False, content=bytes(4 * MIB))
        thread.join(10)


PEAK = """
import resource, sys
from pathlib import Path
from dicom_node.engines._http import HttpClient, HttpSettings, Part
url, folder, mib = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
client = HttpClient("probe", HttpSettings(base_url=url))
client.call("PUT", "/small", idempotent=True, files=[Part(name="f", content=bytes(1 << 20), filename="f")])
client.download("/small", folder / "small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
client.call("PUT", "/big", idempotent=True, files=[Part(name="f", content=folder / "big", filename="f")])
client.call("PUT", "/big", idempotent=True, content=((bytes(1 << 20) for _ in range(mib)), mib << 20))
client.download("/big", folder / "back")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_large_transfers_both_ways_take_little_memory(server: Any, tmp_path: Path) -> None:
    mib = 192
    with (tmp_path / "big").open("wb") as stream:
        stream.truncate(mib * MIB)
    for path in ("/small", "/big"):
        server.on("PUT", path, server.answer(200))
    server.on("GET", "/small", server.answer(200, bytes(MIB)))
    server.on("GET", "/big", server.endless(bytes(MIB), mib))
    command = [sys.executable, "-c", PEAK, server.url, str(tmp_path), str(mib)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert [request.length for request in server.received if request.target == "/big"][1] == mib * MIB
    assert (tmp_path / "back").stat().st_size == mib * MIB
    assert int(ran.stdout) < 24 * 1024  # KiB that the peak grew by


# --- received


@pytest.mark.parametrize("announced", [True, False])
def test_an_answer_beyond_the_bound_is_cut(server: Any, client: Any, tmp_path: Path, announced: bool) -> None:
    reply = server.answer(200, bytes(2 * MIB)) if announced else server.endless(bytes(64 * 1024), 32)
    server.on("GET", "/", reply)
    one = client(max_response_bytes=MIB)
    with pytest.raises(EngineError, match=f"more than {MIB} bytes"):
        one.call("GET", "/", idempotent=True)
    with pytest.raises(EngineError, match="more than 1000 bytes"):
        one.download("/", tmp_path / "x", max_bytes=1000)
    assert list(tmp_path.iterdir()) == [] and len(server.received) == 2


def test_an_answer_of_exactly_the_bound_is_taken(server: Any, client: Any) -> None:
    server.on("GET", "/", server.answer(200, bytes(1000)))
    assert len(client(max_response_bytes=1000).call("GET", "/", idempotent=True).body) == 1000


def test_an_encoding_nobody_asked_for_is_refused(server: Any, client: Any) -> None:
    server.on("GET", "/", server.answer(200, b"\x1f\x8b", {"Content-Encoding": "gzip"}))
    with pytest.raises(EngineError, match="encoding"):
        client().call("GET", "/", idempotent=True)


@pytest.mark.parametrize("kind", ["sha256", "sha256-base64", "crc32c", "crc32c-base64"])
def test_a_download_is_checked_and_replaces_what_was_there(server: Any, client: Any, tmp_path: Path, kind: str) -> None:
    body, target = os.urandom(300_000), tmp_path / "mask.nii.gz"
    target.write_bytes(b"old")
    sha256, crc = hashlib.sha256(body), google_crc32c.value(body).to_bytes(4, "big")
    checksum = {
        "sha256": Checksum.sha256(sha256.hexdigest()),
        "sha256-base64": Checksum.sha256(base64.b64encode(sha256.digest()).decode()),
        "crc32c": Checksum.crc32c(crc.hex()),
        "crc32c-base64": Checksum.crc32c(base64.b64encode(crc).decode()),
    }[kind]
    server.on("GET", "/m", server.answer(200, body, {"Content-Type": "application/GZIP; x=1"}))
    got = client().download("/m", target, checksum=checksum)
    assert (got.length, got.sha256, got.status) == (300_000, sha256.hexdigest(), 200)
    assert got.headers["content-type"] == "application/GZIP; x=1"
    assert target.read_bytes() == body and target.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [target]


def test_the_crc32c_is_the_one_of_the_standard() -> None:
    assert crc32c_base64([b"1234", b"56789"]) == base64.b64encode(bytes.fromhex("e3069283")).decode()
    assert Checksum.crc32c("752f9554").digest == bytes.fromhex("752f9554")
    assert Checksum.crc32c("64RKKA==").digest == base64.b64decode("64RKKA==")


@pytest.mark.parametrize("text", ["", "zz", "752f955", "752f95541", "64RKK===", "ä"])
def test_a_checksum_that_is_none_is_an_engine_error(text: str) -> None:
    with pytest.raises(EngineError, match="checksum"):
        Checksum.crc32c(text)


def test_a_damaged_download_is_fetched_again(server: Any, client: Any, tmp_path: Path) -> None:
    good, checksum = b"good", Checksum.sha256(hashlib.sha256(b"good").hexdigest())
    server.on("GET", "/", server.answer(200, b"goob"), server.partial(b"go", 4), server.answer(200, good))
    assert client().download("/", tmp_path / "x", checksum=checksum).length == 4
    assert (tmp_path / "x").read_bytes() == good and len(server.received) == 3


def test_a_download_that_stays_wrong_leaves_the_old_file(server: Any, client: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    server.on("GET", "/", server.answer(200, b"bad"))
    with pytest.raises(WrongChecksum, match=r"GET 127\.0\.0\.1: 3 bytes arrived whose crc32c"):
        client(retries=1).download("/", tmp_path / "x", checksum=Checksum.crc32c("00000000"))
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    assert len(server.received) == 2


def test_a_post_can_be_answered_into_a_file_and_is_not_repeated(server: Any, client: Any, tmp_path: Path) -> None:
    server.on("POST", "/infer", server.partial(b"half", 9), server.answer(200, b"whole mask"))
    one, ask = client(), {"idempotent": False, "files": [Part(name="params", content="{}")]}
    with pytest.raises(EngineUnavailable) as failed:
        one.call_into("POST", "/infer", tmp_path / "x", **ask)
    assert failed.value.maybe_taken and list(tmp_path.iterdir()) == []
    assert one.call_into("POST", "/infer", tmp_path / "x", **ask).length == 10


def test_a_folder_that_is_not_there_is_a_storage_error(server: Any, client: Any, tmp_path: Path) -> None:
    server.on("GET", "/", server.answer(200, b"x"))
    with pytest.raises(StorageError, match="cannot be written"):
        client().download("/", tmp_path / "none" / "x")
    assert len(server.received) == 1


def test_a_download_is_durable_before_it_is_named(
    server: Any, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(fd: int) -> None:
        steps.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "fsync file")
        real["fsync"](fd)

    def replace(source: Path, target: Path) -> None:
        steps.append("rename")
        real["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    server.on("GET", "/", server.answer(200, b"x"))
    client().download("/", tmp_path / "x")
    assert steps == ["fsync file", "rename", "fsync folder"]
