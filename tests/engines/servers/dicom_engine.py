"""An AE for tests that takes images by C-STORE and answers by C-STORE with objects it made of them.

Written from the Standard, not from the adapter. By hand, answering every association by itself:
`python -m tests.engines.servers.dicom_engine --port 11113 --node 127.0.0.1:11112/DICOM_NODE`.

What it can answer with (`answer(...)`): seg, sr (on the images and the SEG), sr-on-seg (on the SEG alone), capture (no
references), frame (only the frame of reference), derived (new images, new series, referring to the sources), echo (the
images themselves), derived-in-series (new images in the source's series), foreign (refers to images nobody sent),
other-patient (a SEG that names somebody else), stray (a SEG of a study nobody sent).
How it can do wrong when it is sent something (`misbehave(...)`): refuse (0xA900), busy (0xA700), drop (abort after
the first image).
"""

import argparse
import copy
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import AE, StoragePresentationContexts, evt

SEG, SR = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.88.34"
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SPATIAL_REGISTRATION = "1.2.840.10008.5.1.4.1.1.66.1"
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyID")


@dataclass
class DicomEngineServer:
    """The AE, on a free port of 127.0.0.1. `received` has the images of every C-STORE, in order."""

    title: str = "AI_BOX"
    port: int = 0
    node: tuple[str, int, str] = ("127.0.0.1", 0, "DICOM_NODE")
    automatic: Sequence[str] = ()
    received: list[Dataset] = field(default_factory=list)
    associations: int = 0

    def __post_init__(self) -> None:
        """Nothing listens before `__enter__`."""
        self._wrong: list[str] = []
        self._first_title = self.title
        self._guard = threading.Lock()
        self._server: Any = None
        self._new: dict[Any, list[Dataset]] = {}  # by association: many may send at once

    def __enter__(self) -> "DicomEngineServer":
        entity = AE(ae_title=self.title)
        entity.require_called_aet = True
        for context in StoragePresentationContexts:
            entity.add_supported_context(str(context.abstract_syntax), [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        entity.add_supported_context("1.2.840.10008.1.1")
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_RELEASED, self._released)]
        self._server = entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        self.port = int(self._server.socket.getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def forget(self) -> None:
        """As if it had just been started."""
        self._wrong, self._new, self.received, self.associations = [], {}, [], 0
        self.title, self.automatic = self._first_title, ()

    def misbehave(self, *words: str) -> None:
        """Each word is used up by one image."""
        with self._guard:
            self._wrong.extend(words)

    def uids(self) -> list[str]:
        """SOP Instance UIDs as they came."""
        return [str(ds.SOPInstanceUID) for ds in self.received]

    def _store(self, event: Any) -> int:
        with self._guard:
            word = self._wrong.pop(0) if self._wrong else ""
        if word == "drop":
            event.assoc.abort()
            return 0x0110
        if word:
            return {"refuse": 0xA900, "busy": 0xA700}[word]
        ds = event.dataset
        ds.file_meta = event.file_meta
        self.received.append(ds)
        self._new.setdefault(event.assoc, []).append(ds)
        return 0x0000

    def _released(self, event: Any) -> None:
        self.associations += 1
        images = self._new.pop(event.assoc, [])
        if images and self.automatic:
            threading.Thread(target=self.answer, args=tuple(self.automatic), kwargs={"images": images}).start()

    # --- answering

    def answer(self, *words: str, images: Sequence[Dataset] = ()) -> list[int]:
        """Make these of the images (by default, all that were received) and send them in one association."""
        sources = list(images or self.received)
        made: list[Dataset] = []
        for word in words:
            made += self._make(word, sources, made)
        return self.send(made)

    def send(self, objects: Sequence[Dataset]) -> list[int]:
        """C-STORE to the node; the statuses."""
        entity = AE(ae_title=self.title)
        for sop_class in dict.fromkeys(str(ds.SOPClassUID) for ds in objects):
            entity.add_requested_context(sop_class, ExplicitVRLittleEndian)
        host, port, title = self.node
        association = entity.associate(host, port, ae_title=title)
        assert association.is_established, "the node does not take the association"
        statuses = [int(association.send_c_store(ds).Status) for ds in objects]
        association.release()
        return statuses

    def _make(self, word: str, sources: Sequence[Dataset], made: Sequence[Dataset]) -> list[Dataset]:
        if word == "echo":
            return [_encoded(copy.deepcopy(ds)) for ds in sources]
        if word in ("derived", "derived-in-series"):
            return _derived(sources, same_series=word == "derived-in-series")
        first = sources[0]
        if word == "capture":
            return [_object(first, CAPTURE, "OT")]
        if word == "frame":
            ds = _object(first, SPATIAL_REGISTRATION, "REG")
            ds.FrameOfReferenceUID = first.FrameOfReferenceUID
            return [ds]
        if word in ("sr", "sr-on-seg"):
            ds = _object(first, SR, "SR")
            seg = [one for one in made if one.Modality == "SEG"]
            _refer(ds, "CurrentRequestedProcedureEvidenceSequence", seg + ([] if word == "sr-on-seg" else [*sources]))
            return [ds]
        ds = _object(first, SEG, "SEG")
        ds.FrameOfReferenceUID = first.FrameOfReferenceUID
        if word == "foreign":
            other = copy.copy(first)
            other.SOPInstanceUID, other.SeriesInstanceUID = generate_uid(), generate_uid()
            _refer_series(ds, [other])
        else:
            _refer_series(ds, sources)
        if word == "other-patient":
            ds.PatientID = "SOMEBODY-ELSE"
        if word == "stray":
            ds.StudyInstanceUID = generate_uid()
        return [ds]


def _object(source: Dataset, sop_class: str, modality: str) -> Dataset:
    ds = Dataset()
    for keyword in PATIENT:
        setattr(ds, keyword, source.get(keyword, ""))
    ds.SOPClassUID, ds.SOPInstanceUID, ds.SeriesInstanceUID = sop_class, generate_uid(), generate_uid()
    ds.Modality, ds.Manufacturer, ds.SeriesDescription = modality, "AI box", f"AI {modality}"
    ds.InstanceNumber, ds.SeriesNumber = 1, 900
    if modality in ("SEG", "OT"):
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = 2, 2, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
        ds.PixelData = b"\1\2\3\4"
        ds["PixelData"].VR = "OB"
    return _encoded(ds)


def _encoded(ds: Dataset) -> Dataset:
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def _reference(ds: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    return item


def _by_series(objects: Sequence[Dataset], keyword: str) -> Items:
    items = Items()
    for uid in dict.fromkeys(str(ds.SeriesInstanceUID) for ds in objects):
        item = Dataset()
        item.SeriesInstanceUID = uid
        setattr(item, keyword, Items(_reference(ds) for ds in objects if str(ds.SeriesInstanceUID) == uid))
        items.append(item)
    return items


def _refer_series(ds: Dataset, objects: Sequence[Dataset]) -> None:
    """Common Instance Reference (PS3.3 C.12.2)."""
    ds.ReferencedSeriesSequence = _by_series(objects, "ReferencedInstanceSequence")


def _refer(ds: Dataset, keyword: str, objects: Sequence[Dataset]) -> None:
    """Hierarchical SOP Instance Reference (PS3.3 C.17.2.1)."""
    study = Dataset()
    study.StudyInstanceUID = ds.StudyInstanceUID
    study.ReferencedSeriesSequence = _by_series(objects, "ReferencedSOPSequence")
    setattr(ds, keyword, Items([study]))


def _derived(sources: Sequence[Dataset], *, same_series: bool) -> list[Dataset]:
    series = generate_uid()
    made = []
    for source in sources:
        ds = _encoded(copy.deepcopy(source))
        ds.SOPInstanceUID, ds.ImageType = generate_uid(), ["DERIVED", "SECONDARY"]
        if not same_series:
            ds.SeriesInstanceUID = series
        ds.SourceImageSequence = Items([_reference(source)])
        made.append(ds)
    return made


def main() -> None:
    """Answer every association with a SEG and an SR until it is stopped."""
    parser = argparse.ArgumentParser(description="an AE that answers by C-STORE")
    parser.add_argument("--port", type=int, default=11113)
    parser.add_argument("--title", default="AI_BOX")
    parser.add_argument("--node", default="127.0.0.1:11112/DICOM_NODE", metavar="HOST:PORT/AET")
    parser.add_argument("--answer", default="seg,sr", help="words of `answer`, separated by commas")
    arguments = parser.parse_args()
    address, _, title = arguments.node.partition("/")
    host, _, port = address.rpartition(":")
    words = tuple(arguments.answer.split(","))
    with DicomEngineServer(
        title=arguments.title, port=arguments.port, node=(host, int(port), title), automatic=words
    ) as server:
        sys.stdout.write(f"{server.title} listens on 127.0.0.1 {server.port}\n")
        sys.stdout.flush()
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
