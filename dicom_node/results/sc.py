"""Pictures as Secondary Capture images (PS3.3 A.8.1): for looking at only, which every text of the object says.

No text is drawn into the pixels: they are the engine's. Viewers list the object by its Series Description and overlay
its Image Comments, and both say that it is not for diagnosis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import _shell, codes
from dicom_node.results._sources import by_uid, decoded, numbers
from dicom_node.values import Picture, ResultContext, ResultValue

__all__ = ["ScEncoder"]

_LARGEST = 65535  # rows and columns are US
_WARNING = "Derived by an algorithm, not for diagnosis"


class ScEncoder:
    """Kind `sc`: every Picture becomes one Secondary Capture, grey or RGB, 8 bits.

    Burned In Annotation is what the image it is about says of itself; where that says nothing, nobody knows, and
    the attribute is left out (PS3.3 C.7.6.1: absent means that there may be some or not).
    """

    kind = "sc"

    def encode(
        self,
        values: Sequence[ResultValue],
        sources: Sequence[Dataset],
        context: ResultContext,
        already: Sequence[Dataset],
    ) -> Sequence[Dataset]:
        """See `interfaces.ResultEncoder`. Raises EncodingError for pixels of another form, and for a picture about an
        image that is not among the sources.
        """
        pictures = [value for value in values if isinstance(value, Picture)]
        if not pictures:
            return []
        with common.quiet():
            found = by_uid(sources)
            algorithm = common.Algorithm.of(context.provenance)
            return [
                _object(picture, found, number, context, algorithm) for number, picture in enumerate(pictures, start=1)
            ]


def _object(
    picture: Picture,
    sources: Mapping[str, Dataset],
    number: int,
    context: ResultContext,
    algorithm: common.Algorithm,
) -> Dataset:
    image = _shell.image_of(picture.sop_instance_uid, sources, "a picture")
    made = _shell.shell(
        kind="sc",
        sop_class_uid=SecondaryCaptureImageStorage,
        modality="OT",
        what="Picture, not for diagnosis",
        source=image,
        number=number,
        context=context,
        algorithm=algorithm,
    )
    made.ConversionType = "WSD"  # PS3.3 C.8.6.1
    made.ImageType = ["DERIVED", "SECONDARY"]
    title = common.clean(picture.title, "LO")
    made.DerivationDescription = common.clean(f"{title}. {_WARNING}. {algorithm.name} {algorithm.version}", "ST")
    made.ImageComments = common.remarks(context, (f"{title}. {_WARNING}", *picture.notes))
    if (burned_in := str(decoded(image, "BurnedInAnnotation") or "")) in ("YES", "NO"):
        made.BurnedInAnnotation = burned_in
    made.SourceImageSequence = _shell.purposed([image], codes.SOURCE_IMAGE)
    made.ReferencedSeriesSequence = _shell.referred([image])
    made.update(_shell.lossy(image))
    pixels = _add_pixels(made, picture)
    _orient(made, image)
    return common.encoded(common.finish(made, image, context, algorithm), pixels=pixels)


def _orient(made: Dataset, image: Dataset) -> None:
    """Where a picture lies is known only when it has the image's own matrix; empty is unknown (PS3.3 C.7.6.1)."""
    same = (made.Rows, made.Columns) == (numbers(image, "Rows", 1) or ()) + (numbers(image, "Columns", 1) or ())
    made.PatientOrientation = (decoded(image, "PatientOrientation") or "") if same else ""
    if part := common.clean(str(decoded(image, "BodyPartExamined") or "").upper(), "CS"):
        made.BodyPartExamined = part
    laterality = str(decoded(image, "Laterality") or decoded(image, "ImageLaterality") or "")
    if laterality in ("L", "R"):
        made.Laterality = laterality
    elif not part:
        made.Laterality = ""


def _add_pixels(made: Dataset, picture: Picture) -> bytes:
    """Image Pixel Module (PS3.3 C.7.6.3), and the pixels, an even number of bytes."""
    pixels = picture.pixels
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise EncodingError(f"a picture of {pixels.dtype} {pixels.shape}, expected uint8, rows x columns [x 3]")
    if not 0 < min(pixels.shape[:2]) <= max(pixels.shape[:2]) <= _LARGEST:
        raise EncodingError(f"a picture of {pixels.shape[0]} x {pixels.shape[1]} pixels cannot be an image")
    made.SamplesPerPixel = 1 if grey else 3
    made.PhotometricInterpretation = "MONOCHROME2" if grey else "RGB"
    if not grey:
        made.PlanarConfiguration = 0
    made.Rows, made.Columns = pixels.shape[:2]
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8, 8, 7, 0
    content = np.ascontiguousarray(pixels).tobytes()
    if len(content) > 0xFFFFFFFE:
        raise EncodingError(f"a picture of {len(content)} bytes is longer than an element can be")
    return content + b"\0" * (len(content) % 2)
