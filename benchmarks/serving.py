"""What it is worth that one device serves several requests: radiographs in shared batches, urgent work in between.

    python benchmarks/serving.py [--device auto] [--count N] [--side N]

Radiographs: N single images asked one after the other, and all at once. Urgent: a small CT alone, in the middle of a
large one, and (what it would be without interruption) the rest of the large one. One thread, wall seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dicom_node.model import Priority
from dicom_node.models.grid import ModelGrid
from dicom_node.models.manifest import SegmentationManifest
from dicom_node.models.registry import find_package
from dicom_node.models.runtime import Answer, Runtime
from dicom_node.models.segment import volume_job


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--side", type=int, default=224)
    options = parser.parse_args()
    runtime = Runtime(options.device)
    try:
        _radiographs(runtime, options.count)
        _urgent(runtime, options.side)
    finally:
        runtime.close()


def _radiographs(runtime: Runtime, count: int) -> None:
    package = find_package("demo-cxr-findings")
    size = package.manifest.input.size  # type: ignore[union-attr]
    images = np.random.default_rng(0).uniform(-1, 1, (count, 1, size, size)).astype(np.float32)

    def ask(image: Any, expect: int = 0) -> Answer:
        return runtime.infer(
            package,
            image,
            job={"activation": "sigmoid"},
            timeout_s=100,
            heartbeat=lambda: None,
            threads=1,
            expect=expect,
        )

    for image in images[:4]:
        ask(image)
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(ask, images))  # kernels for full batches are chosen
        began = time.perf_counter()
        one_by_one = [ask(image) for image in images]
        middle = time.perf_counter()
        at_once = list(threads.map(lambda image: ask(image, 1), images))
        ended = time.perf_counter()
    for one, other in zip(one_by_one, at_once, strict=True):
        np.testing.assert_allclose(one.output, other.output, atol=2e-2 if one.precision == "bf16" else 1e-4)
    apart_s, together_s = middle - began, ended - middle
    print(f"\n{count} radiographs of {size} x {size}, {one_by_one[0].device}, {one_by_one[0].precision}")
    print(f"  one after the other  {apart_s:7.3f} s  {count / apart_s:7.1f} images/s")
    print(
        f"  at once              {together_s:7.3f} s  {count / together_s:7.1f} images/s  x {apart_s / together_s:.2f}"
    )
    print(f"  images in a batch    {statistics.mean(answer.together for answer in at_once):7.1f}")


def _urgent(runtime: Runtime, side: int) -> None:
    package = find_package("demo-ct-abdomen")
    manifest = package.manifest
    assert isinstance(manifest, SegmentationManifest)

    def ask(side: int, priority: Priority) -> tuple[Answer, float]:
        array = np.random.default_rng(side).integers(-1000, 1000, (side,) * 3).astype(np.int16)
        job = volume_job(manifest, ModelGrid.same((side,) * 3, (3.0, 3.0, 3.0)))
        began = time.perf_counter()
        answer = runtime.infer(
            package,
            array,
            job=job,
            timeout_s=600,
            heartbeat=lambda: None,
            threads=1,
            priority=priority,
        )
        return answer, time.perf_counter() - began

    ask(64, Priority.URGENT)
    _, alone_s = min((ask(64, Priority.URGENT) for _ in range(5)), key=lambda pair: pair[1])
    large, large_s = ask(side, Priority.BACKGROUND)
    with ThreadPoolExecutor(2) as threads:
        background = threads.submit(ask, side, Priority.BACKGROUND)
        between = []
        time.sleep(large_s / 5)
        while not background.done():
            between.append(ask(64, Priority.URGENT)[1])
            time.sleep(large_s / 20)
        _, slowed_s = background.result()
    print(f"\na CT of 64 cubed, urgent, beside one of {side} cubed ({large.windows} windows), {large.device}")
    print(f"  alone                      {alone_s:7.3f} s")
    print(f"  in the middle of it        {statistics.median(between):7.3f} s median, {max(between):.3f} s worst")
    print(f"  the large one              {large_s:7.3f} s, with {len(between)} urgent ones in between {slowed_s:.3f} s")


if __name__ == "__main__":
    main()
