"""What an engine of kind `relu` can be told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dicom_node.engines._http import HttpSettings, Options
from dicom_node.engines.labels import LabelTable, plain
from dicom_node.engines.oauth import OAuthSettings

__all__ = ["MeshOrder", "ReluOptions", "VolumeOrder"]

MAX_FILES = 128


def _no_draco(value: Any) -> Any:
    if value == ".drc":
        raise ValueError("Draco surfaces are not read; order .stl, .ply or .obj")
    return value


def _structure(value: str) -> str:
    if not value.strip() or not value.isprintable() or "\\" in value:
        raise ValueError("expected the name of a structure as the engine's documentation has it, as mandible")
    return value


def _small(value: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        length = len(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError):
        raise ValueError("expected what JSON can hold") from None
    if length > 16_384:
        raise ValueError("expected at most 16384 characters as JSON")
    return value


Structure = Annotated[str, Field(max_length=64), AfterValidator(_structure)]
Structures = Annotated[tuple[Structure, ...], Field(min_length=1, max_length=64)]


class MeshOrder(Options):
    """One surface that is ordered; of several structures, one surface around all of them."""

    extension: Annotated[Literal[".stl", ".ply", ".obj"], BeforeValidator(_no_draco)] = ".stl"
    structures: Structures
    title: Annotated[str, Field(max_length=64)] = ""


class VolumeOrder(Options):
    """One label volume that is ordered: a mask of one structure, or a label map of several, numbered from 1."""

    extension: Literal[".nii", ".nii.gz", ".nrrd"] = ".nii.gz"
    structures: Structures


class ReluOptions(HttpSettings):
    """`options` of an engine of kind `relu`; those of `HttpSettings` stand beside them."""

    max_response_bytes: Annotated[int, Field(gt=0)] = 8 * 1024**2
    auth: OAuthSettings
    job_path: Literal["/job", "/generic-job"] = "/job"
    """Engines of version 2 and older have /generic-job."""
    meshes: Annotated[tuple[MeshOrder, ...], Field(max_length=MAX_FILES)] = ()
    volumes: Annotated[tuple[VolumeOrder, ...], Field(max_length=MAX_FILES)] = ()
    volumes_key: Annotated[str, Field(pattern=r"^[A-Za-z]{1,32}$")] = "volumes"
    """The key of `outputFiles` volumes are ordered under."""
    job_options: Annotated[Mapping[str, Any], AfterValidator(_small)] = Field(default_factory=dict)
    """Goes into the job as `options`."""
    cloud_package: Annotated[str, Field(max_length=128)] = ""
    handover: Literal["upload", "link"] = "upload"
    """upload: to the URL the engine hands out. link: the engine fetches from the node's HTTP port."""
    link_lifetime_s: Annotated[float, Field(ge=600, le=7 * 86400)] = 86400.0
    webhook: bool = False
    """Let the engine tell when it is done, at the node's HTTP port; it is asked at intervals all the same."""
    notify: Literal["put", "post"] = "put"
    """How the end of the upload is told; the other way is tried when the engine does not know this one."""
    first_poll_s: Annotated[float, Field(ge=1, le=3600)] = 10.0
    longest_poll_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    mesh_frame: Literal["auto", "lps", "ras"] = "auto"
    """auto: the one the surfaces fit the images in. The files do not say it; write it here once it is known."""
    check_size: bool = True
    """Refuse a file that has not the size the engine announced."""
    max_mesh_bytes: Annotated[int, Field(gt=0, le=1024**3)] = 512 * 1024**2
    labels: LabelTable = LabelTable()
    """What its structures are, by name."""
    send_identifiable: bool = False
    """Let an engine on another machine see who the patient is."""
    manufacturer: Annotated[str, Field(min_length=1, max_length=64)] = "Relu"
    notice: Annotated[str, Field(max_length=200)] = ""
    """Goes into every result, e.g. "research use only"."""

    @model_validator(mode="after")
    def _orders_make_sense(self) -> ReluOptions:
        if not self.meshes and not self.volumes:
            raise ValueError("meshes or volumes: nothing is ordered; name structures, as {structures: [mandible]}")
        if len(self.volumes) > 1 and any(len(order.structures) > 1 for order in self.volumes):
            raise ValueError("volumes: order either one label map of several structures, or masks of one each")
        for name, orders in (("meshes", self.meshes), ("volumes", self.volumes)):
            kinds = [tuple(plain(one) for one in order.structures) for order in orders]
            if len(set(kinds)) != len(kinds):
                raise ValueError(f"{name}: the same structures are ordered twice")
        return self
