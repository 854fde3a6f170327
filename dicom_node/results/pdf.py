"""Documents as Encapsulated PDF (PS3.3 A.45.1), byte for byte as the engine wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import _shell
from dicom_node.results._documents import add_document, document_title
from dicom_node.results._sources import by_uid
from dicom_node.values import Document, ResultContext, ResultValue

__all__ = ["PdfEncoder"]

_WITHIN = 1024  # readers look for the header so far (ISO 32000-1, annex H.3)


class PdfEncoder:
    """Kind `pdf`: every Document becomes one Encapsulated PDF.

    What it shows may name the patient, so Burned In Annotation is YES. It succeeds (Predecessor Documents) the PDFs
    among `context.predecessors`.
    """

    kind = "pdf"

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """See `interfaces.ResultEncoder`. Raises EncodingError for bytes that are no PDF, and for a document about
        images that are not among the sources.
        """
        documents = [value for value in values if isinstance(value, Document)]
        if not documents:
            return []
        with common.quiet():
            found = by_uid(sources)
            algorithm = common.Algorithm.of(context.provenance)
            return [
                _object(value, found, number, context, algorithm) for number, value in enumerate(documents, start=1)
            ]


def _object(
    document: Document,
    sources: Mapping[str, Dataset],
    number: int,
    context: ResultContext,
    algorithm: common.Algorithm,
) -> Dataset:
    if b"%PDF-" not in document.pdf[:_WITHIN]:
        raise EncodingError("a document is no PDF: it does not begin with '%PDF-'")
    images = _shell.images_of(document.sop_instance_uids, sources, "a document")
    made = _shell.shell(
        kind="pdf",
        sop_class_uid=EncapsulatedPDFStorage,
        modality="DOC",
        what="Document",
        source=images[0],
        number=number,
        context=context,
        algorithm=algorithm,
    )
    made.ConversionType = "WSD"  # written by a workstation, not scanned (PS3.3 C.8.6.1)
    add_document(
        made,
        document.pdf,
        mime_type="application/pdf",
        title=document_title(context, document.title),
        burned_in=True,
        images=images,
        remarks=common.remarks(context, ()),
        items=(),
        context=context,
    )
    return common.encoded(common.finish(made, images[0], context, algorithm))
