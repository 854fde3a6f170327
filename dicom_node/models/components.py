"""Connected pieces of a mask, without scipy: 6-connected, by joining neighbours until nothing changes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["pieces"]


def pieces(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The flat indices of `mask`'s voxels and, for each, the number of its piece; piece 0 is the largest.

    Pieces touch face to face. Equal sizes keep the order of their first voxels.
    """
    voxels = np.flatnonzero(mask)
    if voxels.size == 0:
        return voxels, voxels
    ids = np.full(mask.shape, -1, np.intp)
    ids.reshape(-1)[voxels] = np.arange(voxels.size)
    parent = _joined(voxels.size, _edges(ids))
    roots, piece = np.unique(parent, return_inverse=True)
    sizes = np.bincount(piece, minlength=roots.size)
    rank = np.empty(roots.size, np.intp)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(roots.size)
    return voxels, rank[piece]


def _edges(ids: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Pairs (edge, 2) of voxel ids that share a face."""
    found = []
    for axis in range(ids.ndim):
        moved = np.moveaxis(ids, axis, 0)
        pair = (moved[:-1] >= 0) & (moved[1:] >= 0)
        found.append(np.stack([moved[:-1][pair], moved[1:][pair]], axis=1))
    return np.concatenate(found)


def _joined(count: int, edges: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """For each id the smallest id of its piece: hook the larger root under the smaller, then shorten the paths."""
    parent = np.arange(count)
    while edges.size:
        a, b = parent[edges[:, 0]], parent[edges[:, 1]]
        apart = a != b
        if not apart.any():
            break
        edges, a, b = edges[apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(shorter := parent[parent], parent):
            parent = shorter
    return parent
