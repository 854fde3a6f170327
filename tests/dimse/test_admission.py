"""Who may associate."""

import pytest

from dicom_node.config import NodeConfig
from dicom_node.dimse.admission import Admission
from dicom_node.errors import ConfigError

PEERS = {
    "ct": {"ae_title": "CT1", "hosts": ["10.1.2.3", "192.168.0.0/16"], "idle_timeout_s": 7200},
    "any": {"ae_title": "ROAMING"},
}


def judged(config: NodeConfig, **changes: object) -> tuple[int, int, int] | None:
    """Result, source and reason; None when admitted."""
    facts: dict[str, object] = {
        "calling": "CT1",
        "called": "DICOM_NODE",
        "address": "127.0.0.1",
        "application_context": "1.2.840.10008.3.1.1.1",
        "established": 0,
    }
    rejection = Admission(config).judge(**(facts | changes))  # type: ignore[arg-type]
    return None if rejection is None else (rejection.result, rejection.source, rejection.diagnostic)


def test_without_peers_every_caller_is_admitted() -> None:
    assert judged(NodeConfig(), calling="WHOEVER") is None


def test_the_called_title_must_be_one_of_the_node() -> None:
    assert judged(NodeConfig(), called="OTHER") == (1, 1, 7)
    assert judged(NodeConfig(ae_titles=("A", "OTHER")), called="OTHER") is None
    assert judged(NodeConfig(any_called_ae_title=True), called="OTHER") is None


@pytest.mark.parametrize(
    ("calling", "address", "verdict"),
    [
        ("CT1", "10.1.2.3", None),
        ("CT1", "192.168.77.1", None),
        ("CT1", "::ffff:10.1.2.3", None),
        ("CT1", "10.1.2.4", (1, 1, 3)),
        ("CT1", "fe80::1%eth0", (1, 1, 3)),
        ("CT2", "10.1.2.3", (1, 1, 3)),
        ("ct1", "10.1.2.3", (1, 1, 3)),
        ("ROAMING", "203.0.113.9", None),
    ],
)
def test_with_peers_only_they_are_admitted_from_their_hosts(
    calling: str, address: str, verdict: tuple[int, int, int] | None
) -> None:
    assert judged(NodeConfig.model_validate({"peers": PEERS}), calling=calling, address=address) == verdict


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"established": 2}, (2, 3, 2)),
        ({"application_context": "1.2.3"}, (1, 1, 2)),
        ({"calling": "A\x1bB"}, (1, 1, 3)),
        ({"calling": ""}, (1, 1, 3)),
    ],
)
def test_other_reasons_to_reject(change: dict[str, object], verdict: tuple[int, int, int]) -> None:
    assert judged(NodeConfig(max_associations=2), **change) == verdict


def test_the_idle_limit_is_the_peers_own() -> None:
    admission = Admission(NodeConfig.model_validate({"peers": PEERS, "association_idle_timeout_s": 30}))
    assert admission.policy("CT1", "10.1.2.3").idle_timeout_s == 7200
    assert admission.policy("ROAMING", "203.0.113.9").idle_timeout_s == 30


def test_a_host_that_is_no_address_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"peers\.ct\.hosts: 'pacs\.local'"):
        Admission(NodeConfig.model_validate({"peers": {"ct": {"ae_title": "CT1", "hosts": ["pacs.local"]}}}))
