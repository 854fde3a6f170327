"""What the tests of the LeapAI adapter share: a contract server, a shared folder under two names, images, tasks."""

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pydicom
import pytest
from pydicom.filereader import _read_file_meta_info

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import write_cxr
from dicom_node.engines.leapai import LeapAiEngine
from dicom_node.model import EngineTask, Origin, Sending, StoredInstance, Tell
from dicom_node.pipeline.headers_of import read_series_header
from dicom_node.plugins import engine_class
from dicom_node.values import EngineResult, Finding, Findings

CALLED = "/share/in"
NAME = "DOE^JOHN THE SECRET"


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


leap = _load("leapai_test_server", Path(__file__).parent / "servers" / "leapai.py")


@dataclass
class Bench:
    """A server, a shared folder under two names, a token in a file."""

    server: Any
    shared: Path
    token: Path
    folder: Path
    host: str = "127.0.0.1"
    recorded: list[tuple[str, Sending]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: list[tuple[bytes, str]] = field(default_factory=list)

    def options(self, **more: Any) -> dict[str, Any]:
        return {
            "base_url": f"http://{self.host}:{self.server.port}",
            "token": f"file:{self.token}",
            "node_folder": str(self.shared),
            "engine_folder": CALLED,
            "backoff_s": 0.01,
            **more,
        }

    def engine(self, *, clock: Any = None, **more: Any) -> LeapAiEngine:
        settings = EngineSettings(kind="leapai", options=self.options(**more))
        made = engine_class("leapai")("cxr", settings, devices=("cpu",), clock=clock)
        assert isinstance(made, LeapAiEngine)
        return made

    def image(self, seed: int = 1, **more: Any) -> StoredInstance:
        path = self.folder / f"{seed}.dcm"
        keys = {"rows": 64, "columns": 64, "view": "PA", "patient_name": NAME, **more}
        write_cxr(path, seed, **keys)
        return stored(path)

    def task(self, *instances: StoredInstance, job: int = 7, note: str = "") -> EngineTask:
        header = read_series_header(instances)

        @contextmanager
        def record(sending: Sending) -> Iterator[Tell]:
            latest = [sending]
            try:
                yield lambda sent: latest.__setitem__(0, sent)
            except BaseException:
                self.recorded.append(("failed", latest[0]))
                raise
            self.recorded.append(("sent", latest[0]))

        return EngineTask(
            job_id=job,
            study_instance_uid=instances[0].study_instance_uid,
            series_instance_uid=header.series_instance_uid,
            instances=instances,
            header=header,
            timeout_s=30.0,
            note=note,
            remember=self.notes.append,
            record=record,
            quarantine=self.quarantine,
        )

    def quarantine(self, path: Path, reason: str) -> str:
        self.kept.append((path.read_bytes(), reason))
        return "kept"

    def run(self, *instances: StoredInstance, **more: Any) -> EngineResult:
        engine = self.engine(**more)
        try:
            return engine.run(self.task(*(instances or (self.image(),))), lambda: None)
        finally:
            engine.close()
            assert list(self.shared.iterdir()) == [], "an image was left in the shared folder"


def stored(path: Path) -> StoredInstance:
    """The file as the archive hands it out."""
    with path.open("rb") as file:
        file.seek(132)
        meta = _read_file_meta_info(file)
        offset = file.tell()
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    return StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid=str(ds.StudyInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=path.stat().st_size - offset,
        sha256="0" * 64,
        origin=Origin.RECEIVED,
        modality=str(ds.Modality),
    )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    shared, folder, token = tmp_path / "shared", tmp_path / "images", tmp_path / "token"
    shared.mkdir()
    folder.mkdir()
    token.write_text(leap.issue(time.time() + 30 * 86400) + "\n")
    with leap.LeapAi(mounts={CALLED: shared, "D:\\in": shared}) as server:
        yield Bench(server=server, shared=shared, token=token, folder=folder)


def only(result: EngineResult) -> Findings:
    (findings,) = (value for value in result.values if isinstance(value, Findings))
    return findings


def by_key(result: EngineResult) -> dict[str, Finding]:
    return {item.key: item for item in only(result).items}
