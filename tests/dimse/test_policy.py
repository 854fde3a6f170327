"""What each peer may do: pure, then on both wires."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dicom_node.auditing import AuditEvent, AuditKind
from dicom_node.config import NodeConfig, RateSettings
from dicom_node.dimse.admission import Admission
from dicom_node.dimse.policy import Policies
from dicom_node.dimse.rates import MAX_ADDRESSES, AddressBuckets, Bucket, Rates
from dicom_node.errors import ConfigError

CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
VERIFICATION = (1, "1.2.840.10008.1.1", ["1.2.840.10008.1.2"])
FIND, GET, MOVE = (f"1.2.840.10008.5.1.4.1.2.2.{number}" for number in (1, 3, 2))
EXPLICIT = "1.2.840.10008.1.2.1"
TOO_MANY, TOO_OFTEN = (3, b"\0\2\3\2"), (3, b"\0\2\3\1")


def policies(**peers: Any) -> Policies:
    return Policies(NodeConfig.model_validate({"peers": peers}))


# --- who is who


def test_of_one_title_from_two_networks_the_smallest_network_counts() -> None:
    found = policies(
        hall={"ae_title": "CT1", "hosts": ["10.0.0.0/8"]},
        room={"ae_title": "CT1", "hosts": ["10.1.2.0/24", "2001:db8::/64"]},
        bench={"ae_title": "CT1", "hosts": ["10.1.2.3"]},
    )

    def name(address: str, calling: str = "CT1") -> str | None:
        policy = found.of(calling, address)[0]
        return policy and policy.name

    assert name("10.9.9.9") == "hall"
    assert name("10.1.2.4") == "room"
    assert name("10.1.2.3") == name("::ffff:10.1.2.3") == "bench"
    assert name("2001:db8::7%eth0") == "room"
    assert name("192.0.2.1") is None and found.of("CT1", "192.0.2.1")[1], "the title is known"
    assert found.of("CT2", "10.1.2.3") == (None, False)


@pytest.mark.parametrize(
    ("peers", "said"),
    [
        ({"a": {"ae_title": "X"}, "b": {"ae_title": "X", "hosts": ["10.0.0.1"]}}, "name the hosts of both"),
        (
            {"a": {"ae_title": "X", "hosts": ["10.0.0.1"]}, "b": {"ae_title": " X", "hosts": ["10.0.0.1/32"]}},
            r"peers\.b\.hosts: 10\.0\.0\.1/32 is given to 'a' too",
        ),
        (
            {"a": {"ae_title": "X", "hosts": ["::1"]}, "b": {"ae_title": "X", "hosts": ["::2"], "is_engine": True}},
            "looked up by the title alone",
        ),
        ({"a": {"ae_title": "X", "sop_classes": ["CTStorage"]}}, r"peers\.a\.sop_classes: 'CTStorage' is no storage"),
        ({"a": {"ae_title": "X", "sop_classes": ["1.2.3"]}}, "extra_sop_classes"),
        ({"a": {"ae_title": "X", "move_destinations": ["PACS"]}}, "there is no destination 'PACS'"),
        ({"a": {"ae_title": "X", "services": ["commitment"]}}, "reports need an address"),
        ({"a": {"ae_title": "X", "services": ["store"], "storage_commitment": True}}, "services, storage_commitment"),
        ({"a": {"ae_title": "X", "services": ["worklist"]}}, r"services\.0"),
        ({"a": {"ae_title": "X", "users": ["anna"]}}, "user_identity"),
    ],
)
def test_what_contradicts_itself_is_an_error_that_says_where(peers: Any, said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        policies(**peers)


def test_a_peer_may_move_to_both_of_two_destinations_with_one_title_or_to_neither() -> None:
    """A C-MOVE names a title: which of the two would get the images is not the peer's to say."""
    places = {name: {"ae_title": "PACS", "host": host, "port": 104} for name, host in (("a", "::1"), ("b", "::2"))}

    def made(*allowed: str) -> NodeConfig:
        peers = {"console": {"ae_title": "CONSOLE", "move_destinations": allowed}}
        return NodeConfig.model_validate({"destinations": places, "peers": peers})

    assert made() and made("a", "b")
    with pytest.raises(ValueError, match=r"console\.move_destinations: 'b' and 'a' have the same AE title 'PACS'"):
        made("b")


def test_titles_are_told_apart_by_case_and_not_by_blanks(serve: Callable[..., Any], raw_peer: Any) -> None:
    node = serve(peers={"ct": {"ae_title": " CT1 "}})
    answers = [raw_peer(node.port).associate([VERIFICATION], calling=title)[0] for title in ("CT1", " CT1", "ct1")]
    assert answers == [2, 2, 3]
    node.counted.wait_for(lambda c: c.rejected == ["calling_ae"])


# --- buckets


class Hands:
    """A clock that is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Hands()
    bucket = Bucket(2.0, 4.0, clock)
    assert [bucket.takes() for _ in range(6)] == [True] * 4 + [False] * 2
    clock.now += 0.5
    assert bucket.takes() and not bucket.takes()
    assert bucket.take(3.0) == pytest.approx(1.5), "taken though it is not there: the debt is paid in 1.5 s"
    assert not bucket.takes()
    clock.now += 60.0
    assert [bucket.takes() for _ in range(5)] == [True] * 4 + [False], "what was not used is not saved up"


def test_nobody_waits_longer_than_a_sender_has_patience() -> None:
    clock = Hands()
    bucket = Bucket(1.0, 1.0, clock)
    assert [bucket.take(most_s=3.0) for _ in range(6)] == [0.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    clock.now += 3.0
    assert bucket.take(most_s=3.0) == 1.0, "what was remitted is not owed"


def test_of_a_flood_of_addresses_only_so_many_are_kept() -> None:
    clock = Hands()
    buckets = AddressBuckets(1.0, clock)
    for number in range(MAX_ADDRESSES + 10):
        assert buckets.of(f"a{number}").takes()
    assert len(buckets._buckets) <= MAX_ADDRESSES
    assert not buckets.of(f"a{MAX_ADDRESSES}").takes()
    clock.now += 120.0
    buckets.of("another")
    assert len(buckets._buckets) < 3, "those that were used up long ago are forgotten"


def test_whoever_has_an_ipv6_network_is_one_address() -> None:
    buckets = AddressBuckets(2.0, Hands())
    addresses = ("2001:db8::1", "2001:db8::2", "2001:db8::ffff:1%eth0")
    assert [buckets.of(address).takes() for address in addresses] == [True, True, False]
    assert buckets.of("2001:db8:0:1::1").takes()
    assert buckets.of("192.0.2.1").takes() and buckets.of("::ffff:192.0.2.1").takes()
    assert not buckets.of("192.0.2.1").takes()


def test_associations_beyond_the_rate_are_rejected_for_the_moment() -> None:
    config = NodeConfig.model_validate({"peers": {"a": {"ae_title": "A", "rate": {"associations_per_minute": 2}}}})
    admission = Admission(config)

    def judged(**changes: Any) -> Any:
        facts = {"calling": "A", "called": "DICOM_NODE", "address": "::1", "established": 0}
        return admission.judge(**{"application_context": "1.2.840.10008.3.1.1.1", **facts, **changes})

    assert judged(called="OTHER").reason == "called_ae", "what is rejected for another reason costs nothing"
    assert [judged(), judged()] == [None, None]
    rejection = judged()
    assert (rejection.result, rejection.source, rejection.diagnostic, rejection.reason) == (2, 3, 1, "rate")


def test_without_a_bound_there_is_no_bucket_and_no_request_is_looked_at() -> None:
    rates = Rates(RateSettings(queries_per_minute=5))
    assert (rates.objects, rates.data, rates.associations) == (None, None, None)
    found, _ = policies(a={"ae_title": "A", "max_associations": 3}).of("A", "::1")
    assert found is not None and found.is_open


# --- services and SOP classes


class Trail:
    """An audit trail that is a list."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    def record(self, event: AuditEvent) -> None:
        self.events.append(event)

    def settled(self, timeout_s: float = 5.0) -> bool:
        return True


def results(body: bytes) -> dict[int, int]:
    """Result of each context of an A-ASSOCIATE-AC."""
    found, position = {}, 68
    while position < len(body):
        kind, length = body[position], int.from_bytes(body[position + 2 : position + 4], "big")
        if kind == 0x21:
            found[body[position + 4]] = body[position + 6]
        position += 4 + length
    return found


CONTEXTS = [
    VERIFICATION,
    (3, CT, [EXPLICIT]),
    (5, MR, [EXPLICIT]),
    *((number, uid, [EXPLICIT]) for number, uid in ((7, FIND), (9, GET), (11, MOVE))),
]


@pytest.mark.parametrize(
    ("peer", "accepted"),
    [
        ({}, {1, 3, 5, 7, 9, 11}),
        ({"services": ["echo", "store"]}, {1, 3, 5}),
        ({"services": ["find", "get"]}, {7, 9}),
        ({"services": ["store", "move"], "sop_classes": ["CTImageStorage"]}, {3, 11}),
        ({"sop_classes": [MR]}, {1, 5, 7, 9, 11}),
    ],
)
def test_a_peer_gets_the_contexts_of_what_it_may_do(
    serve: Callable[..., Any], raw_peer: Any, peer: Any, accepted: set[int]
) -> None:
    node = serve(peers={"peer": {"ae_title": "TEST", **peer}, "other": {"ae_title": "OTHER"}})
    kind, body = raw_peer(node.port).associate(CONTEXTS)
    assert kind == 2
    refused = {number for number, result in results(body).items() if result}
    assert {number for number, result in results(body).items() if result == 0} == accepted
    assert {results(body)[number] for number in refused} <= {1}, "user rejection: the node could, the peer may not"
    assert node.counted.refused == ["policy"] * len(refused)
    assert 1 in results(raw_peer(node.port).associate(CONTEXTS, calling="OTHER")[1]), "another peer's answer is its own"


def test_what_shares_a_context_with_what_is_allowed_is_not_authorised(
    serve: Callable[..., Any], raw_peer: Any, dcmtk: Callable[..., Any], make_file: Callable[..., Path]
) -> None:
    """A storage context that is there for C-GET takes no C-STORE."""
    trail = Trail()
    node = serve(
        audit=trail,
        peers={"reader": {"ae_title": "TEST", "services": ["find", "get"]}, "ct": {"ae_title": "CT1"}},
    )
    path = make_file()
    dcmtk("storescu", "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", node.port, path)
    role = b"\x54\0" + (len(CT) + 4).to_bytes(2, "big") + len(CT).to_bytes(2, "big") + CT.encode() + b"\1\1"
    peer = raw_peer(node.port)
    kind, body = peer.associate([(1, CT, [EXPLICIT]), (3, GET, [EXPLICIT])], user=role)
    assert (kind, results(body)) == (2, {1: 0, 3: 0})
    assert CT.encode() + b"\0\1" in body, "it may be SCP, and no SCU"
    for number in (1, 2):
        peer.send_command(
            1,
            b"\x08\0\x18\0UI\x04\0001.2\0",
            AffectedSOPClassUID=CT,
            CommandField=1,
            MessageID=number,
            Priority=0,
            CommandDataSetType=1,
            AffectedSOPInstanceUID="1.2.3",
        )
        answer = peer.read_command()
        assert (answer.MessageIDBeingRespondedTo, answer.Status) == (number, 0x0124)
    alerts = [event for event in trail.events if event.kind is AuditKind.SECURITY_ALERT]
    assert len(alerts) == 2 and alerts[0].participants[0].ae_title == "TEST"
    assert ("store", 0x0124) in node.counted.answered


def test_a_move_goes_only_where_the_peer_may_send(serve: Callable[..., Any], dcmtk: Callable[..., Any]) -> None:
    here = {"host": "127.0.0.1", "port": 9}
    node = serve(
        destinations={"pacs": {"ae_title": "PACS", **here}, "web": {"ae_title": "WEB", **here}},
        peers={"console": {"ae_title": "CONSOLE", "move_destinations": ["pacs"]}},
    )
    for destination in ("WEB", "ELSEWHERE", "PACS"):
        dcmtk(
            *("movescu", "-S", "-aet", "CONSOLE", "-aem", destination, "-aec", "DICOM_NODE"),
            *("-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID=1.2.3", "127.0.0.1", node.port),
            check=False,
        )
    node.counted.wait_for(lambda c: len(c.answered) == 3)
    assert node.counted.answered == [("move", 0x0124), ("move", 0x0124), ("move", 0)]


# --- how many, how fast


def test_a_peer_has_so_many_associations_and_the_others_are_not_concerned(
    serve: Callable[..., Any], raw_peer: Any
) -> None:
    node = serve(peers={"few": {"ae_title": "FEW", "max_associations": 2}, "ct": {"ae_title": "CT1"}})
    held = [raw_peer(node.port) for _ in range(2)]
    assert [peer.associate([VERIFICATION], calling="FEW")[0] for peer in held] == [2, 2]
    assert raw_peer(node.port).associate([VERIFICATION], calling="FEW") == TOO_MANY
    assert raw_peer(node.port).associate([VERIFICATION], calling="CT1")[0] == 2
    assert node.counted.rejected == ["limit"]
    held.pop().close()
    node.counted.wait_for(lambda c: c.ended)
    assert raw_peer(node.port).associate([VERIFICATION], calling="FEW")[0] == 2


def test_queries_beyond_the_rate_are_out_of_resources(serve: Callable[..., Any], dcmtk: Callable[..., Any]) -> None:
    node = serve(peers={"console": {"ae_title": "CONSOLE", "rate": {"queries_per_minute": 2}}})
    for _ in range(3):
        dcmtk(
            *("findscu", "-S", "-aet", "CONSOLE", "-aec", "DICOM_NODE", "-k", "QueryRetrieveLevel=STUDY"),
            *("-k", "StudyInstanceUID", "127.0.0.1", node.port),
            check=False,
        )
    dcmtk(
        *("getscu", "-S", "-aet", "CONSOLE", "-aec", "DICOM_NODE", "-k", "QueryRetrieveLevel=STUDY"),
        *("-k", "StudyInstanceUID=1.2.3", "127.0.0.1", node.port),
        check=False,
    )
    dcmtk("echoscu", "-aet", "CONSOLE", "-aec", "DICOM_NODE", "127.0.0.1", node.port)
    node.counted.wait_for(lambda c: len(c.answered) == 5)
    answered = [("find", 0), ("find", 0), ("find", 0xA700), ("get", 0xA702), ("echo", 0)]
    assert node.counted.answered == answered, "a C-ECHO is no query"


@pytest.mark.parametrize("rate", [{"objects_per_s": 5}, {"bytes_per_s": 65536}])
def test_a_sender_that_is_too_fast_is_read_later_and_loses_nothing(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], make_file: Callable[..., Path], rate: Any
) -> None:
    node = serve(peers={"fast": {"ae_title": "FAST", "rate": rate}, "ct": {"ae_title": "CT1"}})
    paths = [make_file(pixels=64) for _ in range(12)]  # 8 KiB each
    if "bytes_per_s" in rate:
        paths = [make_file(pixels=256)]  # 128 KiB: a second's worth is free
    began = time.monotonic()
    dcmtk("storescu", "-aet", "FAST", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *paths)
    took = time.monotonic() - began
    assert took > 0.9, "of 12 objects 5 were free, and the next ones came every 0.2 s"
    assert node.counted.answered == [("store", 0)] * len(paths)
    node.counted.wait_for(lambda c: c.ended == [("FAST", "released")])


@pytest.mark.parametrize("wire", ["own"])
def test_those_who_are_slowed_down_hold_no_thread(
    serve: Callable[..., Any],
    raw_peer: Any,
    wait_for: Callable[..., None],
    begun_threads: Callable[[], list[str]],
    dcmtk: Callable[..., Any],
) -> None:
    node = serve(peers={"fast": {"ae_title": "TEST", "rate": {"objects_per_s": 0.01}}, "ct": {"ae_title": "CT1"}})
    threads = len(begun_threads())
    peers = [raw_peer(node.port) for _ in range(30)]
    for number, peer in enumerate(peers):
        assert peer.associate([(1, CT, [EXPLICIT])])[0] == 2
        peer.send_command(
            1,
            b"",
            AffectedSOPClassUID=CT,
            CommandField=1,
            MessageID=1,
            Priority=0,
            CommandDataSetType=1,
            AffectedSOPInstanceUID=f"1.2.{number}",
        )
        assert peer.read_command().Status >> 12 == 0xC
    for peer in peers[1:]:  # said at once, heard in a hundred seconds
        peer.send_command(1, CommandField=0x30, MessageID=2, CommandDataSetType=0x101, AffectedSOPClassUID="1.2")
    wait_for(lambda: len(begun_threads()) <= threads, 20.0, "the threads to be free")
    dcmtk("echoscu", "-aet", "CT1", "-aec", "DICOM_NODE", "127.0.0.1", node.port)
    assert node.server.active_associations >= 30
    began = time.monotonic()
    node.server.stop(5.0)
    assert time.monotonic() - began < 10.0


def test_an_association_takes_so_many_objects_and_the_next_one_goes_on(
    serve: Callable[..., Any], dcmtk: Callable[..., Any], make_file: Callable[..., Path]
) -> None:
    node = serve(bounds={"objects_per_association": 2})
    paths = [make_file() for _ in range(3)]
    said = dcmtk("storescu", "-v", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *paths, check=False).stdout
    node.counted.wait_for(lambda c: len(c.answered) == 3)
    assert [status for _, status in node.counted.answered] == [0, 0, 0xA700], said
    dcmtk("storescu", "-aec", "DICOM_NODE", "127.0.0.1", node.port, paths[2])
    node.counted.wait_for(lambda c: c.answered[-1] == ("store", 0))


@pytest.fixture
def two_receivers(serve: Callable[..., Any]) -> Iterator[Any]:
    import os
    import socket

    from dicom_node.places import Places, new_places

    fd = new_places(2, 2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield lambda **settings: [
            serve(sock=listener.dup(), neighbours=Places(fd, number, 2), **settings) for number in range(2)
        ]
    os.close(fd)


def test_a_peers_limit_holds_for_all_receivers(two_receivers: Any, raw_peer: Any) -> None:
    servers = two_receivers(peers={"ct": {"ae_title": "CT1"}, "few": {"ae_title": "FEW", "max_associations": 3}})
    held = [raw_peer(servers[0].port) for _ in range(3)]
    assert [peer.associate([VERIFICATION], calling="FEW")[0] for peer in held] == [2, 2, 2]
    for _ in range(4):  # whichever takes it
        assert raw_peer(servers[0].port).associate([VERIFICATION], calling="FEW") == TOO_MANY
        assert raw_peer(servers[0].port).associate([VERIFICATION], calling="CT1")[0] == 2


def test_receivers_pay_from_one_purse() -> None:
    """Whichever of them is asked; and one that is new, or came back, finds what was taken."""
    import os

    from dicom_node.places import Places, new_places

    clock = Hands()
    settings = RateSettings(objects_per_s=4, queries_per_minute=3)
    fd = new_places(3, 2)
    first, second = (Rates(settings, clock, Places(fd, number, 2).paid(1)) for number in (0, 1))
    assert first.queries is not None and second.queries is not None
    assert [first.queries.takes(), second.queries.takes(), first.queries.takes()] == [True] * 3
    assert not second.queries.takes() and not first.queries.takes()
    assert first.objects is not None and second.objects is not None
    assert [first.objects.take(), second.objects.take(4.0)] == [0.0, pytest.approx(0.25)]
    Places(fd, 0, 2).leave()
    again = Rates(settings, clock, Places(fd, 0, 2).paid(1)).queries
    assert again is not None and not again.takes()
    another = Rates(settings, clock, Places(fd, 0, 2).paid(0)).queries
    assert another is not None and another.takes(), "another peer has its own"
    assert Places(fd, 2, 2).established(1) == 0, "and what receivers count is not touched by it"
    clock.now += 20.0
    assert second.queries.takes() and not first.queries.takes()
    os.close(fd)


def test_a_rate_holds_for_all_receivers(two_receivers: Any, raw_peer: Any) -> None:
    rate = {"associations_per_minute": 4}
    servers = two_receivers(peers={"ct": {"ae_title": "CT1"}, "often": {"ae_title": "OFTEN", "rate": rate}})
    answers = [raw_peer(servers[0].port).associate([VERIFICATION], calling="OFTEN") for _ in range(10)]
    assert [answer == TOO_OFTEN for answer in answers] == [False] * 4 + [True] * 6
    assert raw_peer(servers[0].port).associate([VERIFICATION], calling="CT1")[0] == 2


@pytest.mark.parametrize("wire", ["own"])
def test_a_sender_whose_bytes_are_counted_is_not_read_far_ahead(serve: Callable[..., Any], raw_peer: Any) -> None:
    """What lies in our buffers when its last byte has left is what it waits for, and senders wait a minute."""
    import socket

    node = serve(peers={"slow": {"ae_title": "SLOW", "rate": {"bytes_per_s": 65536}}, "ct": {"ae_title": "CT1"}})
    ahead = {}
    for calling in ("SLOW", "CT1"):
        peer = raw_peer(node.port)
        assert peer.associate([VERIFICATION], calling=calling)[0] == 2
        (association,) = [one for one in node.server._living() if one.log_fields["calling_ae_title"] == repr(calling)]
        association.wake()
        ahead[calling] = association._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), len(association._view)
        association.rest()
    assert ahead["SLOW"] == (128 * 1024, 16 * 1024), "the system doubles what it is told"
    assert ahead["CT1"][1] == 256 * 1024
