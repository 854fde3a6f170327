"""Pictures of results for the demonstration's report: CT slices with contours, radiographs beside their findings.

Reads only DICOM files, as any viewer would: what is drawn is what was written, not what the model said in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset

from dicom_node import pixels
from dicom_node.dimse.files import instance_of_file

__all__ = ["FindingLine", "contour_picture", "findings_of", "findings_picture"]

Gray = npt.NDArray[np.uint8]
FALLBACK_COLORS = ((230, 80, 60), (70, 160, 240), (240, 200, 60), (120, 220, 120))
PANEL = 360  # pixels: width and height of one CT panel
CT_WINDOW_HU = (-160.0, 240.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingLine:
    """One finding as the SR says it: its words, not the model's."""

    name: str
    presence: str
    certainty_percent: float | None


def contour_picture(images: Sequence[Dataset], segmentation: Dataset, target: Path, *, panels: int = 4) -> None:
    """Draw `panels` slices of `images` (CT, with pixel data) with the contours of `segmentation` (BINARY) to a PNG.

    The slices are those with the most labelled area of each segment in turn, then evenly spread ones.
    """
    by_uid = {str(image.SOPInstanceUID): image for image in images}
    masks = _masks(segmentation, by_uid)
    names = {int(item.SegmentNumber): str(item.SegmentLabel) for item in segmentation.SegmentSequence}
    colors = {number: FALLBACK_COLORS[index % len(FALLBACK_COLORS)] for index, number in enumerate(sorted(names))}
    chosen = _slices_to_show(masks, sorted(names), panels)
    sheet = Image.new("RGB", (PANEL * max(1, len(chosen)), PANEL + 26), "black")
    for column, uid in enumerate(chosen):
        panel = _ct_panel(by_uid[uid], masks[uid], colors)
        sheet.paste(panel, (column * PANEL, 0))
    _legend(sheet, [(names[number], colors[number]) for number in sorted(names)])
    sheet.save(target)


def _masks(segmentation: Dataset, by_uid: Mapping[str, Dataset]) -> dict[str, dict[int, npt.NDArray[np.bool_]]]:
    """Per source SOP Instance UID and segment number, the mask of its frame."""
    frames = segmentation.pixel_array
    if frames.ndim == 2:
        frames = frames[np.newaxis]
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    masks: dict[str, dict[int, npt.NDArray[np.bool_]]] = {}
    for frame, groups in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        # legally in the shared groups when there is one segment only (PS3.3 C.8.20.3.1)
        holder = groups if "SegmentIdentificationSequence" in groups else shared
        number = int(holder.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        uid = str(groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        if uid in by_uid:
            masks.setdefault(uid, {})[number] = frame.astype(bool)
    return masks


def _slices_to_show(
    masks: Mapping[str, Mapping[int, npt.NDArray[np.bool_]]], numbers: Sequence[int], panels: int
) -> list[str]:
    chosen: list[str] = []
    for number in numbers:
        areas = {uid: int(planes[number].sum()) for uid, planes in masks.items() if number in planes}
        if areas and (best := max(areas, key=lambda uid: areas[uid])) not in chosen:
            chosen.append(best)
    rest = [uid for uid in masks if uid not in chosen]
    missing = max(0, panels - len(chosen))
    step = max(1, len(rest) // (missing + 1))
    return (chosen + rest[step::step][:missing])[:panels]


def _ct_panel(
    image: Dataset, planes: Mapping[int, npt.NDArray[np.bool_]], colors: Mapping[int, tuple[int, int, int]]
) -> Image.Image:
    low, high = CT_WINDOW_HU
    hu = image.pixel_array.astype(np.float32) * float(image.get("RescaleSlope", 1)) + float(
        image.get("RescaleIntercept", 0)
    )
    rgb = np.repeat(_to_gray(hu, low, high)[..., np.newaxis], 3, axis=2)
    for number, mask in planes.items():
        rgb[_outline(mask)] = colors[number]
    return Image.fromarray(rgb).resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def _outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask's voxels that touch something outside it, in the plane."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.asarray(mask & ~inner)


def _to_gray(values: npt.NDArray[np.float32], low: float, high: float) -> Gray:
    shades: Gray = np.clip((values - low) / max(high - low, 1e-6) * 255.0, 0, 255).astype(np.uint8)
    return shades


def _legend(sheet: Image.Image, entries: Iterable[tuple[str, tuple[int, int, int]]]) -> None:
    draw = ImageDraw.Draw(sheet)
    x = 8
    for text, color in entries:
        draw.rectangle((x, PANEL + 8, x + 10, PANEL + 18), fill=color)
        draw.text((x + 16, PANEL + 7), text, fill="white", font=_font())
        x += 26 + int(draw.textlength(text, font=_font()))


def findings_of(report: Dataset) -> list[FindingLine]:
    """The findings of a TID 1500 report: every measurement group with a qualitative evaluation of its finding."""
    lines: list[FindingLine] = []
    for group in _containers(report, "Measurement Group"):
        name = presence = shown = ""
        certainty: float | None = None
        for item in group.ContentSequence:
            concept = item.ConceptNameCodeSequence[0]
            if item.ValueType == "CODE" and concept.CodeValue == "121071":  # DCM Finding
                name = str(item.ConceptCodeSequence[0].CodeMeaning)
            elif item.ValueType == "CODE" and name and concept.CodeMeaning == name:
                presence = str(item.ConceptCodeSequence[0].CodeMeaning)
            elif item.ValueType == "TEXT" and concept.CodeValue == "112039":  # DCM Tracking Identifier: "model: name"
                shown = str(item.TextValue).rpartition(": ")[2]
            elif item.ValueType == "NUM" and concept.CodeValue == "111012":  # DCM Certainty of Finding
                certainty = float(item.MeasuredValueSequence[0].NumericValue)
        if name and presence:
            lines.append(FindingLine(name=shown or name, presence=presence, certainty_percent=certainty))
    return lines


def _containers(item: Dataset, meaning: str) -> Iterable[Dataset]:
    for child in item.get("ContentSequence", []):
        if child.ValueType == "CONTAINER":
            if child.ConceptNameCodeSequence[0].CodeMeaning == meaning:
                yield child
            yield from _containers(child, meaning)


def findings_picture(image_file: Path, lines: Sequence[FindingLine], target: Path, *, notice: str) -> None:
    """Draw a radiograph beside its findings to a PNG; `notice` (demonstration ...) stands above the list."""
    shown = pixels.displayed_radiograph(pixels.read_image(instance_of_file(image_file)))
    low, high = (float(value) for value in np.quantile(shown[::8, ::8], (0.01, 0.99)))
    picture = Image.fromarray(_to_gray(shown, low, high))
    picture.thumbnail((560, 560))
    sheet = Image.new("RGB", (picture.width + 420, max(picture.height, 60 + 30 * len(lines))), (16, 18, 22))
    sheet.paste(picture.convert("RGB"), (0, 0))
    draw = ImageDraw.Draw(sheet)
    x = picture.width + 16
    draw.multiline_text((x, 8), _wrapped(notice, 58), fill=(240, 180, 60), font=_font())
    for row, line in enumerate(lines):
        _finding_row(draw, x, 52 + 30 * row, line)
    sheet.save(target)


def _finding_row(draw: ImageDraw.ImageDraw, x: int, y: int, line: FindingLine) -> None:
    present = line.presence == "Present"
    color = (240, 90, 80) if present else (150, 160, 170)
    certainty = line.certainty_percent
    draw.text((x, y), line.name, fill=color, font=_font())
    draw.text((x + 150, y), line.presence, fill=color, font=_font())
    draw.rectangle((x + 250, y + 3, x + 350, y + 13), outline=(70, 76, 84))
    if certainty is not None:
        draw.rectangle((x + 250, y + 3, x + 250 + int(certainty), y + 13), fill=color)
        draw.text((x + 358, y), f"{certainty:.0f} %", fill=color, font=_font())


def _wrapped(text: str, width: int) -> str:
    words, lines, line = text.split(), [], ""
    for word in words:
        if len(line) + len(word) + 1 > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=13)
