"""How long one radiograph of 3000 x 2500 pixels, 16 bits a pixel, takes from its file to findings, stage by stage.

    python benchmarks/cxr_to_scores.py [--model ID] [--repeat N]

One core, the network loaded before, the file in the page cache. Best of N, wall seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from pydicom.filereader import dcmread, read_file_meta_info

from dicom_node.chest_gate import not_frontal_chest
from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import write_cxr
from dicom_node.model import (
    EngineTask,
    Origin,
    SeriesHeader,
    StoredInstance,
)
from dicom_node.models.engine import LocalModelEngine
from dicom_node.pixels import displayed_radiograph, read_image
from dicom_node.radiograph import prepare_radiograph


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-cxr-findings")
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = _task(Path(folder) / "cxr.dcm")
        best: dict[str, float] = {}
        for _ in range(options.repeat):
            _stages(task.instances[0], best)
        _table("one stage after the other", best)
        _engine(task, options.model, options.repeat)


def _task(path: Path) -> EngineTask:
    write_cxr(path, 3, rows=3000, columns=2500, view="PA")
    ds = dcmread(path)
    values = {word: (str(ds[word].value),) for word in ("Modality", "SOPClassUID", "BodyPartExamined", "ViewPosition")}
    meta = read_file_meta_info(path)
    offset = 132 + 12 + meta.FileMetaInformationGroupLength
    instance = StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid=str(ds.StudyInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=os.path.getsize(path) - offset,
        sha256="",
        origin=Origin.RECEIVED,
    )
    header = SeriesHeader(series_instance_uid=str(ds.SeriesInstanceUID), instance_count=1, values=values)
    return EngineTask(
        job_id=0,
        study_instance_uid=str(ds.StudyInstanceUID),
        series_instance_uid=header.series_instance_uid,
        instances=(instance,),
        header=header,
        timeout_s=60.0,
    )


def _stages(instance: StoredInstance, best: dict[str, float]) -> None:
    marks = [time.perf_counter()]
    image = read_image(instance)
    marks.append(time.perf_counter())
    shown = displayed_radiograph(image)
    marks.append(time.perf_counter())
    plane = prepare_radiograph(shown, 192)
    marks.append(time.perf_counter())
    not_frontal_chest(plane)
    marks.append(time.perf_counter())
    _keep_best(best, dict(zip(("header", "read and display", "prepare", "gate"), np.diff(marks), strict=True)))


def _engine(task: EngineTask, model: str, repeat: int) -> None:
    engine = LocalModelEngine("benchmark", EngineSettings(model=model, options={"threads": 1}))
    best: dict[str, float] = {}
    try:
        engine.warm_up(lambda: None)
        engine.run(task, lambda: None)
        for _ in range(repeat):
            started = time.perf_counter()
            result = engine.run(task, lambda: None)
            _keep_best(best, {**result.stage_seconds, "file to findings": time.perf_counter() - started})
    finally:
        engine.close()
    _table(f"through the engine ({', '.join(result.provenance.parameters)})", best)


def _keep_best(best: dict[str, float], seconds: dict[str, float]) -> None:
    for stage, value in seconds.items():
        best[stage] = min(best.get(stage, float("inf")), float(value))


def _table(title: str, rows: dict[str, float]) -> None:
    print(f"\n{title}, seconds")
    for name, seconds in rows.items():
        print(f"  {name:<20} {seconds:7.4f}")


if __name__ == "__main__":
    main()
