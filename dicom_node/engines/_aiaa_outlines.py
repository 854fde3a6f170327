"""A mask to polygons and back by a Clara Train AIAA server: mask2polygon, perhaps fixpolygon, and painted again.

Each label goes by itself, because the server's masks have one. What comes back must still be the mask it was made of,
more or less: outlines counted from another corner or in another order of slices look right one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.engines._aiaa_options import PolygonOptions
from dicom_node.engines._aiaa_pictures import grey, write_png
from dicom_node.engines._aiaa_polygons import Slices, UnusablePolygons, area, painted, polygons_of, slices_of
from dicom_node.engines._aiaa_server import AiaaServer, Asked
from dicom_node.engines._stacks import Budget
from dicom_node.engines.grids import labels_on_source
from dicom_node.engines.masks import read_volume
from dicom_node.engines.nifti import write_nifti
from dicom_node.geometry import VolumeGeometry
from dicom_node.model import EngineTask, Sending
from dicom_node.values import LabelVolume

__all__ = ["Outlines"]

Mask = npt.NDArray[np.bool_]

MAX_LABELS = 32  # each is a request with a volume


class Outlines:
    """The round trip of one series. `voxels` is (slice, row, column) on the images of `geometry`."""

    def __init__(
        self,
        server: AiaaServer,
        options: PolygonOptions,
        task: EngineTask,
        budget: Budget,
        *,
        folder: Path,
        geometry: VolumeGeometry,
        voxels: npt.NDArray[Any],
        sending: Sending,
    ) -> None:
        """`sending` says of the volume what is to be said of its slices and masks: host, whether it is identifiable."""
        self._server, self._options, self._task, self._budget = server, options, task, budget
        self._folder, self._geometry, self._voxels = folder, geometry, voxels
        self._sending = replace(sending, bytes=None, sha256="", remote_id="")

    def painted(self, volume: LabelVolume) -> LabelVolume:
        """`volume` with each label by way of polygons. Raises UnusablePolygons, and as `AiaaServer`."""
        found = np.flatnonzero(np.bincount(volume.labels.reshape(-1), minlength=256)[1:]) + 1
        if len(found) > MAX_LABELS:
            raise UnusablePolygons(f"{len(found)} labels by way of polygons, at most {MAX_LABELS} are")
        labels = np.zeros_like(volume.labels)
        notes = []
        for number in found.tolist():
            mask = volume.labels == number
            again = self._again(mask)
            overlap = _dice(mask, again)
            if overlap < self._options.min_overlap:
                raise UnusablePolygons(
                    f"the polygons of label {number} are not the mask they were made of: overlap (Dice) {overlap:.2f}, "
                    f"at least {self._options.min_overlap:g} is expected"
                )
            labels[again & ((labels == 0) | mask)] = number  # where outlines overlap the mask decides
            notes.append(f"label {number} was painted from polygons of the server, overlap with its mask {overlap:.3f}")
        return replace(volume, labels=labels, notes=(*volume.notes, *notes))

    def _again(self, mask: Mask) -> Mask:
        path = self._folder / "mask.nii.gz"
        write_nifti(mask.astype(np.int16), self._geometry, path, heartbeat=self._budget.beat)
        with self._task.record(self._recorded("mask", path.stat().st_size, identifiable=False)):
            told = self._server.polygons(path, self._options.more_points, self._budget.beat, self._budget.left_s())
        slices = slices_of(told, self._geometry.shape, self._budget.beat)
        if self._options.fix == "3d":
            return self._fixed_volume(slices, path)
        if self._options.fix == "2d":
            slices = self._fixed_slices(slices)
        again = np.zeros(mask.shape, np.bool_)
        for k, polygons in enumerate(slices):
            if polygons:
                again[k] = painted(polygons, self._geometry.shape[1:], self._options.vertices)
            self._budget.beat()
        return again

    def _recorded(self, what: str, length: int | None, *, identifiable: bool, objects: int = 1) -> Sending:
        return replace(self._sending, what=what, objects=objects, bytes=length, identifiable=identifiable)

    # --- fixpolygon

    def _fixed_slices(self, slices: Slices) -> Slices:
        """Each slice with polygons by itself, on its picture."""
        fixed = list(slices)
        used = [k for k, polygons in enumerate(slices) if polygons]
        sending = self._recorded("pictures", None, identifiable=self._sending.identifiable, objects=len(used))
        picture = self._folder / "slice.png"
        with self._task.record(sending):
            for k in used:
                write_png(grey(self._voxels[k]), picture)
                asked = Asked(
                    api="fixpolygon",
                    output="results",
                    params=self._params(slices, k, dimension=2),
                    file=picture,
                    filename=picture.name,
                    content_type="image/png",
                )
                reply = self._server.ask(asked, self._folder / "fixed", self._budget.beat, self._budget.left_s())
                fixed[k] = polygons_of(reply.params.get("poly"), self._geometry.shape[1:])
        return tuple(fixed)

    def _fixed_volume(self, slices: Slices, mask: Path) -> Mask:
        """From the slice of the largest area, through the others by the server."""
        largest = max(range(len(slices)), key=lambda k: sum(area(polygon) for polygon in slices[k]))
        asked = Asked(
            api="fixpolygon",
            output="image",
            params=self._params(slices, largest, dimension=3),
            file=mask,
            filename=mask.name,
            content_type="application/x-gzip",
        )
        with self._task.record(self._recorded("mask", mask.stat().st_size, identifiable=False)):
            reply = self._server.ask(asked, self._folder / "fixed", self._budget.beat, self._budget.left_s())
        if reply.file is None:
            raise UnusablePolygons("fixpolygon answered without a mask")
        returned = read_volume(reply.file, heartbeat=self._budget.beat)
        labels = (returned.array != 0).astype(np.uint8)
        placed, _ = labels_on_source(labels, returned.affine_lps, self._geometry, heartbeat=self._budget.beat)
        return placed.view(np.bool_)

    def _params(self, slices: Slices, k: int, *, dimension: int) -> dict[str, Any]:
        """As the vendor's schema has them; no vertex is moved, the polygons are only fitted.

        In 3D they are those of all slices, in 2D those of the picture.
        """
        every = [[polygon.tolist() for polygon in polygons] for polygons in (slices if dimension == 3 else [slices[k]])]
        polygons: Sequence[Any] = every if dimension == 3 else every[0]
        params: dict[str, Any] = {
            "dimension": dimension,
            "poly": polygons,
            "prev_poly": polygons,
            "polygon_index": 0,
            "vertex_index": 0,
            "vertex_offset": [0, 0],
            "propagate_neighbor": self._options.propagate_neighbor,
        }
        if dimension == 3:
            params |= {"slice_index": k, "propagate_neighbor_3d": self._options.propagate_neighbor_3d}
        return params


def _dice(one: Mask, other: Mask) -> float:
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0
