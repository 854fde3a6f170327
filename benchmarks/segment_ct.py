"""How long a CT series of 300 x 512 x 512 takes from files to labels and measurements, stage by stage.

    python benchmarks/segment_ct.py [--folder DIR] [--model ID] [--threads N] [--repeat N]

Makes the series from a phantom where DIR (a temporary folder by default) holds none. Wall and CPU seconds; CPU of
this process and of the runtime process together is what one busy core would need. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from pydicom.filereader import dcmread, read_file_meta_info

from dicom_node.config import EngineSettings
from dicom_node.demo.phantom_dicom import write_ct_series
from dicom_node.geometry import volume_geometry
from dicom_node.model import (
    EngineTask,
    Origin,
    SeriesHeader,
    StoredInstance,
)
from dicom_node.models.engine import LocalModelEngine
from dicom_node.pixels import read_hounsfield, read_image
from dicom_node.values import LabelVolume, Measurements


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", default="demo-ct-abdomen")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        task = _task(_series(options.folder or Path(temporary)))
        _decode(task)
        _analyse(task, options.model, options.threads, options.repeat)


def _series(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.dcm"))
    if not paths:
        print(f"writing a series of 300 x 512 x 512 to {folder}")
        write_ct_series(folder, 3, shape=(300, 512, 512), spacing_mm=(1.25, 0.75, 0.75))
        paths = sorted(folder.glob("*.dcm"))
    return paths


def _task(paths: list[Path]) -> EngineTask:
    first = dcmread(paths[0], stop_before_pixels=True)
    values = {
        word: (str(first[word].value),) for word in ("Modality", "SOPClassUID", "BodyPartExamined") if word in first
    }
    header = SeriesHeader(series_instance_uid=str(first.SeriesInstanceUID), instance_count=len(paths), values=values)
    return EngineTask(
        job_id=0,
        study_instance_uid=str(first.StudyInstanceUID),
        series_instance_uid=header.series_instance_uid,
        instances=tuple(_stored(path) for path in paths),
        header=header,
        timeout_s=600.0,
    )


def _stored(path: Path) -> StoredInstance:
    meta = read_file_meta_info(path)
    offset = 132 + 12 + meta.FileMetaInformationGroupLength
    return StoredInstance(
        sop_class_uid=str(meta.MediaStorageSOPClassUID),
        sop_instance_uid=str(meta.MediaStorageSOPInstanceUID),
        study_instance_uid="",
        series_instance_uid="",
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=os.path.getsize(path) - offset,
        sha256="",
        origin=Origin.RECEIVED,
    )


def _decode(task: EngineTask) -> None:
    best: dict[str, float] = {}
    for _ in range(3):
        marks = [time.process_time()]
        images = {image.instance.sop_instance_uid: image for image in map(read_image, task.instances)}
        marks.append(time.process_time())
        geometry = volume_geometry([image.header for image in images.values()])
        marks.append(time.process_time())
        read_hounsfield([images[uid] for uid in geometry.sop_instance_uids])
        marks.append(time.process_time())
        for stage, seconds in zip(("headers", "geometry", "pixels to HU"), np.diff(marks), strict=True):
            best[stage] = min(best.get(stage, np.inf), float(seconds))
    _table("decode + stack + HU, CPU seconds, best of 3", best)


def _analyse(task: EngineTask, model: str, threads: int, repeat: int) -> None:
    engine = LocalModelEngine("benchmark", EngineSettings(model=model, options={"threads": threads}))
    try:
        started = time.perf_counter()
        engine.warm_up(lambda: None)
        engine.run(task, lambda: None)
        print(f"\nfirst run, with the start of the runtime process: {time.perf_counter() - started:.2f} s wall")
        for number in range(repeat):
            started, cpu = time.perf_counter(), _cpu()
            result = engine.run(task, lambda: None)
            wall = time.perf_counter() - started
            stages = {**result.stage_seconds, "all, wall": wall, "all but infer, CPU": _cpu() - cpu}
            _table(f"run {number + 1} ({', '.join(result.provenance.parameters)}), seconds", stages)
    finally:
        engine.close()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"\npeak memory: {_peak(resource.RUSAGE_SELF)} MiB here, {_peak(resource.RUSAGE_CHILDREN)} MiB runtime process"
    )
    print(f"runtime process, CPU of its whole life: {children.ru_utime + children.ru_stime:.2f} s")
    for value in result.values:
        if isinstance(value, LabelVolume):
            print(f"labels {value.labels.shape}")
        elif isinstance(value, Measurements):
            for item in value.items:
                print(
                    f"  {item.segment.label}: {item.presence.value} {item.volume_cm3} cm3 {item.mean_hu} HU {item.note}"
                )


def _cpu() -> float:
    return time.process_time()


def _peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


def _table(title: str, rows: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, seconds in rows.items():
        print(f"  {name:<20} {seconds:7.3f}")


if __name__ == "__main__":
    main()
