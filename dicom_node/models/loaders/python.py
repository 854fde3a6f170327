"""A network that the package brings as Python of its own: trust `code`, for those an administrator has pinned.

The parent has compared the file's digest with `jobs.trusted_code` (`trust`); here it is checked on the very bytes that
run. They run in the confined process, as a lone file: other files of the package are not importable.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dicom_node.errors import PackageError
from dicom_node.models.loaders.batches import first_tensor
from dicom_node.models.loaders.content import checked_content
from dicom_node.models.loaders.state_dict import filled, tensors_in

__all__ = ["load"]


class _Foreign(torch.nn.Module):
    """A network whose code may raise anything: told as RuntimeError, which is how torch's own networks speak."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(batch, channel, ...) to logits."""
        try:
            return first_tensor(self.inner(batch))
        except RuntimeError:
            raise
        except Exception as exc:
            raise RuntimeError(f"the network's own code: {type(exc).__name__}: {str(exc)[:300]}") from exc


def load(path: Path, source: Mapping[str, Any]) -> torch.nn.Module:
    """The network of class `source.network.name` in `source.code.path`, with the weights in `path`, on the CPU.

    Raises PackageError, also for whatever the package's code raises.
    """
    found = tensors_in(checked_content(path, source), path, source.get("key"))
    code, network = source["code"], source["network"]
    file = path.parents[len(Path(source["path"]).parts) - 1] / code["path"]
    content = checked_content(file, code)
    try:
        made = filled(lambda: _made(_module(content, file, code["sha256"]), network), found, path)
    except PackageError:
        raise
    except Exception as exc:
        raise PackageError(f"{file}: {type(exc).__name__}: {str(exc)[:300]}") from exc
    return _Foreign(made).eval().requires_grad_(False)


def _module(content: bytes, file: Path, digest: str) -> ModuleType:
    module = ModuleType(f"package_code_{digest[:16]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # data classes and the like look for their module
    exec(compile(content, str(file), "exec"), module.__dict__)
    return module


def _made(module: ModuleType, network: Mapping[str, Any]) -> torch.nn.Module:
    kind = getattr(module, network["name"], None)
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise PackageError(f"source.network.name: {module.__file__} has no torch.nn.Module called {network['name']!r}")
    return kind(**network["args"])
