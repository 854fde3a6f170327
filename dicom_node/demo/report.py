"""The demonstration's report: one page with a timeline, pictures and the rules' reasons for each study."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from dicom_node.demo.pictures import FindingLine, contour_picture, findings_of, findings_picture
from dicom_node.model import Delivery, Job, TimelineEvent

__all__ = ["StudyStory", "write_report"]

NOTICE = "demonstration, trained on synthetic phantoms, not for clinical use"
_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_CT_CLASSES = {"1.2.840.10008.5.1.4.1.1.2"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #1c2430; }
.notice { background: #fff3d6; border-left: 4px solid #e0a000; padding: .4rem .8rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; } td { padding: .15rem .8rem .15rem 0; vertical-align: top; }
td:first-child { color: #5a6675; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; font-size: 13px; } img { max-width: 100%; display: block; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStory:
    """One study: what happened, why, and the files that came back from the PACS."""

    study_instance_uid: str
    events: tuple[TimelineEvent, ...]
    explanation: str
    files: tuple[Path, ...]
    jobs: tuple[Job, ...]
    deliveries: tuple[Delivery, ...]

    def contents(self) -> str:
        """Such as '96 CT, 1 SEG, 1 SR'."""
        counts = Counter(str(_header(path).get("Modality", "?")) for path in self.files)
        return ", ".join(f"{count} {modality}" for modality, count in sorted(counts.items())) or "nothing"


def write_report(folder: Path, stories: Sequence[StudyStory]) -> Path:
    """Write `index.html` and its pictures into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_story_html(folder, number, story) for number, story in enumerate(stories, 1)]
    page = folder / "index.html"
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><title>dicom-node demonstration</title>"
        f"<style>{_STYLE}</style><h1>dicom-node demonstration</h1><p class=notice>The embedded models are a "
        f"{NOTICE}.</p>{''.join(parts)}</html>",
        encoding="utf-8",
    )
    return page


def _story_html(folder: Path, number: int, story: StudyStory) -> str:
    pictures = _pictures(folder, number, story)
    images = "".join(f'<p><img src="{html.escape(name)}" alt="{html.escape(alt)}"></p>' for name, alt in pictures)
    return (
        f"<h2>Study {number}</h2><p>Study Instance UID {html.escape(story.study_instance_uid)}; fetched back from the "
        f"PACS with C-GET: {html.escape(story.contents())}</p>{_timeline(story)}{images}"
        f"<h3>What the rules said</h3><pre>{html.escape(story.explanation)}</pre>"
    )


def _timeline(story: StudyStory) -> str:
    if not story.events:
        return ""
    start = story.events[0].at
    rows = "".join(
        f"<tr><td>{(event.at - start).total_seconds():+.2f} s</td><td>{html.escape(event.text)}</td></tr>"
        for event in story.events
    )
    return f"<table>{rows}</table>"


def _pictures(folder: Path, number: int, story: StudyStory) -> list[tuple[str, str]]:
    headers = [(path, _header(path)) for path in story.files]
    made: list[tuple[str, str]] = []
    for path, ds in headers:
        name = f"study-{number}-{len(made) + 1}.png"
        if str(ds.SOPClassUID) == _SEGMENTATION and _draw_contours(path, headers, folder / name):
            made.append((name, "CT slices with the contours of the segmentation"))
        elif ds.get("Modality") == "SR" and _draw_findings(ds, findings_of(ds), headers, folder / name):
            made.append((name, "radiograph with its findings"))
    return made


def _draw_contours(segmentation: Path, headers: Sequence[tuple[Path, Dataset]], target: Path) -> bool:
    seg = pydicom.dcmread(segmentation)
    wanted = {str(series.SeriesInstanceUID) for series in seg.ReferencedSeriesSequence}
    images = [
        pydicom.dcmread(path)
        for path, ds in headers
        if str(ds.SOPClassUID) in _CT_CLASSES and str(ds.SeriesInstanceUID) in wanted
    ]
    if not images:
        return False
    contour_picture(images, seg, target)
    return True


def _draw_findings(
    report: Dataset, lines: Sequence[FindingLine], headers: Sequence[tuple[Path, Dataset]], target: Path
) -> bool:
    evidence = {
        str(item.ReferencedSOPInstanceUID)
        for study in report.get("CurrentRequestedProcedureEvidenceSequence", [])
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    for path, ds in headers if lines else ():
        if str(ds.SOPInstanceUID) in evidence and ds.get("Modality") in ("CR", "DX"):
            findings_picture(path, lines, target, notice=NOTICE.capitalize())
            return True
    return False


def _header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)
