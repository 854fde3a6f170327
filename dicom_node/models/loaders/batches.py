"""Graphs that were saved for one batch size only: give them batches of that size, whatever the caller has."""

from __future__ import annotations

from typing import Any

import torch

from dicom_node.errors import EngineError

__all__ = ["FixedBatch", "first_tensor"]


def first_tensor(output: Any) -> torch.Tensor:
    """The logits among what a network returned: a tensor, or the first of several (deep supervision)."""
    if isinstance(output, dict):
        output = list(output.values())
    while isinstance(output, list | tuple) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise EngineError(f"the network returned {type(output).__name__}, not a tensor")
    return output


class FixedBatch(torch.nn.Module):
    """`inner` over pieces of exactly `size`; the last is filled up with repeats of its last item."""

    def __init__(self, inner: torch.nn.Module, size: int) -> None:
        super().__init__()
        self.inner = inner
        self.size = size

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(batch, ...) to logits (batch, ...)."""
        found = []
        for start in range(0, len(batch), self.size):
            piece = batch[start : start + self.size]
            count = len(piece)
            if count < self.size:
                piece = torch.cat([piece, piece[-1:].expand(self.size - count, *piece.shape[1:])])
            found.append(first_tensor(self.inner(piece))[:count])
        return found[0] if len(found) == 1 else torch.cat(found)
