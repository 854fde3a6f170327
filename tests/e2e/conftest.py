"""The whole line: a node, a second node as the PACS, phantoms, foreign clients."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dicom_node.clock import SystemClock
from dicom_node.config import StorageSettings, packaged
from dicom_node.model import (
    DeliveryState,
    Job,
    JobState,
    Level,
    StoredInstance,
)
from dicom_node.store.catalog import Catalog, open_catalog

NO_RESERVE = StorageSettings(reserve_bytes=0, reserve_ratio=0.0)
JOB_ENDS = {JobState.DONE, JobState.REJECTED, JobState.FAILED, JobState.CANCELLED}
DELIVERY_ENDS = {DeliveryState.DONE, DeliveryState.FAILED, DeliveryState.CANCELLED}


@dataclass
class Eyes:
    """A look into a node's catalog from outside."""

    catalog: Catalog

    def jobs(self, study: str) -> list[Job]:
        """Newest first."""
        return list(self.catalog.queue.jobs(study_instance_uid=study))

    def instances(self, study: str) -> list[StoredInstance]:
        """Every visible instance of the study."""
        return list(self.catalog.index.instances(Level.STUDY, {"StudyInstanceUID": [study]}))

    def of_modality(self, study: str, modality: str) -> list[StoredInstance]:
        """Those of one modality."""
        return [instance for instance in self.instances(study) if instance.modality == modality]

    def at_rest(self, study: str) -> bool:
        """Something ran or was filtered, and nothing of it is under way."""
        queue = self.catalog.queue
        return (
            bool(queue.verdicts(study))
            and not any(activity.study_instance_uid == study for activity in queue.open_studies())
            and all(job.state in JOB_ENDS for job in queue.jobs(study_instance_uid=study))
            and all(sent.state in DELIVERY_ENDS for sent in queue.deliveries(study_instance_uid=study))
        )


@pytest.fixture
def eyes() -> Iterator[Callable[[Any], Eyes]]:
    """`eyes(node)`: a look into its catalog; closed at the end."""
    opened: list[Catalog] = []

    def look(node: Any) -> Eyes:
        opened.append(open_catalog(node.data_dir, SystemClock(), NO_RESERVE))
        return Eyes(opened[-1])

    yield look
    for catalog in opened:
        catalog.close()


@pytest.fixture
def pair(running_node: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """`pair(**settings)`: a PACS without rules, and a node with the shipped rules whose sender may be that PACS."""

    def start(**settings: Any) -> tuple[Any, Any]:
        pacs = running_node("pacs", ae_titles=["PACS"], engines={}, jobs={"workers": 0})
        node = running_node(
            "node",
            rules_dir=str(packaged("default_rules")),
            destinations={"PACS": {"ae_title": "PACS", "host": "127.0.0.1", "port": pacs.dicom_port}},
            **{"completion": {"quiet_s": 1.0, "quiet_after_fault_s": 2.0}, **settings},
        )
        return pacs, node

    return start


@pytest.fixture
def storescu(tool: Callable[[str], str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`storescu(node, folder_or_file, calling="PACS")`: send with dcmtk."""

    def send(node: Any, path: Path, calling: str = "PACS") -> subprocess.CompletedProcess[str]:
        command = [tool("storescu"), "-aet", calling, "-aec", "DICOM_NODE", "127.0.0.1", str(node.dicom_port)]
        scan = ["+sd", "+r", str(path)] if path.is_dir() else [str(path)]
        return subprocess.run([*command, *scan], text=True, capture_output=True, timeout=120, check=False)

    return send
