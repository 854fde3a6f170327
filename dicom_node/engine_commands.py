# ruff: noqa: T201 - what commands say goes to standard output
"""`dicom-node engines ...`: what there is and how it is, whether one could run, and one run by hand.

An engine that is run by hand works in this process and asks the node's work process nothing. What it sends outside the
node is recorded with the study as any sending is; nothing else is written to the catalog unless `--store` says so.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dicom_node.auditing import AuditTrail
from dicom_node.clock import SystemClock
from dicom_node.commands import FAILED, OK, offline, open_here, table
from dicom_node.config import NodeConfig
from dicom_node.errors import ConfigError, EngineRejected, EngineTimeout, NodeError, NotFound
from dicom_node.interfaces import Engine
from dicom_node.model import ConflictPolicy, EngineTask, Level, StoredInstance
from dicom_node.pulse import fresh, read_pulse
from dicom_node.store.catalog import Catalog
from dicom_node.trails import acted, command_trail
from dicom_node.values import (
    Annotations,
    Document,
    EngineResult,
    Findings,
    LabelVolume,
    Measurements,
    Mesh,
    Pending,
    Picture,
    Presence,
    Quantities,
    ResultValue,
    ReturnedInstances,
    SlideLabels,
)

_WIDTH = 110
_POLL_MIN_S, _POLL_MAX_S = 0.5, 30.0

# --- list


def engines_list(arguments: argparse.Namespace) -> int:
    """Every configured engine and every one that jobs still name."""
    config = offline(arguments)
    states, counted, stops = _states(config), *_counts(config)
    rows = []
    for name in [*config.engines, *sorted(set(counted) - set(config.engines))]:
        jobs, settings = counted.get(name, {}), config.engines.get(name)
        rows.append(
            (
                name,
                settings.kind if settings else "-",
                str(jobs.get("pending", 0) + jobs.get("leased", 0)),
                str(jobs.get("waiting", 0)),
                str(jobs.get("failed", 0)),
                " ".join(states.get(name, "not configured").split()) + stops.get(name, ""),
            )
        )
    table(("ENGINE", "KIND", "PENDING", "WAITING", "FAILED", "STATE"), rows, "no engines")
    return OK


def _states(config: NodeConfig) -> Mapping[str, str]:
    """How each engine is now, as the work process says."""
    work = read_pulse(config.data_dir, "work")
    if work is None or not fresh(work, SystemClock()) or work.detail == "stopped":
        return dict.fromkeys(config.engines, "not running: the node is stopped")
    if not config.jobs.workers:
        return dict.fromkeys(config.engines, "not running: jobs.workers is 0")
    gauges: Mapping[str, Mapping[str, float]] = work.facts.get("engines", {})
    unusable: Mapping[str, str] = work.facts.get("unusable", {})
    return {name: unusable.get(name) or _gauged(gauges.get(name, {})) for name in config.engines}


def _gauged(gauges: Mapping[str, float]) -> str:
    state = {1.0: "resting after failures", 2.0: "being tried after failures"}.get(
        gauges.get("breaker_state", 0.0), "ready"
    )
    left_s = gauges.get("token_expires_seconds")
    if left_s is None:
        return state
    return f"{state}; its credentials " + (f"expire in {left_s / 3600:.1f} h" if left_s > 0 else "have expired")


def _counts(config: NodeConfig) -> tuple[Mapping[str, Mapping[str, int]], Mapping[str, str]]:
    if not (config.data_dir / "catalog.db").is_file():
        return {}, {}
    with open_here(config) as catalog:
        snapshot = catalog.queue.snapshot()
    stops = {
        name: f"; {states['pending']} jobs to be stopped there, {states['failed']} could not be"
        for name, states in snapshot["cancellations"].items()
    }
    return snapshot["engines"], stops


# --- check


def engines_check(arguments: argparse.Namespace) -> int:
    """Whether it could run, then what it reports of itself. Status 2 when one could not."""
    from dicom_node.wiring import engines, kept_in, put_away

    wrong = 0
    config = offline(arguments)
    for name, engine in engines(config, arguments.name).items():
        settings = config.engines[name]
        try:
            with kept_in(name, "check"):
                engine.check()
            with kept_in(name, "report"):
                facts = tuple(getattr(engine, "report", tuple)())
            print(f"{name}: can run")
            _print_facts([("kind", settings.kind), *([("model", settings.model)] if settings.model else []), *facts])
        except NodeError as exc:
            wrong += 1
            print(f"dicom-node: {name}: CANNOT RUN: {str(exc).replace(f'engine {name}: ', '')}", file=sys.stderr)
        finally:
            put_away(name, engine)
    return FAILED if wrong else OK


def _print_facts(facts: Sequence[tuple[str, str]]) -> None:
    for heading, text in facts:
        lines = textwrap.wrap(text, _WIDTH) or [""]
        print(f"  {heading}: {lines[0]}")
        for line in lines[1:]:
            print(f"    {line}")


# --- run


def engines_run(arguments: argparse.Namespace) -> int:
    """Run it on each series it takes. Raises NotFound (engine, study), EngineRejected when it takes none."""
    from dicom_node.plugins import encoder_kinds
    from dicom_node.wiring import engines, put_away

    config = offline(arguments)
    kinds = tuple(arguments.results or (kind for kind in encoder_kinds() if kind != "labelmap"))  # as bits by seg
    if unknown := set(kinds) - set(encoder_kinds()):
        raise ConfigError(f"--results: {', '.join(sorted(unknown))} is none of {', '.join(encoder_kinds())}")
    with open_here(config) as catalog, command_trail(config, catalog.index.patient_ids) as trail:
        engine = engines(config, arguments.name, returns=catalog.queue)[arguments.name]
        try:
            by_hand = _ByHand(config, catalog, engine, arguments, kinds, trail)
            trail.record(replace(acted(arguments.study, f"engine {arguments.name} run by hand"), action="R"))
            ended = [by_hand.series(uid) for uid in _series_of(catalog, arguments.study, arguments.series)]
        finally:
            put_away(arguments.name, engine)
    if set(ended) == {"refused"}:
        raise EngineRejected(f"{arguments.name} takes no series of this study")
    return FAILED if "failed" in ended else OK


def _series_of(catalog: Catalog, study: str, only: str | None) -> Sequence[str]:
    found: Sequence[str] = sorted(catalog.queue.reopen_study(study, again=False).pending_series)
    if only is not None and only not in found:
        raise NotFound(f"there is no series {only} of images in study {study}")
    if not found:
        raise NotFound(f"study {study} has no series of images")
    return found if only is None else (only,)


class _ByHand:
    """One engine on series of one study."""

    def __init__(
        self,
        config: NodeConfig,
        catalog: Catalog,
        engine: Engine,
        arguments: argparse.Namespace,
        kinds: Sequence[str],
        audit: AuditTrail,
    ) -> None:
        self._audit = audit
        self._config, self._catalog, self._engine = config, catalog, engine
        self._clock = SystemClock()
        self._name, self._study = arguments.name, arguments.study
        self._timeout_s = arguments.timeout or config.engines[self._name].timeout_s
        self._kinds, self._store = kinds, arguments.store
        self._out = Path(arguments.out) if arguments.out else None
        if self._out is not None:
            self._out.mkdir(parents=True, exist_ok=True)

    def series(self, series: str) -> str:
        """done, refused or failed; the reason is printed."""
        try:
            task = self._task(series)
            result = self._answer(task)
            print(f"series {series}: {result.provenance.name} {result.provenance.version}")
            for line in (*filter(None, [result.provenance.notice]), *_said(result.values)):
                print(f"  {line}")
            self._keep(task, result)
        except EngineRejected as exc:
            print(f"series {series}: not taken: {exc.reason}")
            return "refused"
        except NodeError as exc:
            print(f"dicom-node: series {series}: {exc}", file=sys.stderr)
            return "failed"
        return "done"

    def _task(self, series: str) -> EngineTask:
        from dicom_node.pipeline.external import quarantined, recorder
        from dicom_node.pipeline.headers_of import read_series_header

        instances: Sequence[StoredInstance] = self._catalog.queue.series_instances(self._study, series)
        names = {"engine": self._name, "study_instance_uid": self._study, "series_instance_uid": series}
        return EngineTask(
            job_id=0,
            study_instance_uid=self._study,
            series_instance_uid=series,
            instances=tuple(instances),
            header=read_series_header(instances),
            timeout_s=self._timeout_s,
            record=recorder(self._catalog.queue, job=None, audit=self._audit, **names),
            quarantine=quarantined(self._catalog.quarantine.keep, job_id=0, **names),
            study_instances=lambda: self._catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [self._study]}),
        )

    def _answer(self, task: EngineTask) -> EngineResult:
        """Its answer, waited for; told to stop when it fails. Raises EngineTimeout when it does not come in time."""
        deadline = time.monotonic() + self._timeout_s
        answer = self._engine.run(task, lambda: None)
        told = ""
        try:
            while isinstance(answer, Pending):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise EngineTimeout(f"no answer within {self._timeout_s:g} s; --timeout gives it more")
                if answer.handle != told:
                    told = answer.handle
                    print(f"series {task.series_instance_uid}: the engine works on {told}", flush=True)
                time.sleep(min(max(answer.poll_after_s, _POLL_MIN_S), _POLL_MAX_S, left_s))
                answer = self._asked(task, answer)
        except (NodeError, KeyboardInterrupt):
            if isinstance(answer, Pending):
                self._cancel(answer)
            raise
        return answer

    def _asked(self, task: EngineTask, pending: Pending) -> EngineResult | Pending:
        """What it says now; still `pending` where it cannot be asked at the moment: it may work on all the same."""
        poll: Callable[[EngineTask, str], EngineResult | Pending] = self._engine.poll  # type: ignore[attr-defined]
        try:
            return poll(task, pending.handle)
        except NodeError as exc:
            if not exc.retryable:
                raise
            print(f"series {task.series_instance_uid}: {exc}; it is asked again", file=sys.stderr, flush=True)
            return pending

    def _cancel(self, pending: Pending) -> None:
        """Nobody waits any more."""
        cancel: Callable[[str], None] | None = getattr(self._engine, "cancel", None)
        try:
            if cancel is not None:
                cancel(pending.handle)
        except NodeError as exc:
            print(f"dicom-node: {pending.handle} could not be cancelled there: {exc}", file=sys.stderr)

    def _keep(self, task: EngineTask, result: EngineResult) -> None:
        from dicom_node.pipeline.encode import data_set_bytes, encoded, result_context, syntax_of
        from dicom_node.wiring import encoders, node_ingest

        if self._out is None and not self._store:
            return
        now = self._clock.wall()
        context = result_context(
            result.provenance,
            series_instance_uid=task.series_instance_uid,
            input_digest="",
            rule="",
            run=f"by hand {now.isoformat()}",  # never the UIDs of a job, nor of another run by hand
            run_number=1,
            created_at=now,
            time_zone=self._config.time_zone,
            node_name=self._config.ae_titles[0],
        )
        made = encoded(result, task, context, encoders=encoders(), kinds=self._kinds, heartbeat=lambda: None)
        if not made and not any(isinstance(value, ReturnedInstances) for value in result.values):
            print(f"  nothing of it can be written as {' or '.join(self._kinds)}")
        ingest = node_ingest(self._catalog, self._config, self._clock)
        for ds in made:
            what = f"{ds.Modality} {ds.SOPInstanceUID}"
            if self._out is not None:
                file = self._out / f"{ds.SOPInstanceUID}.dcm"
                _write(ds, str(syntax_of(ds)), file)
                print(f"  wrote {file}")
            if self._store:
                syntax = syntax_of(ds)
                record = ingest.stage(
                    sop_class_uid=str(ds.SOPClassUID),
                    sop_instance_uid=str(ds.SOPInstanceUID),
                    transfer_syntax_uid=str(syntax),
                    fragments=(data_set_bytes(ds, syntax),),
                )
                self._catalog.index.add_instance(
                    record, ConflictPolicy.KEEP_FIRST, lambda first: False
                )  # its UID is new
                print(f"  stored {what}")


def _write(ds: Any, transfer_syntax_uid: str, file: Path) -> None:
    """A Part 10 file (PS3.10 7.1)."""
    from pydicom import dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(transfer_syntax_uid)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta = meta
    dcmwrite(file, ds, enforce_file_format=True)


def _said(values: Sequence[ResultValue]) -> Iterator[str]:
    """What an engine found, a line each."""
    for value in values:
        if isinstance(value, Findings):
            for item in value.items:
                sure = "" if item.confidence is None else f" ({item.confidence:.0%})"
                yield f"{item.name}: {item.presence.value}{sure}"
        elif isinstance(value, LabelVolume):
            for segment in value.segments:
                yield f"segment {segment.number} {segment.label}: {int((value.labels == segment.number).sum())} voxels"
        elif isinstance(value, Measurements):
            for measured in value.items:
                if measured.presence is Presence.PRESENT and measured.volume_cm3 is not None:
                    hu = "" if measured.mean_hu is None else f", mean {measured.mean_hu:.0f} HU"
                    yield f"{measured.segment.label}: {measured.volume_cm3:.1f} cm3{hu}"
        elif isinstance(value, ReturnedInstances):
            for instance in value.instances:
                kept = "under UIDs of this run" if value.copies else "in the archive"
                yield f"came back, {kept}: {instance.modality} {instance.sop_instance_uid}"
        else:
            yield from _said_beside(value)
        for note in getattr(value, "notes", ()):
            yield f"note: {note}"


def _said_beside(value: ResultValue) -> Iterator[str]:
    """Of surfaces, pictures, documents, numbers and what is said of slides."""
    if isinstance(value, Mesh):
        inside = ", ".join(segment.label for segment in value.segments)
        yield f"surface {value.title}: {len(value.triangles)} triangles around {inside}"
    elif isinstance(value, Picture):
        yield f"picture {value.title}: {value.pixels.shape[0]} x {value.pixels.shape[1]} pixels"
    elif isinstance(value, Document):
        yield f"document: {len(value.pdf)} bytes of PDF"
    elif isinstance(value, Annotations):
        for group in value.groups:
            yield f"annotations {group.label}: {len(group.shapes)} of type {group.graphic_type.value}"
    elif isinstance(value, SlideLabels):
        for segment in value.segments:
            yield f"segment {segment.number} {segment.label}: {int((value.labels == segment.number).sum())} pixels"
    elif isinstance(value, Quantities):
        for item in value.items:
            yield f"{item.code.meaning}: {item.value:g} {item.unit.value}"


# --- models of an AIAA server


def engines_aiaa_model(arguments: argparse.Namespace) -> int:
    """See `aiaa_commands`."""
    from dicom_node.aiaa_commands import engines_aiaa_model as run

    return run(arguments)
