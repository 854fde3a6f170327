"""Surfaces as Encapsulated STL (PS3.3 A.85.1): binary STL in millimetres, in the Frame of Reference of the images.

STL itself knows neither unit nor place nor name. The header of the object tells all three: Measurement Units, Frame of
Reference UID, and in its Content Sequence each structure as a coded Finding with the Tracking UID that the structure
has in segmentations and reports of the same algorithm on the same series.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from highdicom import sr
from highdicom.color import CIELabColor
from highdicom.sr import RelationshipTypeValues
from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedSTLStorage

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import _shell, codes
from dicom_node.results._colors import display_color
from dicom_node.results._documents import add_document, document_title
from dicom_node.results._sources import by_uid, decoded
from dicom_node.values import Mesh, ResultContext, ResultValue, Segment

__all__ = ["StlEncoder"]

_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attributes", "<u2")])
_HEADER = b"binary STL, patient coordinates (LPS), mm".ljust(80)  # may not begin with "solid", which is text STL
_TITLES = {"CT": codes.CT_MODEL, "MR": codes.MR_MODEL, "US": codes.US_MODEL}  # by the modality of the images
_CHUNK = 1 << 18  # triangles at a time, so that twice the surface is never in memory


class StlEncoder:
    """Kind `stl`: every Mesh becomes one Encapsulated STL, all of one run in one series.

    Vertices are written as they are. It succeeds (Predecessor Documents) the surfaces among `context.predecessors`.
    """

    kind = "stl"

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """See `interfaces.ResultEncoder`. Raises EncodingError for a mesh that is none, and when the sources have no
        Frame of Reference in common.
        """
        meshes = [value for value in values if isinstance(value, Mesh)]
        if not meshes:
            return []
        with common.quiet():
            images = _placed(by_uid(sources))
            algorithm = common.Algorithm.of(context.provenance)
            return [_object(mesh, images, number, context, algorithm) for number, mesh in enumerate(meshes, start=1)]


def _placed(sources: Mapping[str, Dataset]) -> list[Dataset]:
    """The images, in an order that does not depend on the order they came in."""
    images = [sources[uid] for uid in sorted(sources)]
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if len({str(decoded(image, keyword) or "") for image in images}) != 1 or not decoded(images[0], keyword):
            raise EncodingError(f"{keyword} is missing or differs between the images a mesh was made from")
    return images


def _object(
    mesh: Mesh, images: Sequence[Dataset], number: int, context: ResultContext, algorithm: common.Algorithm
) -> Dataset:
    if not mesh.segments:
        raise EncodingError("a mesh encloses no structure: its segments are empty")
    content, first = _binary_stl(mesh), images[0]
    made = _shell.shell(
        kind="stl",
        sop_class_uid=EncapsulatedSTLStorage,
        modality="M3D",
        what="Surface",
        source=first,
        number=number,
        context=context,
        algorithm=algorithm,
    )
    made.FrameOfReferenceUID = str(first.FrameOfReferenceUID)
    made.PositionReferenceIndicator = common.clean(str(decoded(first, "PositionReferenceIndicator") or ""), "LO")
    remarks = common.remarks(context, mesh.notes)
    add_document(
        made,
        content,
        mime_type="model/stl",
        title=document_title(context, mesh.title),
        burned_in=False,
        images=images,
        remarks=remarks,
        items=[_structure(segment, context, algorithm) for segment in mesh.segments],
        context=context,
    )
    if title := _TITLES.get(str(decoded(first, "Modality") or "")):
        made.ConceptNameCodeSequence = [codes.concept(title)]
    made.ReferencedSeriesSequence = _shell.referred(images)
    _describe_model(made, mesh, remarks, context, algorithm)
    return common.encoded(common.finish(made, first, context, algorithm))


def _describe_model(
    made: Dataset, mesh: Mesh, remarks: str, context: ResultContext, algorithm: common.Algorithm
) -> None:
    """Manufacturing 3D Model Module (PS3.3 C.35.1)."""
    first = mesh.segments[0]
    labels = ", ".join(_label(segment) for segment in mesh.segments)
    made.MeasurementUnitsCodeSequence = [codes.concept(codes.MILLIMETRE)]
    made.DerivationAlgorithmSequence = [_shell.algorithm_identification(context, algorithm)]
    made.ContentDescription = common.clean("; ".join(text for text in (labels, remarks) if text), "LO")
    color = CIELabColor.from_rgb(*(first.color_rgb or display_color(min(max(first.number, 1), 255))))
    made.RecommendedDisplayCIELabValue = list(color.value)


def _label(segment: Segment) -> str:
    return common.clean(segment.label, "LO") or segment.key


def _structure(segment: Segment, context: ResultContext, algorithm: common.Algorithm) -> Dataset:
    item = sr.CodeContentItem(
        name=codes.concept(codes.FINDING),
        value=codes.concept(segment.type),
        relationship_type=RelationshipTypeValues.CONTAINS,
    )
    identifier = common.tracking_identifier(algorithm, _label(segment))
    told: list[sr.ContentItem] = [
        sr.TextContentItem(
            codes.concept(codes.TRACKING_IDENTIFIER), identifier, RelationshipTypeValues.HAS_OBS_CONTEXT
        ),
        sr.UIDRefContentItem(
            codes.concept(codes.TRACKING_UID),
            common.tracking_uid(context, segment.key),
            RelationshipTypeValues.HAS_OBS_CONTEXT,
        ),
    ]
    if segment.modifier is not None:
        sided = any(codes.same_code(side, segment.modifier) for side in (codes.LEFT, codes.RIGHT))
        name = codes.concept(codes.LATERALITY if sided else codes.TOPOGRAPHICAL_MODIFIER)
        value = codes.concept(segment.modifier)
        told.append(sr.CodeContentItem(name, value, RelationshipTypeValues.HAS_CONCEPT_MOD))
    item.ContentSequence = sr.ContentSequence(told)
    return item


def _binary_stl(mesh: Mesh) -> bytes:
    """Header, number of triangles, and of each the normal its winding gives and its corners."""
    vertices, triangles = mesh.vertices, mesh.triangles
    if vertices.ndim != 2 or vertices.shape[1] != 3 or triangles.ndim != 2 or triangles.shape[1] != 3:
        raise EncodingError(f"mesh: vertices {vertices.shape}, triangles {triangles.shape}, expected n x 3 and m x 3")
    if triangles.dtype.kind not in "ui" or not len(triangles):
        raise EncodingError("mesh: it has no triangles, or they are no whole numbers")
    if int(triangles.min()) < 0 or int(triangles.max()) >= len(vertices):
        raise EncodingError(f"mesh: a triangle has a corner that is none of the {len(vertices)} vertices")
    if not np.isfinite(vertices).all():
        raise EncodingError("mesh: a vertex lies nowhere (a coordinate is not finite)")
    written = bytearray(_HEADER + len(triangles).to_bytes(4, "little"))
    for start in range(0, len(triangles), _CHUNK):
        written += _records(vertices[triangles[start : start + _CHUNK]])
    return bytes(written)


def _records(corners: npt.NDArray[np.float32]) -> bytes:
    """Of triangles (m, 3, 3): the normal, nothing where a triangle has no area, and the corners."""
    records = np.zeros(len(corners), _TRIANGLE)
    records["corners"] = corners
    sides = corners[:, 1:].astype(np.float64) - corners[:, :1]
    normals = np.cross(sides[:, 0], sides[:, 1])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    records["normal"] = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    return records.tobytes()
