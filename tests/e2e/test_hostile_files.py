"""The corpus's files that were made to break things: sent, matched by a rule, given to the models; nothing breaks."""

import csv
import json
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from dicom_node.config import DeliverySettings
from dicom_node.dimse.commands import StoreRequests
from dicom_node.dimse.contexts import EXPLICIT_LE, ProposedContext
from dicom_node.dimse.requestor import open_link
from dicom_node.errors import NodeError
from dicom_node.model import Destination

CT = "1.2.840.10008.5.1.4.1.1.2"
EVERYTHING = """\
rule: {name}
when: ["true"]
run: {{engine: {name}, results: [{result}]}}
"""


def hostile(corpus: Path) -> Iterator[Path]:
    with (corpus / "MANIFEST.csv").open(newline="", encoding="utf-8") as manifest:
        for row in csv.DictReader(manifest):
            if "fuzz" in row["path"]:
                yield corpus / row["path"]


def said(raw: bytes, tag: bytes) -> str:
    """The value of the first explicit UI element with that tag, wherever it stands; '' where there is none."""
    at = raw.find(tag + b"UI")
    if at < 0:
        return ""
    (length,) = struct.unpack_from("<H", raw[at + 6 : at + 8].ljust(2, b"\0"))
    uid = raw[at + 8 : at + 8 + length].decode("latin-1").rstrip("\0 ")
    return uid if 0 < len(uid) <= 64 and set(uid) <= set("0123456789.") else ""


def beginning(raw: bytes) -> int:
    """Where the data set begins: behind what looks like file meta information, whatever its group length says."""
    at = 132 if raw[128:132] == b"DICM" else 0
    while raw[at : at + 2] == b"\2\0" and at + 12 <= len(raw):
        long = raw[at + 4 : at + 6] in (b"OB", b"UN", b"SQ")
        field = raw[at + 8 : at + 12] if long else raw[at + 6 : at + 8]
        at += (12 if long else 8) + int.from_bytes(field, "little")
    return min(at, len(raw))


def told_apart(raw: bytes, number: int) -> bytes:
    """The same file with UIDs of its own, as long as they were: each is then a study, and none a repetition."""
    for tag in (b"\x08\0\x18\0", b"\x20\0\x0d\0", b"\x20\0\x0e\0"):
        uid = said(raw, tag)
        if len(uid) > 8:
            raw = raw.replace(
                uid.encode(), f"{uid[:-3].rstrip('.0')}{'1' * 9}"[: len(uid) - 3].encode() + b"%d" % number
            )
    return raw


def send(node: Any, raw: bytes) -> str:
    """One object as a sender would that looks at nothing: what the node answered, in a word."""
    sop_class = said(raw, b"\x08\0\x16\0") or CT
    sop_instance = said(raw, b"\x08\0\x18\0") or "1.2.3"
    context = ProposedContext(abstract_syntax=sop_class, transfer_syntaxes=(said(raw, b"\2\0\x10\0") or EXPLICIT_LE,))
    destination = Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=node.dicom_port)
    link = open_link(
        destination, [context], calling_ae_title="HOSTILE", settings=DeliverySettings(), max_data_set_bytes=1 << 20
    )
    try:
        if not link.contexts:
            return "no context"
        link.send_message(1, StoreRequests(sop_class).encode(1, sop_instance), [raw[beginning(raw) :]])
        status = link.await_response(1, 60.0).command.status
        return f"{status:04X}"
    except NodeError:
        return "lost"
    finally:
        link.release()


def say(node: Any, raw: bytes) -> None:
    """Bytes that are a conversation already."""
    with closing(socket.create_connection(("127.0.0.1", node.dicom_port), timeout=10)) as client, suppress(OSError):
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass


@pytest.mark.timeout(300)
def test_every_hostile_file_is_refused_or_accounted_for(
    running_node: Callable[..., Any],
    eyes: Callable[[Any], Any],
    corpus: Path,
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    for name, result in (("ct-abdomen", "seg"), ("cxr-findings", "sr")):
        (rules / f"{name}.yaml").write_text(EVERYTHING.format(name=name, result=result))
    node = running_node(
        rules_dir=str(rules),
        any_called_ae_title=True,
        completion={"quiet_s": 0.5, "quiet_after_fault_s": 0.5},
        analyse_identity_conflicts=True,
    )
    processes = {role: node.pid(role) for role in ("supervisor", "receiver", "service", "work")}
    answers: Counter[str] = Counter()
    for number, path in enumerate(hostile(corpus), start=100):
        raw = told_apart(path.read_bytes(), number)
        if path.suffix in (".raw", ".pcap"):
            say(node, raw)
        else:
            answers[send(node, raw)] += 1
    assert answers["0000"] >= 10 and answers.total() >= 50, answers
    assert set(answers) <= {"0000", "A900", "C000", "C409", "no context"}, answers

    ours = eyes(node)

    def at_rest() -> bool:
        metrics = node.get("/metrics")[1]
        waiting, received = (f'dicom_node_ledger_series{{state="{state}"}} 0.0' for state in ("waiting", "received"))
        return waiting in metrics and received not in metrics

    wait_for(at_rest, 180, f"everything to be decided; log:\n{node.tail()}")
    status = json.loads(node.command("status", "--json").stdout)
    assert status["ledger"]["imbalance"] == 0 and status["ledger_studies"]["imbalance"] == 0, status["ledger"]
    assert status["ledger"]["received"] > 10
    jobs = list(ours.catalog.queue.jobs())
    assert jobs, "no rule matched anything"
    assert all(job.error or job.state.value == "done" for job in jobs), "a job ended and nobody knows why"
    assert processes == {role: node.pid(role) for role in processes}, f"a process died; log:\n{node.tail()}"
    assert '"level": "CRITICAL"' not in node.log.read_text()
    assert node.get("/ready")[0] == 200
