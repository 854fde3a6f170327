"""The steps of a start that load most of the node, as the `recovery` process takes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from dicom_node.clock import SystemClock
from dicom_node.config import NodeConfig
from dicom_node.errors import NodeError
from dicom_node.store.catalog import open_catalog
from dicom_node.wiring import engines, kept_in, put_away, replay_journals

__all__ = ["check_access", "take_step"]


def take_step(config: NodeConfig, order: Mapping[str, Any]) -> None:
    """One of the steps of `recovery.Recovery`, `order` as that has made it. Raises NodeError."""
    match order["step"]:
        case "recover":
            check_access(config)
            _recover(config)
        case "check":
            _check_before_work(config)
        case "end":
            _end_associations(config, set(order["live_epochs"]))


def check_access(config: NodeConfig) -> None:
    """Raises ConfigError for peers that cannot be understood, and for files of users and keys that cannot be used."""
    if config.peers or config.user_identity is not None:
        from dicom_node.dimse.identification import check_users
        from dicom_node.dimse.policy import Policies

        Policies(config)
        check_users(config.user_identity)


def _recover(config: NodeConfig) -> None:
    with closing(open_catalog(config.data_dir, SystemClock(), config.storage)) as catalog:
        catalog.recover()
        if catalog.journal_numbers():
            replay_journals(catalog, config)


def _end_associations(config: NodeConfig, live_epochs: set[str]) -> None:
    with closing(open_catalog(config.data_dir, SystemClock(), config.storage)) as catalog:
        catalog.index.close_dead_epochs(live_epochs)


def _check_before_work(config: NodeConfig) -> None:
    """What keeps a node from running is raised as NodeError; an engine that cannot run is told only."""
    from dicom_node.deciding import node_rules  # slow to load, and receivers wait for the step before

    node_rules(config)
    for name, engine in engines(config).items():
        try:
            with kept_in(name, "check"):
                engine.check()
        except NodeError as exc:  # the node keeps and sends without it; its jobs say why they fail
            sys.stderr.write(f"dicom-node: engine {name} cannot run: {exc}\n")
        put_away(name, engine)
