"""How settings become collaborators: what the node's processes and the commands share. Part of the composition root."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from heapq import merge
from pathlib import Path
from typing import Any, Protocol

from dicom_node.audited import ReceivedStudies
from dicom_node.budget import VolumeMemory
from dicom_node.clock import SystemClock
from dicom_node.config import EngineSettings, NodeConfig, TlsClientSettings
from dicom_node.engines._dicom_options import DicomEngineOptions, dicom_options
from dicom_node.errors import ConfigError, EngineError, EngineUnavailable, NodeError
from dicom_node.interfaces import Clock, Engine, Heartbeat, ResultEncoder, Returns
from dicom_node.model import (
    ConflictPolicy,
    Destination,
    EngineTask,
    InstanceRecord,
    Origin,
    Source,
    StoreOutcome,
    StoreResult,
)
from dicom_node.pipeline.ingest import Ingest
from dicom_node.pipeline.replay import replay
from dicom_node.plugins import encoder_class, encoder_kinds, engine_class, is_own_engine
from dicom_node.store.catalog import Catalog, open_catalog
from dicom_node.store.journal import Journal
from dicom_node.store.queue import QueueOptions
from dicom_node.values import EngineResult, Pending

__all__ = [
    "CountedIngest",
    "Unmade",
    "destinations",
    "encoders",
    "engine_workers",
    "engines",
    "kept_in",
    "models_dir",
    "node_catalog",
    "node_ingest",
    "origin_for",
    "policy_for",
    "put_away",
    "replay_journals",
    "start_journal",
]

log = logging.getLogger(__name__)

# Kind of result by its Modality (0008,0060); label maps are SEG, pictures OT
_KINDS = {"SEG": "seg", "SR": "sr", "M3D": "stl", "OT": "sc", "DOC": "pdf", "ANN": "ann"}


# Workers of each engine outside: while it has one series, the next is read or the last is encoded.
_OUTSIDE_WORKERS = 2


def engine_workers(config: NodeConfig) -> Mapping[str, int]:
    """How many workers each engine outside has for itself, by its name; the `jobs.workers` and the urgent one do the
    rest. One engine that is slow or never answers thus holds up nobody else.
    """
    count = min(config.jobs.workers, _OUTSIDE_WORKERS)
    return {name: count for name, settings in config.engines.items() if settings.kind != "local"}


def node_catalog(config: NodeConfig, clock: Clock, epoch: str = "", *, migrated: bool = False) -> Catalog:
    """The node's catalog, opened; `epoch` and `migrated` as `open_catalog`. Raises StorageError."""

    def takes(destination: str, modality: str) -> bool:
        known = config.destinations.get(destination)
        return known is None or known.results is None or _KINDS.get(modality) in known.results

    options = QueueOptions(
        takes=takes,
        immediate_modalities=config.completion.immediate_modalities,
        analyse_conflicts=config.analyse_identity_conflicts,
        is_engine=_is_engine(config),
    )
    return open_catalog(config.data_dir, clock, config.storage, options=options, epoch=epoch, migrated=migrated)


def replay_journals(catalog: Catalog, config: NodeConfig) -> None:
    """Bring what a crash left in intake journals into archive and index. While no process of the node runs.

    Raises StorageError: the node must not start over objects it acknowledged and cannot show.
    """
    with ExitStack() as stack:
        journals: list[Journal] = []
        for number in catalog.journal_numbers():
            journals.append(catalog.open_journal(number))
            stack.callback(journals[-1].close)
        _replay(catalog, config, journals)
    catalog.index.forget_journaled()


def _replay(catalog: Catalog, config: NodeConfig, journals: Sequence[Journal]) -> None:
    """Of several receivers in the order in which they received: who comes first stays, where policies say so."""
    replay(
        merge(*(journal.left_behind() for journal in journals), key=lambda record: record.receipt.received_at),
        catalog.archive,
        catalog.index,
        max_inflated_header_bytes=config.storage.max_inflated_header_bytes,
    )
    for journal in journals:
        journal.clear()


def start_journal(catalog: Catalog, config: NodeConfig, number: int) -> None:
    """Give a receiver its intake journal. Where it cannot be had, which is logged, each object is synced by itself."""
    if not config.storage.journal_bytes:
        return
    try:
        journal = catalog.open_journal(number)
    except NodeError as exc:
        log.error("no intake journal", extra={"action": "journal_off", "error": str(exc)})
        return
    try:
        _replay(catalog, config, [journal])
    except NodeError as exc:
        log.error("no intake journal", extra={"action": "journal_off", "error": str(exc)})
        journal.close()
        return
    journal.begin()
    catalog.archive.journal = journal


def _is_engine(config: NodeConfig) -> Callable[[str, str], bool]:
    """Whether a destination is the AE of an engine of kind `dicom`."""
    addresses = {name: (block.ae_title, block.host, block.port) for name, block in _dicom_engines(config).items()}

    def told(destination: str, engine: str) -> bool:
        known = config.destinations.get(destination)
        return known is not None and addresses.get(engine) == (known.ae_title, known.host, known.port)

    return told


def _dicom_engines(config: NodeConfig) -> Mapping[str, DicomEngineOptions]:
    """The options of every engine of kind `dicom`; one whose options are wrong says so when it is made."""
    found: dict[str, DicomEngineOptions] = {}
    for name, settings in config.engines.items():
        if settings.kind == "dicom":
            with suppress(ConfigError):
                found[name] = dicom_options(name, settings)
    return found


# --- intake


class IntakeObserver(Protocol):
    """`metrics.Metrics`, as far as intake goes."""

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

    def __init__(
        self,
        catalog: Catalog,
        config: NodeConfig,
        clock: Clock,
        observer: IntakeObserver,
        received: ReceivedStudies | None = None,
    ) -> None:
        self._observer, self._received = observer, received
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
            durable_by="file" if record.file.journal is None else "journal",
        )
        if self._received is not None and outcome is not StoreOutcome.REFUSED:
            header = record.header
            self._received.stored(
                record.source,
                header.study_instance_uid,
                header.sop_class_uid,
                header.attributes.get("PatientID", ""),
                outcome,
            )


# --- who is who


def destinations(config: NodeConfig) -> Mapping[str, Destination]:
    """Every configured destination by its name."""
    return {name: config.destination(name) for name in config.destinations}


def origin_for(config: NodeConfig) -> Callable[[Source], Origin]:
    """What an engine sends are results, not images to analyse."""
    engine_titles = {peer.ae_title for peer in config.peers.values() if peer.is_engine}
    engine_titles |= {title for block in _dicom_engines(config).values() for title in block.return_titles}
    return lambda source: Origin.RETURNED if source.calling_ae_title in engine_titles else Origin.RECEIVED


def policy_for(config: NodeConfig) -> Callable[[Source], ConflictPolicy]:
    """The peer's conflict policy, else the node's."""
    policies = {peer.ae_title: peer.conflict_policy for peer in config.peers.values()}
    return lambda source: policies.get(source.calling_ae_title) or config.conflict_policy


# --- engines


def engines(
    config: NodeConfig, only: str | None = None, *, stand_in: bool = False, returns: Returns | None = None
) -> dict[str, Engine]:
    """Every configured engine, or one, made but not loaded. Raises ConfigError naming the engine's key.

    Those of the node's own kinds share one memory for volumes, see `budget.VolumeMemory`. With `stand_in` one that
    cannot be made does not keep the others from their work: its jobs wait, see `Unmade`.
    `returns` is the catalog's, without which an engine of kind `dicom` can be checked but not run.
    """
    if only is not None and only not in config.engines:
        raise ConfigError(f"engines: there is no {only!r} (known: {', '.join(sorted(config.engines)) or 'none'})")
    names = config.engines if only is None else (only,)
    memory = VolumeMemory(config.jobs.prepared_mb << 20)
    handing_out = _handing_out(config)
    made: dict[str, Engine] = {}
    for name in names:
        settings = config.engines[name]
        more: dict[str, Any] = {}  # kinds of plug-ins promise to take `devices` and no more
        if settings.kind == "local":
            more = {"models_dir": models_dir(config), "jobs": config.jobs, "memory": memory}
        elif is_own_engine(settings.kind):
            more = {"data_dir": config.data_dir, "memory": memory, **handing_out}
        if settings.kind == "dicom":
            more |= _of_dicom_engine(config, returns)
        try:
            made[name] = _made(name, settings, devices=config.jobs.devices, **more)
        except ConfigError as exc:
            if not stand_in:
                raise
            log.error("an engine cannot be made", extra={"engine": name, "error": str(exc)})
            made[name] = Unmade(name, str(exc))
    return made


def _handing_out(config: NodeConfig) -> Mapping[str, Any]:
    if not config.http_public_url:
        return {}
    from dicom_node.handing_out import for_engines  # only a node with engines that come to it needs it

    return for_engines(config, SystemClock())


def _of_dicom_engine(config: NodeConfig, returns: Returns | None) -> Mapping[str, Any]:
    from dicom_node.dimse.session import DimseSender  # only a node with such an engine needs it here
    from dicom_node.dimse.wires import open_link

    return {
        "sender": DimseSender(config.delivery, config.ae_titles[0], open_link(config.wire)),
        "returns": returns,
        "client_tls": config.client_tls if config.wire == "own" else _no_tls,
        "own_titles": frozenset(config.ae_titles),
        "peers": {peer.ae_title: peer.is_engine for peer in config.peers.values()},
        "return_titles": {name: block.return_titles for name, block in _dicom_engines(config).items()},
    }


def _no_tls(asked: bool | TlsClientSettings) -> None:
    """Raises ConfigError where TLS is asked for."""
    if asked is not False:
        raise ConfigError("options.tls: pynetdicom's wire carries no TLS; set `wire: own`")


def _made(name: str, settings: EngineSettings, **more: Any) -> Engine:
    try:
        engine: Engine = engine_class(settings.kind)(name, settings, **more)
    except NodeError:
        raise
    except Exception as exc:  # edge: a plug-in's module and constructor
        raise ConfigError(
            f"engines.{name}: its kind {settings.kind!r} cannot be made, {type(exc).__name__}; mend the plug-in or "
            "remove the engine"
        ) from exc
    return engine


@contextmanager
def kept_in(name: str, method: str) -> Iterator[None]:
    """Inside, an engine's own code is called: what it must not raise becomes an EngineError that names it."""
    try:
        yield
    except NodeError:
        raise
    except (Exception, SystemExit) as exc:  # edge: a plug-in's code
        raise EngineError(f"engine {name}: its {method} raised {type(exc).__name__}; mend the plug-in") from exc


def put_away(name: str, engine: Engine) -> None:
    """Close it; one that cannot be closed is told in the log and is nobody else's trouble."""
    try:
        with kept_in(name, "close"):
            engine.close()
    except NodeError as exc:
        log.warning("an engine could not be closed", extra={"engine": name}, exc_info=exc)


class Unmade:
    """Stands where an engine could not be made: says why, and lets its jobs wait for a restart with a better one."""

    def __init__(self, name: str, trouble: str) -> None:
        self.name = name
        self.trouble = trouble

    def check(self) -> None:
        """Raises ConfigError."""
        raise ConfigError(self.trouble)

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult | Pending:
        """Raises EngineUnavailable."""
        raise EngineUnavailable(self.trouble)

    def poll(self, task: EngineTask, handle: str) -> EngineResult | Pending:
        """Raises EngineUnavailable."""
        raise EngineUnavailable(self.trouble)

    def cancel(self, handle: str) -> None:
        """Raises EngineUnavailable: it is told again later."""
        raise EngineUnavailable(self.trouble)

    def cancel_noted(self, note: str) -> None:
        """Raises EngineUnavailable: it is told again later."""
        raise EngineUnavailable(self.trouble)

    def close(self) -> None:
        """Nothing."""


def models_dir(config: NodeConfig) -> Path:
    """Where `dicom-node models import` installs packages."""
    return config.data_dir / "models"


def encoders() -> list[ResultEncoder]:
    """Every result encoder, in encoding order."""
    return [encoder_class(kind)() for kind in encoder_kinds()]
