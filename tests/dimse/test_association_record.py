"""A record of associations that fails in ways nobody thought of: the next one is made nevertheless."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dicom_node.dimse import pynetdicom_scp, server

EXPLICIT, CT = "1.2.840.10008.1.2.1", "1.2.840.10008.5.1.4.1.1.2"


def test_it_is_told_of_traffic_and_of_the_end_after_a_failure_of_any_kind(
    serve: Callable[..., Any],
    raw_peer: Any,
    make_file: Callable[..., Path],
    data_set_bytes: Any,
    monkeypatch: pytest.MonkeyPatch,
    wait_for: Callable[..., None],
) -> None:
    for module in (server, pynetdicom_scp):
        monkeypatch.setattr(module, "TOUCH_S", 0.1)
    node, touched, ended = serve(), [], []

    def fail_of(told: list[object]) -> Callable[..., None]:
        def fail(*what: object) -> None:
            told.append(what)
            raise RuntimeError("out of everything")

        return fail

    monkeypatch.setattr(node.catalog.index, "touch_associations", fail_of(touched))
    monkeypatch.setattr(node.catalog.index, "end_association", fail_of(ended))
    peer, path = raw_peer(node.port), make_file()
    peer.associate([(1, CT, [EXPLICIT])])
    for number in (1, 2):
        before = len(touched)
        peer.send_command(
            1,
            data_set_bytes(path),
            CommandField=1,
            MessageID=number,
            Priority=0,
            CommandDataSetType=0,
            AffectedSOPClassUID=CT,
            AffectedSOPInstanceUID=path.stem,
        )
        assert peer.read_command().Status == 0
        wait_for(lambda: len(touched) > before, 5.0, "the traffic to be told of")  # noqa: B023
    peer.send_pdu(5, bytes(4))
    assert peer.read_pdu()[0] == 6
    assert peer.read_pdu() == (0, b"")
    node.counted.wait_for(lambda c: c.ended == [("TEST", "released")])
    assert len(ended) == 1
