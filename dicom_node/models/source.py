"""The `source` of `model.yaml`: which file holds the network, in which format, and what it takes to trust it.

Formats that are data (`TRUST` says so) run nothing of the package: weights are read by restricted readers and fill a
network built here by name. Formats that are a graph of operations run only inside the runtime process, which may
reach no network and write no file; their package must say `trust: graph`. Python of the package runs there too, and
only when the node's settings name its digest (`trust: code`, see `trust`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dicom_node.models.schema import Block, Digest, PlainArgs

__all__ = [
    "NETWORKS",
    "NNUNET_NETWORKS",
    "TRUST",
    "ExportedSource",
    "FoldFile",
    "NetworkBlock",
    "NnunetSource",
    "OnnxSource",
    "PythonSource",
    "Source",
    "StateDictSource",
    "TorchScriptSource",
    "XrvSource",
]

# Exact names: networks whose constructors take plain values, run nothing of the package and fetch nothing.
NETWORKS = frozenset(
    {"AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "DenseNet", "DynUNet", "ResNet", "SegResNet"}
    | {"SwinUNETR", "UNETR", "UNet", "VNet"}
)
# of dynamic_network_architectures, built here from plain arguments
NNUNET_NETWORKS = frozenset({"PlainConvUNet", "ResidualEncoderUNet"})

# what a package in this format must be trusted with
TRUST: Mapping[str, Literal["data", "graph", "code"]] = {
    "state_dict": "data",
    "xrv": "data",
    "nnunet": "data",
    "torchscript": "graph",
    "pt2": "graph",
    "onnx": "graph",
    "python": "code",
}


class NetworkBlock(Block):
    """A network of monai.networks.nets by its exact name, with plain arguments."""

    name: str
    args: PlainArgs = Field(default={})

    @model_validator(mode="after")
    def _allowed(self) -> NetworkBlock:
        if self.name not in NETWORKS:
            raise ValueError(f"{self.name!r} is not on the list of networks: {', '.join(sorted(NETWORKS))}")
        return self


class FoldFile(Block):
    """A file of the package and the digest of its content. `path` is relative and stays inside the folder."""

    suffixes: ClassVar[tuple[str, ...]] = (".safetensors", ".pt", ".pth")

    path: str
    sha256: Digest

    @model_validator(mode="after")
    def _inside(self) -> FoldFile:
        path = Path(self.path)
        if path.is_absolute() or ".." in path.parts or not self.path.isprintable() or path.suffix not in self.suffixes:
            wanted = " or ".join(self.suffixes)
            raise ValueError(f"path: expected a {wanted} file inside the package folder")
        return self


class StateDictSource(FoldFile):
    """Weights by name for a network of MONAI; `key` names the mapping inside the file that holds them."""

    format: Literal["state_dict"]
    network: NetworkBlock
    key: str | None = None


class TorchScriptSource(FoldFile):
    """A network saved by torch.jit."""

    suffixes = (".ts", ".pt", ".pth", ".jit")

    format: Literal["torchscript"]


class ExportedSource(FoldFile):
    """A network saved by torch.export."""

    suffixes = (".pt2",)

    format: Literal["pt2"]


class OnnxSource(FoldFile):
    """An ONNX graph, run by onnxruntime (extra `onnx`)."""

    suffixes = (".onnx",)

    format: Literal["onnx"]


class XrvSource(FoldFile):
    """A DenseNet121 of torchxrayvision.

    `thresholds`: the operating point of each output, which becomes 0.5, null for an untrained one; with them the
    network gives probabilities (`output.activation: none`), without any it gives logits.
    """

    format: Literal["xrv"]
    thresholds: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)] | None, ...], Field(max_length=256)] = ()


class NnunetNetworkBlock(Block):
    """A network of nnU-Net v2 by its class name, with the plain arguments of plans.json."""

    name: Literal["PlainConvUNet", "ResidualEncoderUNet"]
    args: PlainArgs = Field(default={})


class NnunetSource(FoldFile):
    """Checkpoints of an nnU-Net v2 training: the first fold, then `folds`, whose logits are averaged."""

    format: Literal["nnunet"]
    network: NnunetNetworkBlock
    folds: tuple[FoldFile, ...] = ()


class CodeFile(FoldFile):
    """A lone Python file; what it imports must be installed with the node."""

    suffixes = (".py",)


class PythonNetworkBlock(Block):
    """A class of the package's Python file, a torch.nn.Module, with plain arguments."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
    args: PlainArgs = Field(default={})


class PythonSource(FoldFile):
    """Weights by name, as `StateDictSource`, for a network whose class the package's `code` defines."""

    format: Literal["python"]
    code: CodeFile
    network: PythonNetworkBlock
    key: str | None = None


Source = Annotated[
    StateDictSource | TorchScriptSource | ExportedSource | OnnxSource | XrvSource | NnunetSource | PythonSource,
    Field(discriminator="format"),
]
