"""An engine that says the same of every series at once: a plug-in, as others may install one."""

from typing import Any

from dicom_node.interfaces import Heartbeat
from dicom_node.model import EngineTask
from dicom_node.values import Code, EngineResult, Finding, Findings, Presence, Provenance


class QuickEngine:
    """Kind `quick`."""

    def __init__(self, name: str, settings: Any, *, devices: Any = ()) -> None:
        self.name = name

    def check(self) -> None: ...

    def close(self) -> None: ...

    def run(self, task: EngineTask, heartbeat: Heartbeat) -> EngineResult:
        heartbeat()
        code = Code(value="1", scheme="99TEST", meaning="Finding")
        finding = Finding(key="f", name="Finding", code=code, presence=Presence.PRESENT, confidence=0.9)
        image = min(instance.sop_instance_uid for instance in task.instances)
        return EngineResult(
            values=(Findings(sop_instance_uid=image, items=(finding,)),),
            provenance=Provenance(
                name="quick", version="1", manufacturer="nobody", device_uid="2.25.1", weights_sha256="w",
                config_sha256="c",
            ),
            stage_seconds={"forward": 0.001},
        )  # fmt: skip
