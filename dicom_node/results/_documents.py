"""What encapsulated PDF (PS3.3 A.45.1) and STL (A.85.1) share: the Encapsulated Document Module, C.24.2."""

from __future__ import annotations

from collections.abc import Sequence

from highdicom import sr
from highdicom.sr import RelationshipTypeValues
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import _shell, codes
from dicom_node.values import ResultContext

__all__ = ["add_document", "document_title"]

_LONGEST = 0xFFFFFFFE  # of a value, PS3.5 7.1.2


def document_title(context: ResultContext, title: str) -> str:
    """ST, for people: that it is an algorithm's, and whether of a demonstration."""
    start = "AI DEMONSTRATION" if context.provenance.demonstration else "AI"
    return common.clean(f"{start}: {' '.join(title.split())}".rstrip(": "), "ST")


def add_document(
    made: Dataset,
    content: bytes,
    *,
    mime_type: str,
    title: str,
    burned_in: bool,
    images: Sequence[Dataset],
    remarks: str,
    items: Sequence[Dataset],
    context: ResultContext,
) -> None:
    """The module, with `content` in it. `remarks` and content `items` stand in the Content Sequence, for readers that
    look no further than the header. Raises EncodingError for more bytes than an element holds.
    """
    if len(content) > _LONGEST:
        raise EncodingError(f"a document of {len(content)} bytes is longer than an element can be")
    made.AcquisitionDateTime = ""
    made.BurnedInAnnotation = "YES" if burned_in else "NO"
    made.VerificationFlag = "UNVERIFIED"
    made.ConceptNameCodeSequence = []
    made.DocumentTitle = title
    made.SourceInstanceSequence = _shell.purposed(images, codes.SOURCE_OF_DOCUMENT)
    if earlier := _shell.predecessors(context, str(made.SOPClassUID)):
        made.PredecessorDocumentsSequence = earlier
    told = [*([_comment(remarks)] if remarks else []), *items]
    if told:
        made.ValueType = "CONTAINER"
        made.ContinuityOfContent = "SEPARATE"
        made.ContentSequence = told
    made.MIMETypeOfEncapsulatedDocument = mime_type
    made.EncapsulatedDocument = content + b"\0" * (len(content) % 2)
    made.EncapsulatedDocumentLength = len(content)


def _comment(text: str) -> Dataset:
    return sr.TextContentItem(
        name=codes.concept(codes.COMMENT), value=text, relationship_type=RelationshipTypeValues.CONTAINS
    )
