"""How settings reach the collaborators: who is who, what is counted."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig, load_config
from dicom_node.deciding import destination_of, zone
from dicom_node.errors import ConfigError
from dicom_node.model import ConflictPolicy, Origin, Source
from dicom_node.store.catalog import Catalog
from dicom_node.store.queue import QueueOptions
from dicom_node.wiring import CountedIngest, encoders, engines, node_catalog, origin_for, policy_for

EXPLICIT_LE = "1.2.840.10008.1.2.1"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


class Counts:
    """Remembers what was counted."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, bool]] = []

    def instance_received(
        self,
        calling_ae_title: str,
        modality: str,
        outcome: str,
        length: int = 0,
        *,
        irregular_uids: bool = False,
        durable_by: str = "",
    ) -> None:
        assert durable_by == ("" if outcome in ("invalid", "failed") else "file"), "there is no journal here"
        self.seen.append((calling_ae_title, modality, outcome, irregular_uids))


def source(calling_ae_title: str) -> Source:
    return Source(calling_ae_title=calling_ae_title, called_ae_title="NODE", address="127.0.0.1")


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    return load_config(
        environ={},
        overrides={
            "data_dir": str(tmp_path / "data"),
            "storage": {"reserve_bytes": 0, "reserve_ratio": 0.0},
            "peers": {
                "ct": {"ae_title": "CT1"},
                "ai": {"ae_title": "AI", "is_engine": True, "conflict_policy": "refuse"},
            },
            "destinations": {"archive": {"ae_title": "PACS", "host": "127.0.0.1", "port": 104, "results": ["sr"]}},
            "time_zone": "-0330",
        },
    )


@pytest.fixture
def catalog(config: NodeConfig) -> Iterator[Catalog]:
    opened = node_catalog(config, SystemClock())
    yield opened
    opened.close()


def data_set(comment: str) -> bytes:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CAPTURE, "1.2.3.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.0"
    ds.Modality, ds.PatientID, ds.ImageComments = "OT", "X", comment
    buffer = BytesIO()
    dcmwrite(buffer, ds, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def test_every_answer_to_a_c_store_is_counted(config: NodeConfig, catalog: Catalog) -> None:
    counts = Counts()
    sink = CountedIngest(catalog, config, SystemClock(), counts)

    def accept(data: bytes, calling: str, uid: str = "1.2.3.1") -> int:
        return sink.accept(
            sop_class_uid=CAPTURE,
            sop_instance_uid=uid,
            transfer_syntax_uid=EXPLICIT_LE,
            fragments=(data,),
            source=source(calling),
        ).status

    assert accept(data_set("first"), "CT1") == 0x0000
    assert accept(data_set("first"), "CT1") == 0x0000
    assert accept(data_set("second"), "CT1") == 0x0000
    assert accept(data_set("third"), "AI") == 0xC409
    assert accept(b"garbage", "CT1") & 0xF000 == 0xC000
    assert accept(data_set("first"), "CT1", uid="1.2.3.2") == 0xA900
    assert [(calling, modality, outcome) for calling, modality, outcome, _ in counts.seen] == [
        ("CT1", "OT", "new"),
        ("CT1", "OT", "duplicate"),
        ("CT1", "OT", "variant"),
        ("AI", "OT", "refused"),
        ("CT1", "", "invalid"),
        ("CT1", "", "invalid"),
    ]


def test_what_an_engine_sends_is_a_result(config: NodeConfig) -> None:
    assert origin_for(config)(source("AI")) is Origin.RETURNED
    assert origin_for(config)(source("CT1")) is Origin.RECEIVED


def test_a_peer_may_have_its_own_conflict_policy(config: NodeConfig) -> None:
    assert policy_for(config)(source("AI")) is ConflictPolicy.REFUSE
    assert policy_for(config)(source("CT1")) is ConflictPolicy.KEEP_FIRST


def test_the_sender_is_a_destination_if_one_has_its_ae_title(config: NodeConfig) -> None:
    assert destination_of(config)("PACS") == "archive"
    assert destination_of(config)("CT1") is None


def test_the_zone_of_the_configuration_is_the_rules_zone(config: NodeConfig) -> None:
    here = SystemClock().wall().astimezone(zone(config))
    assert here.strftime("%z") == "-0330"


def test_every_configured_engine_and_encoder_can_be_made(config: NodeConfig) -> None:
    made = engines(config)
    assert sorted(made) == ["ct-abdomen", "cxr-findings"]
    for engine in made.values():
        engine.close()
    assert [encoder.kind for encoder in encoders()] == ["seg", "labelmap", "sr", "stl", "sc", "pdf", "ann"]


def test_a_destination_is_sent_the_kinds_it_names(config: NodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[QueueOptions] = []
    monkeypatch.setattr("dicom_node.wiring.open_catalog", lambda *_, **given: options.append(given["options"]))
    modalities = {"seg": "SEG", "sr": "SR", "stl": "M3D", "sc": "OT", "pdf": "DOC", "ann": "ANN"}
    assert {*modalities, "labelmap"} == {encoder.kind for encoder in encoders()}
    for kind in modalities:
        only = config.destinations["archive"].model_copy(update={"results": (kind,)})
        node_catalog(config.model_copy(update={"destinations": {"archive": only}}), SystemClock())
        taken = [other for other, modality in modalities.items() if options[-1].takes("archive", modality)]
        assert taken == [kind]
        assert not options[-1].takes("archive", "CT") and options[-1].takes("another", "CT")


def test_an_unknown_engine_names_the_known_ones(config: NodeConfig) -> None:
    with pytest.raises(ConfigError, match="known: ct-abdomen, cxr-findings"):
        engines(config, "nothing")
