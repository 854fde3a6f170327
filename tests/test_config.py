"""What counts as this machine, and what errors about settings show."""

from pathlib import Path

import pytest

from dicom_node.config import NodeConfig, is_loopback, load_config
from dicom_node.errors import ConfigError
from dicom_node.model import TlsClient


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.8.9.10", "::1", "[::1]", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "localhost", "LocalHost"),
        " 127.0.0.1 ",
    ],
)
def test_a_loopback_address_and_localhost_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        *("127.evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "127.", "127", "2130706433"),
        *("", "0.0.0.0", "::", "10.0.0.7", "::ffff:10.0.0.7", "fe80::1", "engine.example"),
    ],
)
def test_any_other_name_or_address_may_lead_elsewhere(host: str) -> None:
    assert not is_loopback(host)


def test_a_name_that_begins_like_loopback_opens_nothing_without_peers() -> None:
    with pytest.raises(ValueError, match="no peers are configured"):
        NodeConfig(host="127.evil.example")
    assert NodeConfig(host="LOCALHOST").host == "LOCALHOST"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("engines: {cxr: {kind: leapai, token: eyJ-secret}}", "engines.cxr.token"),
        ("engines: {cxr: {kind: leapai, options: eyJ-secret}}", "engines.cxr.options"),
        ("engines: {cxr: eyJ-secret}", "engines.cxr"),
        ("engines: eyJ-secret", "engines"),
        ("http_public_url: 'https://node:eyJ-secret@host/'", "http_public_url"),
        ("token: eyJ-secret", "token"),
    ],
)
def test_an_error_names_the_key_and_not_what_may_be_a_secret(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f": {key}: ") as caught:
        load_config(path, environ={})
    assert "secret" not in str(caught.value)


def test_an_error_shows_a_value_that_is_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text("engines: {cxr: {timeout_s: soon}}\ndicom_port: 99999")
    with pytest.raises(ConfigError, match=r"got 'soon'.*got 99999|got 99999.*got 'soon'"):
        load_config(path, environ={})


def test_what_is_no_yaml_is_told_by_its_place_and_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text("host: 127.0.0.1\nengines: {cxr: {options: {token: 'eyJ-secret}}}\n")
    with pytest.raises(ConfigError, match=r"not readable as YAML: .*line 3, column 1") as caught:
        load_config(path, environ={})
    with pytest.raises(ConfigError, match="DICOM_NODE_ENGINES: not readable as YAML") as of_variable:
        load_config(None, environ={"DICOM_NODE_ENGINES": "{cxr: {token: eyJ-secret"})
    assert "secret" not in str(caught.value) + str(of_variable.value)


TLS = {"certificate": "node.pem", "key": "node.key", "ca": "ca.pem"}
PEER = {"ct": {"ae_title": "CT1"}}


@pytest.mark.parametrize(
    "settings",
    [
        {"peers": PEER},
        {"allow_any_peer": True},
        {"tls": TLS},
        {"tls": {**TLS, "client_auth": "none"}, "peers": PEER},
        {"tls": {**TLS, "port": 2762}, "allow_any_peer": True},
    ],
)
def test_other_machines_may_reach_a_node_that_knows_them_or_was_told_to_trust_all(settings: dict[str, object]) -> None:
    assert NodeConfig.model_validate({"host": "0.0.0.0", **settings}).host == "0.0.0.0"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tls": {**TLS, "client_auth": "none"}},
        {"tls": {**TLS, "port": 2762}},  # the plain port is open to all
    ],
)
def test_tls_that_asks_for_no_certificate_or_leaves_a_plain_port_opens_nothing(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no peers are configured"):
        NodeConfig.model_validate({"host": "0.0.0.0", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allow_any_peer": True, "peers": PEER}, "only they may connect"),
        ({"tls": {"certificate": "a", "key": "b"}}, "clients must show a certificate"),
        ({"tls": TLS, "wire": "pynetdicom"}, "tls: pynetdicom's wire carries no TLS; set `wire: own`"),
        (
            {"wire": "pynetdicom", "destinations": {"P": {"ae_title": "P", "host": "p", "port": 104, "tls": True}}},
            "destinations.P.tls: pynetdicom's wire carries no TLS",
        ),
        ({"peers": {"ct": {"ae_title": "CT1", "certificates": ["ab" * 32]}}}, "nobody is asked for a certificate"),
        ({"peers": {"ct": {"ae_title": "CT1", "certificates": ["ab"]}}}, "'ab' is no SHA-256 fingerprint"),
        ({"tls": {**TLS, "key_passphrase_env": "DICOM_NODE_KEY"}}, "use another name"),
        ({"tls": {**TLS, "key_passphrase_env": "A", "key_passphrase_file": "b"}}, "keep one"),
        ({"tls": {**TLS, "profile": "ssl3"}}, "profile"),
    ],
)
def test_tls_settings_that_contradict_each_other_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NodeConfig.model_validate(settings)


def test_a_destination_takes_from_the_node_what_it_does_not_set() -> None:
    def of(tls: object) -> TlsClient | None:
        entry = {"ae_title": "P", "host": "p", "port": 2762, "tls": tls}
        return NodeConfig.model_validate({"tls": TLS, "destinations": {"P": entry}}).destination("P").tls

    assert of(False) is None
    assert of(True) == TlsClient(ca="ca.pem", certificate="node.pem", key="node.key")
    assert of({"server_name": "pacs"}) == TlsClient(
        ca="ca.pem", certificate="node.pem", key="node.key", server_name="pacs"
    )
    assert of({"ca": "other.pem", "certificate": "c.pem", "key": "k.pem"}) == TlsClient(
        ca="other.pem", certificate="c.pem", key="k.pem"
    )


def test_a_peer_that_may_ask_for_storage_commitment_needs_an_address_for_its_reports() -> None:
    with pytest.raises(ValueError, match=r"set report_host and report_port to where 'CT1' takes associations"):
        NodeConfig.model_validate({"peers": {"ct": {"ae_title": "CT1", "storage_commitment": True}}})
    address = {"report_host": "10.1.2.3", "report_port": 104}
    peers = {"ct": {"ae_title": "CT1", "storage_commitment": True, **address}, "pacs": {"ae_title": "PACS"}}
    (peer,) = NodeConfig.model_validate({"peers": peers}).committed_to().values()
    assert (peer.ae_title, peer.host, peer.port, peer.tls) == ("CT1", "10.1.2.3", 104, None)
    peers["ct"]["report_tls"] = {"ca": "lab.pem"}
    (peer,) = NodeConfig.model_validate({"peers": peers}).committed_to().values()
    assert peer.tls is not None and peer.tls.ca == "lab.pem"
    with pytest.raises(ValueError, match=r"peers\.ct\.report_tls: pynetdicom's wire carries no TLS"):
        NodeConfig.model_validate({"peers": peers, "wire": "pynetdicom"})


def test_a_destination_is_asked_for_storage_commitment_by_a_word_or_by_times() -> None:
    address = {"ae_title": "PACS", "host": "h", "port": 104}
    destinations = {
        "silent": address,
        "asked": {**address, "storage_commitment": True},
        "slow": {**address, "ae_title": "SLOW", "storage_commitment": {"timeout_s": 60}},
    }
    config = NodeConfig.model_validate({"destinations": destinations})
    again = NodeConfig.model_validate(config.model_dump(mode="json"))  # as the processes of a node are told
    for one in (config, again):
        times = {name: one.destination(name).commitment for name in destinations}
        assert times["silent"] is None and times["asked"] is not None and times["slow"] is not None
        assert (times["asked"].timeout_s, times["slow"].timeout_s) == (3600.0, 60.0)
        assert one.asked_to_commit() == {"PACS": {"asked"}, "SLOW": {"slow"}}
