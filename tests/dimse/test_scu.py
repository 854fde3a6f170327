"""The node as SCU: sending to a second node, rejections, a folder of files, fetching a study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file

from dicom_node.config import DeliverySettings
from dicom_node.dimse.files import get_study, instance_of_file, send_files
from dicom_node.dimse.session import DimseSender, batches, is_stored
from dicom_node.errors import DeliveryRefused, DeliveryUnavailable, InvalidInstance
from dicom_node.model import Destination, StoredInstance, StoreResult

SETTINGS = DeliverySettings(connect_timeout_s=2.0, response_timeout_s=5.0)
EXPLICIT, IMPLICIT, DEFLATED = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"


def to(port: int, ae_title: str = "DICOM_NODE") -> Destination:
    """That port of this machine."""
    return Destination(name="peer", ae_title=ae_title, host="127.0.0.1", port=port)


def send(port: int, paths: list[Path], ae_title: str = "DICOM_NODE") -> list[tuple[int | None, str]]:
    """Send files as stored instances; status and error of each."""
    results: list[tuple[int | None, str]] = []
    DimseSender(SETTINGS, "SENDER").send(
        to(port, ae_title),
        [instance_of_file(path) for path in paths],
        lambda instance, status, error: results.append((status, error)),
        lambda: None,
    )
    return results


def test_what_is_sent_arrives_byte_for_byte_in_its_own_syntax(
    serve: Callable[..., Any], make_file: Callable[..., Path], data_set_bytes: Any
) -> None:
    node = serve()
    paths = [make_file(pixels=300), make_file(syntax=IMPLICIT), make_file(syntax="1.2.840.10008.1.2.2")]
    assert send(node.port, paths) == [(0, "")] * 3
    for path in paths:
        stored = node.catalog.index.instance(path.stem)
        assert stored.transfer_syntax_uid == dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
        assert Path(stored.path).read_bytes()[stored.data_set_offset :] == data_set_bytes(path)
    node.counted.wait_for(lambda c: c.ended)
    assert node.association_ends() == [("released", 0)]


def test_a_peer_without_the_stored_syntax_gets_it_re_encoded(
    make_file: Callable[..., Path], serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicom_node.dimse.contexts._RANK", {IMPLICIT: 0})
    node = serve()
    path = make_file(pixels=10)
    assert send(node.port, [path]) == [(0, "")]
    stored = node.catalog.index.instance(path.stem)
    assert stored.transfer_syntax_uid == IMPLICIT
    assert dcmread(stored.path) == dcmread(path)


def test_one_refused_object_does_not_stop_the_others(serve: Callable[..., Any], make_file: Callable[..., Path]) -> None:
    node = serve()
    private, good = make_file(SOPClassUID="1.3.6.1.4.1.9999.1"), make_file()
    results = send(node.port, [private, good])
    assert results == [(None, "no presentation context was accepted for its SOP class"), (0, "")]


def test_when_no_context_is_accepted_each_object_fails_by_itself(
    serve: Callable[..., Any], make_file: Callable[..., Path]
) -> None:
    paths = [make_file(SOPClassUID="1.3.6.1.4.1.9999.1") for _ in range(2)]
    assert [status for status, _ in send(serve().port, paths)] == [None, None]


def test_a_permanent_rejection_is_a_refusal(serve: Callable[..., Any], make_file: Callable[..., Path]) -> None:
    node = serve()
    with pytest.raises(DeliveryRefused, match=r"rejected \(1,1,7\)"):
        send(node.port, [make_file()], ae_title="WRONG")


def test_a_transient_rejection_and_a_closed_port_are_worth_another_try(
    serve: Callable[..., Any], make_file: Callable[..., Path], raw_peer: Any, free_port: Callable[[], int]
) -> None:
    node = serve(max_associations=1)
    raw_peer(node.port).associate([(1, "1.2.840.10008.1.1", [IMPLICIT])])
    path = make_file()
    with pytest.raises(DeliveryUnavailable, match=r"rejected \(2,3,2\)"):
        send(node.port, [path])
    with pytest.raises(DeliveryUnavailable):
        send(free_port(), [path])


@pytest.mark.parametrize("status", [0xA700, 0x0110])
def test_a_peer_out_of_resources_ends_the_call_and_nothing_is_reported_as_refused(
    serve: Callable[..., Any], make_file: Callable[..., Path], status: int
) -> None:
    class Full:
        def accept(self, **_: Any) -> StoreResult:
            return StoreResult(status=status)

    with pytest.raises(DeliveryUnavailable, match=f"0x{status:04X}"):
        send(serve(sink=Full()).port, [make_file()])


@pytest.mark.parametrize(
    ("status", "stored"), [(0xB000, True), (0x0111, True), (0xC409, False), (0xA900, False), (0x0122, False)]
)
def test_other_statuses_are_reported_for_the_object(
    serve: Callable[..., Any], make_file: Callable[..., Path], status: int, stored: bool
) -> None:
    class Answering:
        def accept(self, **_: Any) -> StoreResult:
            return StoreResult(status=status)

    ((answered, error),) = send(serve(sink=Answering()).port, [make_file()])
    assert answered == status
    assert is_stored(answered) is stored
    assert (error == "") is stored


def test_a_file_that_is_gone_or_short_fails_alone(serve: Callable[..., Any], make_file: Callable[..., Path]) -> None:
    node = serve()
    gone, short, good = make_file(), make_file(pixels=8), make_file()
    instances = [instance_of_file(path) for path in (gone, short, good)]
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-10])
    results: list[tuple[int | None, str]] = []
    DimseSender(SETTINGS, "SENDER").send(
        to(node.port), instances, lambda instance, status, error: results.append((status, error)), lambda: None
    )
    assert [status for status, _ in results] == [None, None, 0]


def test_a_lost_lease_aborts_the_association(serve: Callable[..., Any], make_file: Callable[..., Path]) -> None:
    class LeaseGone(Exception):
        pass

    beats = iter([True, True, False])

    def heartbeat() -> None:
        if not next(beats):
            raise LeaseGone

    node = serve()
    instances = [instance_of_file(make_file()) for _ in range(3)]
    with pytest.raises(LeaseGone):
        DimseSender(SETTINGS, "SENDER").send(to(node.port), instances, lambda *_: None, heartbeat)
    node.counted.wait_for(lambda c: c.ended)
    assert node.counted.ended == [("SENDER", "aborted")]


def test_echo_asks_whether_a_peer_is_there(serve: Callable[..., Any], free_port: Callable[[], int]) -> None:
    sender = DimseSender(SETTINGS, "SENDER")
    assert sender.echo(to(serve().port)) == 0
    with pytest.raises(DeliveryUnavailable):
        sender.echo(to(free_port()))


def test_instances_are_batched_by_the_contexts_they_need(make_file: Callable[..., Path]) -> None:
    model = instance_of_file(make_file())
    instances = [
        StoredInstance(
            **{
                **{name: getattr(model, name) for name in StoredInstance.__dataclass_fields__},
                "sop_class_uid": f"1.2.{number}",
                "transfer_syntax_uid": DEFLATED,
            }
        )
        for number in range(100)
    ]
    found = list(batches(instances))
    assert [instance for batch, _ in found for instance in batch] == instances
    assert [len(contexts) for _, contexts in found] == [126, 126, 48]


def test_a_folder_is_sent_and_what_is_no_dicom_is_named(
    serve: Callable[..., Any], make_file: Callable[..., Path], tmp_path: Path
) -> None:
    node = serve()
    text = tmp_path / "notes.txt"
    text.write_text("no DICOM")
    results: dict[str, int | None] = {}
    good = make_file()
    send_files(
        [text, good],
        to(node.port),
        lambda path, status, error: results.update({path.name: status}),
        settings=SETTINGS,
        calling_ae_title="SENDER",
    )
    assert results == {"notes.txt": None, good.name: 0}
    assert node.catalog.index.instance(good.stem) is not None


def test_a_dicomdir_is_no_instance() -> None:
    with pytest.raises(InvalidInstance):
        instance_of_file(Path(get_testdata_file("DICOMDIR")))


def test_a_study_is_fetched_as_it_is_stored(
    serve: Callable[..., Any], make_file: Callable[..., Path], tmp_path: Path, data_set_bytes: Any
) -> None:
    node = serve()
    study = {"StudyInstanceUID": "1.2.826.0.1.3680043.10.9"}
    paths = [make_file(**study, pixels=200), make_file(**study, syntax=IMPLICIT), make_file()]
    send(node.port, paths)
    fetched = get_study(
        to(node.port), study["StudyInstanceUID"], tmp_path / "out", settings=SETTINGS, calling_ae_title="FETCHER"
    )
    assert (fetched.status, fetched.completed, fetched.failed) == (0, 2, 0)
    assert sorted(path.name for path in fetched.files) == sorted(path.name for path in paths[:2])
    for path in paths[:2]:
        got = tmp_path / "out" / path.name
        assert data_set_bytes(got) == data_set_bytes(path)
        assert dcmread(got).file_meta.TransferSyntaxUID == dcmread(path).file_meta.TransferSyntaxUID


def test_an_unknown_study_fetches_nothing(serve: Callable[..., Any], tmp_path: Path) -> None:
    fetched = get_study(to(serve().port), "1.2.3", tmp_path / "out", settings=SETTINGS, calling_ae_title="FETCHER")
    assert (fetched.status, fetched.files) == (0, ())
