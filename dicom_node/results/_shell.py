"""What every object that highdicom does not build starts from, and how it refers to the images it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydicom.dataset import Dataset

from dicom_node import __version__
from dicom_node.errors import EncodingError
from dicom_node.results import _common as common
from dicom_node.results import codes
from dicom_node.results._sources import decoded, reference
from dicom_node.values import Code, ResultContext

__all__ = [
    "algorithm_identification",
    "image_of",
    "images_of",
    "lossy",
    "predecessors",
    "purposed",
    "referred",
    "shell",
]


def shell(
    *,
    kind: str,
    sop_class_uid: str,
    modality: str,
    what: str,
    source: Dataset,
    number: int,
    context: ResultContext,
    algorithm: common.Algorithm,
) -> Dataset:
    """SOP Common, Series and (Enhanced) General Equipment of the `number`th object of its kind.

    `common.finish` adds patient, study and times once everything else is there.
    """
    series = str(source.SeriesInstanceUID)
    made = Dataset()
    made.SOPClassUID = sop_class_uid
    made.SOPInstanceUID = common.result_uid("instance", context.run_key, kind, series, str(number))
    made.Modality = modality
    made.SeriesInstanceUID = common.result_uid("series", context.run_key, kind, series)
    made.SeriesNumber = common.series_number(context, kind)
    made.SeriesDescription = common.series_description(context, algorithm, what)
    made.InstanceNumber = number
    made.Manufacturer = common.MAKER
    made.ManufacturerModelName = common.MAKER
    made.DeviceSerialNumber = common.clean(context.node_name, "LO") or common.MAKER
    made.SoftwareVersions = __version__
    return made


def algorithm_identification(context: ResultContext, algorithm: common.Algorithm) -> Dataset:
    """An item of the Algorithm Identification Macro (PS3.3 10.16)."""
    item = Dataset()
    item.AlgorithmFamilyCodeSequence = [codes.concept(context.provenance.family)]
    item.AlgorithmName = algorithm.name
    item.AlgorithmVersion = algorithm.version
    item.AlgorithmSource = algorithm.manufacturer
    if algorithm.parameters:
        item.AlgorithmParameters = common.clean("; ".join(algorithm.parameters), "LT")
    return item


# --- sources ---------------------------------------------------------------------------------------------------------


def image_of(uid: str, sources: Mapping[str, Dataset], what: str) -> Dataset:
    """The source of that SOP Instance UID. Raises EncodingError, naming `what` has none."""
    image = sources.get(uid)
    if image is None:
        raise EncodingError(f"no source for the image {uid} of {what}")
    return image


def images_of(uids: Sequence[str], sources: Mapping[str, Dataset], what: str) -> list[Dataset]:
    """Each of them once, of one study. Raises EncodingError for one without a source, and when none is named."""
    images = [image_of(uid, sources, what) for uid in dict.fromkeys(uids)]
    if len({str(image.StudyInstanceUID) for image in images}) != 1:
        raise EncodingError(f"{what} is about images of no study or of several")
    return images


def referred(images: Sequence[Dataset]) -> list[Dataset]:
    """Items of Referenced Series Sequence (Common Instance Reference, PS3.3 C.12.2)."""
    found: dict[str, Dataset] = {}
    for image in images:
        uid = str(image.SeriesInstanceUID)
        if uid not in found:
            found[uid] = Dataset()
            found[uid].SeriesInstanceUID = uid
            found[uid].ReferencedInstanceSequence = []
        found[uid].ReferencedInstanceSequence.append(reference(image))
    return list(found.values())


def purposed(images: Sequence[Dataset], purpose: Code) -> list[Dataset]:
    """References that say what the images were for (items of Source Image or Source Instance Sequence)."""
    items = []
    for image in images:
        item = reference(image)
        item.PurposeOfReferenceCodeSequence = [codes.concept(purpose)]
        items.append(item)
    return items


def lossy(source: Dataset) -> Dataset:
    """Once lossy, always lossy (PS3.3 C.7.6.1.1.5): what a picture or mask made from `source` must tell."""
    told = Dataset()
    told.LossyImageCompression = "00"
    if str(decoded(source, "LossyImageCompression") or "") == "01":
        told.LossyImageCompression = "01"
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if value := decoded(source, keyword):
                setattr(told, keyword, value)
    return told


def predecessors(context: ResultContext, sop_class_uid: str) -> list[Dataset]:
    """Items of Predecessor Documents Sequence: the results of that class of the run this one follows."""
    studies: dict[str, Dataset] = {}
    series: dict[str, Dataset] = {}
    for earlier in context.predecessors:
        if earlier.sop_class_uid != sop_class_uid:
            continue
        study = studies.setdefault(earlier.study_instance_uid, Dataset())
        if "StudyInstanceUID" not in study:
            study.StudyInstanceUID = earlier.study_instance_uid
            study.ReferencedSeriesSequence = []
        if earlier.series_instance_uid not in series:
            one = series[earlier.series_instance_uid] = Dataset()
            one.SeriesInstanceUID = earlier.series_instance_uid
            one.ReferencedSOPSequence = []
            study.ReferencedSeriesSequence.append(one)
        item = Dataset()
        item.ReferencedSOPClassUID = earlier.sop_class_uid
        item.ReferencedSOPInstanceUID = earlier.sop_instance_uid
        series[earlier.series_instance_uid].ReferencedSOPSequence.append(item)
    return list(studies.values())
