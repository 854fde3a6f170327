"""The demonstration as a user runs it: on phantoms, and on a folder of one's own that no rule wants."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pydicom
import pytest
from PIL import Image

from dicom_node.demo.phantom_dicom import write_cxr


def _demo(report: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dicom_node.cli", "demo", "--report", str(report), *words],
        text=True,
        capture_output=True,
        timeout=280,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},  # as a user has it
    )


def _nodes_of(folder: Path) -> list[int]:
    return [one.pid for one in psutil.process_iter() if str(folder) in " ".join(one.cmdline())]


@pytest.mark.timeout(300)
def test_the_demonstration_shows_contours_findings_and_a_timeline(tmp_path: Path) -> None:
    done = _demo(tmp_path / "report")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "report" / "index.html").read_text()
    assert "demonstration, trained on synthetic phantoms, not for clinical use" in page
    assert "routed by ct-abdomen" in page and "routed by chest-xray-findings" in page
    assert page.count("delivered to PACS") == 3 and "1 SEG" in page
    pictures = sorted((tmp_path / "report").glob("*.png"))
    assert len(pictures) == 3  # one CT, two radiographs
    for picture in pictures:
        with Image.open(picture) as image:
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
            assert colours is not None and len(colours) > 100, f"{picture.name} is nearly empty"
    assert not _nodes_of(tmp_path)


@pytest.mark.timeout(200)
def test_with_files_of_ones_own_it_says_why_nothing_ran(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    write_cxr(own / "hand.dcm", 830001)
    ds = pydicom.dcmread(own / "hand.dcm")
    ds.BodyPartExamined = "HAND"
    del ds.AnatomicRegionSequence
    ds.save_as(own / "hand.dcm")
    (own / "notes.txt").write_text("not DICOM")
    done = _demo(tmp_path / "report", "--input", str(own))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing ran, and this is why" in done.stdout
    assert "HAND" in done.stdout and "chest-xray-findings" in done.stdout


def test_a_folder_without_dicom_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = _demo(tmp_path / "report", "--input", str(tmp_path / "empty"))
    assert done.returncode == 2
    assert "no DICOM instance was found" in done.stderr
