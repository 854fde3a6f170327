"""A network saved by torch.jit: code of the package, in torch's own language; loaded in a confined process only.

The language has operations that read and write files and loops without end: `sandbox` forbids the first, the
deadline of the parent ends the second.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dicom_node.errors import PackageError
from dicom_node.models.loaders.archive import opened_archive
from dicom_node.models.loaders.batches import first_tensor
from dicom_node.models.loaders.content import checked_content

__all__ = ["load"]


class _Scripted(torch.nn.Module):
    """A scripted network; one that takes single items only is found out at its first batch."""

    def __init__(self, inner: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.inner = inner
        self._single = False

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(batch, channel, ...) to logits. Raises RuntimeError with the reason, without the package's own code."""
        if not self._single:
            try:
                return self._run(batch)
            except RuntimeError as exc:
                if len(batch) == 1 or "memory" in str(exc):
                    raise
        found = torch.cat([self._run(one) for one in torch.split(batch, 1)])
        self._single = True
        return found

    def _run(self, batch: torch.Tensor) -> torch.Tensor:
        try:
            return first_tensor(self.inner(batch))
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            torch.jit.Error,
        ) as exc:  # pages of trace-back into the archive, the reason is the last line
            lines = str(exc).strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "the network failed") from exc


def load(path: Path, source: Mapping[str, Any], device: torch.device) -> torch.nn.Module:
    """The scripted or traced network in `path`, its weights as float32 on `device`. Raises PackageError."""
    content = checked_content(path, source)
    names = opened_archive(content, path).namelist()
    if not any(name.split("/", 1)[-1] == "constants.pkl" for name in names):
        raise PackageError(f"{path}: is no network saved by torch.jit.save (is it a state dict?)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself
            module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, AttributeError, LookupError, TypeError, torch.jit.Error) as exc:
        raise PackageError(f"{path}: is no network saved by torch.jit.save: {str(exc)[:300]}") from exc
    try:
        return _Scripted(module.eval().float()).requires_grad_(False)
    except RuntimeError as exc:
        raise PackageError(f"{path}: the network does not take float32: {str(exc)[:300]}") from exc
