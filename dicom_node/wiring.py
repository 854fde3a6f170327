"""How settings become collaborators: what the node's processes and the commands share. Part of the composition root."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError
from dicom_node.interfaces import Clock, Engine, ResultEncoder
from dicom_node.model import (
    ConflictPolicy,
    Destination,
    InstanceRecord,
    Origin,
    Source,
    StoreOutcome,
    StoreResult,
)
from dicom_node.pipeline.ingest import Ingest
from dicom_node.plugins import encoder_class, encoder_kinds, engine_class, is_own_engine
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.queue import QueueOptions

__all__ = [
    "CountedIngest",
    "destinations",
    "encoders",
    "engines",
    "models_dir",
    "node_catalog",
    "node_ingest",
    "origin_for",
    "policy_for",
]


def node_catalog(config: NodeConfig, clock: Clock) -> Catalog:
    """The node's catalog, opened. Raises StorageError."""

    def takes(destination: str, modality: str) -> bool:
        known = config.destinations.get(destination)
        return known is None or known.results is None or modality.lower() in known.results

    options = QueueOptions(
        takes=takes,
        immediate_modalities=config.completion.immediate_modalities,
        analyse_conflicts=config.analyse_identity_conflicts,
    )
    return open_catalog(config.data_dir, clock, config.storage, options=options)


# --- intake


class IntakeObserver(Protocol):
    """`metrics.Metrics`, as far as intake goes."""

    def instance_received(
        self, calling_ae_title: str, modality: str, outcome: str, length: int = 0, *, irregular_uids: bool = False
    ) -> None:
        """A C-STORE was answered."""
        ...


def node_ingest(
    catalog: Catalog,
    config: NodeConfig,
    clock: Clock,
    on_stored: Callable[[InstanceRecord, StoreOutcome], None] | None = None,
) -> Ingest:
    """The one door for instances."""
    return Ingest(
        catalog.archive,
        catalog.index,
        conflict_policy_for=policy_for(config),
        origin_for=origin_for(config),
        max_object_bytes=config.storage.max_object_bytes,
        max_inflated_header_bytes=config.storage.max_inflated_header_bytes,
        clock=clock,
        on_stored=on_stored,
    )


class CountedIngest:
    """The door for what peers send (`interfaces.InstanceSink`), with every answer counted."""

    def __init__(self, catalog: Catalog, config: NodeConfig, clock: Clock, observer: IntakeObserver) -> None:
        self._observer = observer
        self._ingest = node_ingest(catalog, config, clock, self._stored)

    def accept(
        self,
        *,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        fragments: Iterable[bytes | memoryview],
        source: Source,
    ) -> StoreResult:
        """See `interfaces.InstanceSink.accept`."""
        result = self._ingest.accept(
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            fragments=fragments,
            source=source,
        )
        if result.outcome is None:  # nothing was stored: the sender's fault (A9xx, Cxxx) or the node's
            outcome = "invalid" if result.status >> 12 == 0xC or result.status >> 8 == 0xA9 else "failed"
            self._observer.instance_received(source.calling_ae_title, "", outcome)
        return result

    def _stored(self, record: InstanceRecord, outcome: StoreOutcome) -> None:
        self._observer.instance_received(
            record.source.calling_ae_title,
            record.header.attributes.get("Modality", ""),
            outcome.value,
            record.file.data_set_length,
            irregular_uids=record.header.irregular_uids,
        )


# --- who is who


def destinations(config: NodeConfig) -> Mapping[str, Destination]:
    """Every configured destination by its name."""
    return {name: config.destination(name) for name in config.destinations}


def origin_for(config: NodeConfig) -> Callable[[Source], Origin]:
    """What an engine sends are results, not images to analyse."""
    engine_titles = {peer.ae_title for peer in config.peers.values() if peer.is_engine}
    return lambda source: Origin.RETURNED if source.calling_ae_title in engine_titles else Origin.RECEIVED


def policy_for(config: NodeConfig) -> Callable[[Source], ConflictPolicy]:
    """The peer's conflict policy, else the node's."""
    policies = {peer.ae_title: peer.conflict_policy for peer in config.peers.values()}
    return lambda source: policies.get(source.calling_ae_title) or config.conflict_policy


# --- engines


def engines(config: NodeConfig, only: str | None = None) -> dict[str, Engine]:
    """Every configured engine, or one, made but not loaded. Raises ConfigError naming the engine's key."""
    if only is not None and only not in config.engines:
        raise ConfigError(f"engines: there is no {only!r} (known: {', '.join(sorted(config.engines)) or 'none'})")
    names = config.engines if only is None else (only,)
    made: dict[str, Engine] = {}
    for name in names:
        settings = config.engines[name]
        more: dict[str, Any] = {}  # kinds of plug-ins promise to take `devices` and no more
        if settings.kind == "local":
            more = {"models_dir": models_dir(config), "jobs": config.jobs}
        elif is_own_engine(settings.kind):
            more = {"data_dir": config.data_dir}
        made[name] = engine_class(settings.kind)(name, settings, devices=config.jobs.devices, **more)
    return made


def models_dir(config: NodeConfig) -> Path:
    """Where `dicom-node models import` installs packages."""
    return config.data_dir / "models"


def encoders() -> list[ResultEncoder]:
    """Every result encoder, in encoding order."""
    return [encoder_class(kind)() for kind in encoder_kinds()]
