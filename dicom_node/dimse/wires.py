"""The wires there are, by the word of the configuration. pynetdicom is loaded only where it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from dicom_node.dimse import requestor, server
from dicom_node.dimse.session import OpenLink

if TYPE_CHECKING:
    from dicom_node.dimse.pynetdicom_scp import PynetdicomServer

__all__ = ["Wire", "open_link", "server_class"]

Wire = Literal["own", "pynetdicom"]


def server_class(wire: Wire) -> type[server.DicomServer] | type[PynetdicomServer]:
    """The DICOM server on this wire; both are made and used alike."""
    if wire == "own":
        return server.DicomServer
    from dicom_node.dimse.pynetdicom_scp import PynetdicomServer

    return PynetdicomServer


def open_link(wire: Wire) -> OpenLink:
    """What opens an association as requestor on this wire."""
    if wire == "own":
        return requestor.open_link
    from dicom_node.dimse import pynetdicom_requestor

    return pynetdicom_requestor.open_link
