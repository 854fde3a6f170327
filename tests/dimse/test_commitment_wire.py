"""Storage commitment on real sockets: requests and reports, on the association of the question and on others."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role, evt
from pynetdicom.pdu import P_DATA_TF

from dicom_node.clock import SystemClock
from dicom_node.config import DeliverySettings
from dicom_node.dimse import commitment
from dicom_node.dimse.committing import DimseCommitment
from dicom_node.dimse.files import instance_of_file
from dicom_node.dimse.request import encode_identifier
from dicom_node.dimse.session import DimseSender
from dicom_node.dimse.wires import open_link
from dicom_node.errors import CommitmentNotTaken, DeliveryUnavailable, NotFound
from dicom_node.model import CommitmentReport, CommitmentTimes, Destination, ObjectReference
from dicom_node.pipeline.commit import Committer

COMMITMENT, INSTANCE = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
QUICK = DeliverySettings(connect_timeout_s=2.0, response_timeout_s=5.0, backoff_s=0.05, backoff_max_s=0.1)


class Told:
    """What a peer was told, and how it is to answer."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, Dataset, str]] = []
        self.statuses: list[int] = []
        self.unanswered = 0  # of the reports that came to a requestor
        self.changed = threading.Condition()

    def handle(self, event: Any) -> tuple[int, None]:
        with self.changed:
            role = "requestor" if event.assoc.is_requestor else "acceptor"
            self.reports.append((event.event_type, event.event_information, role))
            self.unanswered += event.assoc.is_requestor
            self.changed.notify_all()
            return (self.statuses.pop(0) if self.statuses else 0x0000), None

    def sent(self, event: Any) -> None:
        """A requestor sent a PDU: the first P-DATA-TF after a report is its answer."""
        if isinstance(event.pdu, P_DATA_TF):
            with self.changed:
                self.unanswered = max(self.unanswered - 1, 0)
                self.changed.notify_all()

    def wait(self, count: int = 1) -> list[tuple[int, Dataset, str]]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.reports) >= count, timeout=15.0), self.reports
            return self.reports


@contextmanager
def listening(told: Told, port: int = 0, *, scp_role: bool = True) -> Iterator[int]:
    """A peer that takes reports on associations of the node's, in the SCU role."""
    ae = AE("SCANNER")
    roles = {"scu_role": True, "scp_role": True} if scp_role else {}
    ae.add_supported_context(COMMITMENT, [EXPLICIT], **roles)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, told.handle)])
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


@contextmanager
def asking(port: int, told: Told, calling: str = "SCANNER") -> Iterator[Any]:
    """An association of a peer that may ask."""
    ae = AE(calling)
    ae.add_requested_context(COMMITMENT, [EXPLICIT])
    handlers = [(evt.EVT_N_EVENT_REPORT, told.handle), (evt.EVT_PDU_SENT, told.sent)]
    assoc = ae.associate("127.0.0.1", port, ae_title="DICOM_NODE", evt_handlers=handlers)
    assert assoc.is_established
    try:
        yield assoc
    finally:
        with told.changed:  # an answer after the release has begun would end pynetdicom's thread
            told.changed.wait_for(lambda: not told.unanswered or not assoc.is_established, timeout=5.0)
        assoc.release()


def information(references: Sequence[tuple[str, str]], transaction: str = "") -> Dataset:
    ds = Dataset()
    ds.TransactionUID = transaction or generate_uid()
    ds.ReferencedSOPSequence = []
    for sop_class, uid in references:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        ds.ReferencedSOPSequence.append(item)
    return ds


def ask(assoc: Any, ds: Dataset, instance: str = INSTANCE, action: int = 1) -> int:
    status, _ = assoc.send_n_action(ds, action, COMMITMENT, instance)
    return int(status.Status)


def peers(port: int) -> dict[str, Any]:
    scanner = {"ae_title": "SCANNER", "storage_commitment": True, "report_host": "127.0.0.1", "report_port": port}
    return {"scanner": scanner, "other": {"ae_title": "OTHER"}}


@pytest.fixture
def committing(serve: Callable[..., Any], wire: str) -> Iterator[Callable[..., Any]]:
    """`committing(report_port, **settings)`: a server whose Committer runs too, unless `start=False`."""
    running: list[Committer] = []

    def begin(port: int, *, start: bool = True, **settings: Any) -> Any:
        node = serve(peers=peers(port), **settings)
        config = node.server._config
        committer = Committer(
            node.catalog.queue,
            node.catalog.index,
            node.catalog.archive,
            DimseCommitment(QUICK, "DICOM_NODE", open_link(wire)),
            config.committed_to(),
            config.ae_titles,
            settings=QUICK,
            clock=SystemClock(),
        )
        running.append(committer)
        if start:
            committer.start()
        return SimpleNamespace(node=node, committer=committer, port=node.port, catalog=node.catalog)

    yield begin
    for committer in running:
        committer.stop()


@pytest.fixture
def stored(make_file: Callable[..., Path]) -> Callable[..., list[str]]:
    """`stored(port, count)`: send so many objects as SCANNER; their SOP Instance UIDs."""

    def send(port: int, count: int = 2) -> list[str]:
        paths = [make_file(pixels=16) for _ in range(count)]
        results: list[int | None] = []
        DimseSender(QUICK, "SCANNER").send(
            Destination(name="node", ae_title="DICOM_NODE", host="127.0.0.1", port=port),
            [instance_of_file(path) for path in paths],
            lambda instance, status, error: results.append(status),
            lambda: None,
        )
        assert results == [0] * count
        return [path.stem for path in paths]

    return send


def states(node: Any) -> list[tuple[str, int]]:
    return [tuple(row) for row in node.catalog.database.rows("SELECT state, attempts FROM commitment_request")]


def uids(items: Any) -> list[str]:
    return [str(item.ReferencedSOPInstanceUID) for item in items or ()]


# --- the node as SCP


def test_what_is_stored_is_committed_to_on_the_same_association(
    committing: Callable[..., Any], stored: Callable[..., list[str]], wait_for: Callable[..., None]
) -> None:
    node, told = committing(9), Told()
    kept = stored(node.port)
    with asking(node.port, told) as assoc:
        question = information([(CT, uid) for uid in kept])
        assert ask(assoc, question) == 0x0000
        ((event_type, report, role),) = told.wait()
        assert (event_type, role) == (1, "requestor")
        assert report.TransactionUID == question.TransactionUID
        assert uids(report.ReferencedSOPSequence) == kept and "FailedSOPSequence" not in report
        wait_for(lambda: states(node) == [("reported", 1)], 5, "the answer to be kept")
    assert ("commit", 0) in node.node.counted.answered


def test_what_cannot_be_committed_to_is_told_with_the_reason(
    committing: Callable[..., Any], stored: Callable[..., list[str]]
) -> None:
    node, told = committing(9), Told()
    good, short, changed, longer, gone = stored(node.port, 5)

    def path(uid: str) -> Path:
        return Path(node.catalog.index.instance(uid).path)

    content = path(short).read_bytes()
    path(short).unlink()
    path(short).write_bytes(content[:-2])
    content = path(changed).read_bytes()
    path(changed).unlink()
    path(changed).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    content = path(longer).read_bytes()
    path(longer).unlink()
    path(longer).write_bytes(content + b"\0\0")
    path(gone).unlink()
    references = [(CT, good), (CT, short), (CT, changed), (CT, longer), (CT, gone)]
    references += [(CT, "1.2.3.4"), ("1.2.840.10008.5.1.4.1.1.4", good), (CT, good)]
    with asking(node.port, told) as assoc:
        assert ask(assoc, information(references)) == 0
        ((event_type, report, _),) = told.wait()
    assert event_type == 2 and uids(report.ReferencedSOPSequence) == [good]
    failed = [(str(item.ReferencedSOPInstanceUID), item.FailureReason) for item in report.FailedSOPSequence]
    assert failed == [
        *[(uid, 0x0110) for uid in (short, changed, longer, gone)],
        *[("1.2.3.4", 0x0112), (good, 0x0119)],
    ]


@pytest.mark.parametrize("answers_role", [True, False])
def test_a_peer_that_left_is_told_on_an_association_that_proposes_the_scp_role(
    committing: Callable[..., Any],
    stored: Callable[..., list[str]],
    wait_for: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    answers_role: bool,
) -> None:
    monkeypatch.setattr(commitment, "HERE_S", 0.5)
    told = Told()
    with listening(told, scp_role=answers_role) as port:
        node = committing(port, start=False)
        kept = stored(node.port)
        with asking(node.port, told) as assoc:
            assert ask(assoc, information([(CT, uid) for uid in kept])) == 0
        assert told.reports == []
        assert node.committer.run_once("SCANNER")  # the check
        wait_for(lambda: node.committer.run_once("SCANNER"), 5, "the hold for the first association to end")
        ((event_type, report, role),) = told.wait()
        assert (event_type, role) == (1, "acceptor") and uids(report.ReferencedSOPSequence) == kept
    assert states(node) == [("reported", 1)] and not node.committer.run_once("SCANNER")


def test_a_peer_that_keeps_its_association_and_does_not_answer_is_told_on_another(
    committing: Callable[..., Any],
    stored: Callable[..., list[str]],
    raw_peer: Callable[[int], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commitment, "ANSWER_S", 0.3)
    told = Told()
    with listening(told) as port:
        node = committing(port)
        kept = stored(node.port, 1)
        peer = raw_peer(node.port)
        assert peer.associate([(1, COMMITMENT, [EXPLICIT])], calling="SCANNER")[0] == 2
        _send_action(peer, information([(CT, kept[0])]))
        assert peer.read_command().Status == 0
        assert peer.read_command().CommandField == 0x0100  # the report, to which nothing is answered
        assert told.wait()[0][2] == "acceptor"


def _send_action(peer: Any, ds: Dataset) -> None:

    fields = {"RequestedSOPClassUID": COMMITMENT, "CommandField": 0x0130, "MessageID": 1, "CommandDataSetType": 0}
    fields |= {"RequestedSOPInstanceUID": INSTANCE, "ActionTypeID": 1}
    peer.send_command(1, encode_identifier(ds, EXPLICIT), **fields)


def test_a_peer_that_is_down_or_refuses_is_told_until_it_took_it(
    committing: Callable[..., Any],
    stored: Callable[..., list[str]],
    free_port: Callable[[], int],
    wait_for: Callable[..., None],
) -> None:
    port, told = free_port(), Told()
    told.statuses = [0x0110, 0x0110]
    node = committing(port)
    kept = stored(node.port, 1)
    with asking(node.port, told) as assoc:
        assert ask(assoc, information([(CT, kept[0])])) == 0
    wait_for(lambda: states(node) and states(node)[0][1] >= 2, 10, "two tries that fail")
    (stuck,) = [one for one in node.catalog.queue.stuck() if one.kind == "commitment"] or [None]
    assert stuck is not None and "SCANNER" in stuck.name and stuck.why
    with listening(told, port):
        assert len(told.wait(3)) == 3
        wait_for(lambda: states(node)[0][0] == "reported", 5, "the report to be taken")


def test_a_request_is_taken_again_with_the_same_references_only(
    committing: Callable[..., Any], stored: Callable[..., list[str]], wait_for: Callable[..., None]
) -> None:
    node, told = committing(9), Told()
    one, two = stored(node.port)
    transaction = generate_uid()
    with asking(node.port, told) as assoc:
        assert ask(assoc, information([(CT, one), (CT, two)], transaction)) == 0
        told.wait()
        wait_for(lambda: states(node) == [("reported", 1)], 5, "the first report")
        assert ask(assoc, information([(CT, one)], transaction)) == 0x0131
        assert ask(assoc, information([(CT, two), (CT, one)], transaction)) == 0
        first, second = told.wait(2)
        assert first[1] == second[1]
        wait_for(lambda: states(node) == [("reported", 1)], 5, "the second report")


def test_requests_that_are_wrong_are_refused_with_their_status_and_nothing_is_kept(
    committing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.services.commitment.MAX_REFERENCES", 2)
    node, told = committing(9, start=False), Told()
    good = information([(CT, "1.2")])
    no_transaction, nothing, bad_uid = information([(CT, "1.2")]), information([]), information([(CT, "a b")])
    del no_transaction.TransactionUID
    with asking(node.port, told) as assoc:
        assert ask(assoc, good, instance="1.2.3") == 0x0112
        assert ask(assoc, good, action=2) == 0x0123
        assert ask(assoc, no_transaction) == ask(assoc, nothing) == ask(assoc, bad_uid) == 0x0115
        assert ask(assoc, information([(CT, f"1.{n}") for n in range(3)])) == 0x0213
        assert assoc.is_established
    assert states(node) == []


def test_too_many_open_requests_of_a_peer_are_refused_for_the_moment(
    committing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.store.commitments.MAX_OPEN", 1)
    monkeypatch.setattr(commitment, "HERE_S", 0.0)
    node = committing(9, start=False)
    again = information([(CT, "1.2")])
    with asking(node.port, Told()) as assoc:
        assert ask(assoc, again) == 0
        assert ask(assoc, information([(CT, "1.2")])) == 0x0213
        assert ask(assoc, again) == 0


def test_only_peers_it_is_enabled_for_may_ask(committing: Callable[..., Any]) -> None:
    node = committing(9, start=False)
    ae = AE("OTHER")
    ae.add_requested_context(COMMITMENT, [EXPLICIT])
    ae.add_requested_context("1.2.840.10008.1.1")
    assoc = ae.associate("127.0.0.1", node.port, ae_title="DICOM_NODE")
    assert [str(cx.abstract_syntax) for cx in assoc.accepted_contexts] == ["1.2.840.10008.1.1"]
    assoc.release()


def test_other_work_goes_on_while_a_report_is_unanswered(
    committing: Callable[..., Any], stored: Callable[..., list[str]], raw_peer: Callable[[int], Any]
) -> None:
    node = committing(9)
    kept = stored(node.port, 1)
    peer = raw_peer(node.port)
    contexts = [(1, COMMITMENT, [EXPLICIT]), (3, "1.2.840.10008.1.1", [EXPLICIT])]
    assert peer.associate(contexts, calling="SCANNER")[0] == 2
    _send_action(peer, information([(CT, kept[0])]))
    assert peer.read_command().Status == 0
    report = peer.read_command()
    assert (report.CommandField, report.EventTypeID) == (0x0100, 1)
    peer.read_pdu()
    peer.send_command(
        3, AffectedSOPClassUID="1.2.840.10008.1.1", CommandField=0x30, MessageID=9, CommandDataSetType=257
    )
    echoed = peer.read_command()
    assert (echoed.CommandField, echoed.MessageIDBeingRespondedTo) == (0x8030, 9)
    answer = {"CommandField": 0x8100, "MessageIDBeingRespondedTo": report.MessageID, "CommandDataSetType": 257}
    peer.send_command(1, **answer, Status=0)
    deadline = time.monotonic() + 5
    while states(node) != [("reported", 1)] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert states(node) == [("reported", 1)]


# --- the node as SCU


def destination(port: int, wait_s: float = 5.0) -> Destination:
    times = CommitmentTimes(wait_s=wait_s, timeout_s=60.0)
    return Destination(name="PACS", ae_title="PACS", host="127.0.0.1", port=port, commitment=times)


class Pacs:
    """A peer that commits as it is told: on the same association, before or after its answer; or never."""

    def __init__(self, status: int = 0, here: bool = True) -> None:
        self.status, self.here = status, here
        self.asked: list[Dataset] = []
        self.answers: list[int] = []
        self.roles: list[Any] = []

    def handle(self, event: Any) -> tuple[int, None]:
        asked = event.action_information
        self.asked.append(asked)
        if self.here and not self.status:
            threading.Thread(target=self._report, args=(event.assoc, asked), daemon=True).start()
        return self.status, None

    def _report(self, assoc: Any, asked: Dataset) -> None:
        time.sleep(0.05)
        status, _ = assoc.send_n_event_report(asked, 1, COMMITMENT, INSTANCE)
        self.answers.append(status.Status)

    @contextmanager
    def listening(self) -> Iterator[int]:
        ae = AE("PACS")
        ae.add_supported_context(COMMITMENT, [EXPLICIT])
        server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_N_ACTION, self.handle)])
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def question(*uids: str) -> dict[str, list[ObjectReference]]:
    return {generate_uid(): [ObjectReference(CT, uid) for uid in uids]}


def test_a_destination_reports_on_the_association_of_the_question(wire: str, wait_for: Callable[..., None]) -> None:
    pacs, reports = Pacs(), []
    asker = DimseCommitment(QUICK, "DICOM_NODE", open_link(wire))
    asked = question("1.2.3", "1.2.4")
    with pacs.listening() as port:
        asker.ask(destination(port), asked, reports.append, lambda: not reports, lambda: None)
        wait_for(lambda: pacs.answers, 5, "the answer to the report")
    ((transaction, references),) = asked.items()
    assert reports == [CommitmentReport(transaction_uid=transaction, committed=tuple(references))]
    assert pacs.answers == [0]


def test_a_report_nobody_asked_for_is_answered_so(wire: str, wait_for: Callable[..., None]) -> None:
    pacs, seen = Pacs(), []

    def refuse(report: CommitmentReport) -> None:
        seen.append(report)
        raise NotFound("no such question")

    asker = DimseCommitment(QUICK, "DICOM_NODE", open_link(wire))
    with pacs.listening() as port:
        asker.ask(destination(port), question("1.2"), refuse, lambda: not seen, lambda: None)
        wait_for(lambda: pacs.answers, 5, "the answer to the report")
    assert pacs.answers == [0x0115]


def test_a_destination_that_says_nothing_is_waited_for_only_so_long(wire: str) -> None:
    asker = DimseCommitment(QUICK, "DICOM_NODE", open_link(wire))
    with Pacs(here=False).listening() as port:
        began = time.monotonic()
        asker.ask(destination(port, 0.5), question("1.2"), lambda report: None, lambda: True, lambda: None)
        assert 0.5 <= time.monotonic() - began < 3.0
        began = time.monotonic()  # and once it was waited for in vain, hardly at all
        asker.ask(destination(port, 30.0), question("1.2"), lambda report: None, lambda: True, lambda: None)
        assert time.monotonic() - began < 10.0
    with pytest.raises(DeliveryUnavailable):
        asker.ask(destination(port), question("1.2"), lambda report: None, lambda: True, lambda: None)


def test_a_destination_that_does_not_take_the_question_is_an_error(wire: str, serve: Callable[..., Any]) -> None:
    asker = DimseCommitment(QUICK, "DICOM_NODE", open_link(wire))
    with Pacs(status=0x0110).listening() as port, pytest.raises(CommitmentNotTaken, match="0110H"):
        asker.ask(destination(port), question("1.2"), lambda report: None, lambda: True, lambda: None)
    node = serve(ae_titles=["PACS"])
    with pytest.raises(CommitmentNotTaken, match="not accepted"):
        asker.ask(destination(node.port), question("1.2"), lambda report: None, lambda: True, lambda: None)


@pytest.mark.parametrize("with_role", [True, False])
def test_a_report_on_an_association_of_the_destination_needs_its_question(
    serve: Callable[..., Any], with_role: bool
) -> None:
    node = serve(
        peers={"pacs": {"ae_title": "PACS"}},
        destinations={"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": 9, "storage_commitment": True}},
    )
    ae = AE("PACS")
    ae.add_requested_context(COMMITMENT, [EXPLICIT])
    roles = [build_role(COMMITMENT, scp_role=True)] if with_role else []
    assoc = ae.associate("127.0.0.1", node.port, ae_title="DICOM_NODE", ext_neg=roles)
    (context,) = assoc.accepted_contexts
    assert (context.as_scp, context.as_scu) == ((True, False) if with_role else (False, True))
    if with_role:
        status, _ = assoc.send_n_event_report(information([(CT, "1.2")]), 1, COMMITMENT, INSTANCE)
        assert status.Status == 0x0115
    status, _ = assoc.send_n_action(information([(CT, "1.2")]), 1, COMMITMENT, INSTANCE) if not with_role else (None, 0)
    assert status is None or status.Status == 0x0124
    assoc.release()
