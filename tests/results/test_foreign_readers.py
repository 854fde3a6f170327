"""What others say of our files: dciodvfy, PixelMed, dcmtk and dcmqi, on objects of every kind of source."""

import gzip
import html
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset

from dicom_node.errors import EncodingError
from dicom_node.model import Origin, StoredInstance
from dicom_node.results import _common as common
from dicom_node.results import codes
from dicom_node.results.pdf import PdfEncoder
from dicom_node.results.sc import ScEncoder
from dicom_node.results.seg import SegEncoder
from dicom_node.results.sr import SrEncoder
from dicom_node.results.stl import StlEncoder
from dicom_node.values import (
    Code,
    Document,
    Findings,
    LabelVolume,
    Measurements,
    Mesh,
    Picture,
    Presence,
    Quantities,
    Quantity,
    ResultContext,
)

OBLIQUE = (0.9659258, 0.2588190, 0.0, -0.2241439, 0.8365163, 0.5)
ORGANS = ("liver", "spleen", "kidney_right", "kidney_left")
JAVA = Path("/usr/share/java")  # where Debian puts the jars
JARS = {"pixelmed.jar": "libpixelmed-java", "xalan2.jar": "libxalan2-java", "xercesImpl.jar": "libxerces2-java"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: what it was made from and the files it made."""

    images: list[Dataset]
    values: list[Any]
    segs: list[Path]
    reports: list[Path]


def _japanese(image: Dataset) -> None:
    image.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    image.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    image.StudyDescription = "腹部"


def _bare(image: Dataset) -> None:
    for keyword in ("PatientName", "PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"):
        del image[keyword]
    del image.ReferringPhysicianName, image.PositionReferenceIndicator, image.BodyPartExamined, image.SliceThickness
    image.PatientSex, image.PatientAge, image.PatientIdentityRemoved = "U", "45Y", "YES"


def _received(image: Dataset) -> Dataset:
    buffer = BytesIO()
    dcmwrite(buffer, image)
    return dcmread(buffer, force=True)


def _quantities(images: list[Dataset]) -> Quantities:
    unit = Code(value="mm2", scheme="UCUM", meaning="square millimeter")
    items = (
        Quantity(code=Code(value="42798000", scheme="SCT", meaning="Area"), value=1234.56789012345, unit=unit),
        Quantity(code=Code(value="RATIO", scheme="99DICOMNODE", meaning="Ratio"), value=-2.5e-7, unit=codes.PERCENT),
    )
    uids = tuple(str(image.SOPInstanceUID) for image in images)
    return Quantities(sop_instance_uids=uids, items=items, notes=("counted twice",))


@pytest.fixture(scope="session")
def cases(
    tmp_path_factory: pytest.TempPathFactory,
    ct_series: Callable[..., list[Dataset]],
    radiograph: Callable[..., Dataset],
    labels: Callable[..., Any],
    volume_of: Callable[..., LabelVolume],
    measurements_of: Callable[..., Measurements],
    findings_on: Callable[..., Findings],
    context: ResultContext,
) -> dict[str, Case]:
    """Runs over every kind of source, written to files."""
    folder = tmp_path_factory.mktemp("results")
    found: dict[str, Case] = {}

    def run(name: str, values: list[Any], images: list[Dataset], with_seg: bool = True, **changes: Any) -> None:
        with common.quiet():
            received = [_received(image) for image in images]
        told = replace(context, run_key=name, **changes)
        segs = list(SegEncoder().encode(values, received, told, [])) if with_seg else []
        reports = SrEncoder().encode(values, received, told, segs)
        paths = []
        for number, made in enumerate([*segs, *reports]):
            paths.append(folder / f"{name}-{number}-{made.Modality}.dcm")
            made.save_as(paths[-1], enforce_file_format=True)
        found[name] = Case(images=images, values=values, segs=paths[: len(segs)], reports=paths[len(segs) :])

    def ct(name: str, images: list[Dataset], **lacking: Presence) -> None:
        numbers = [
            n for n, key in enumerate(("liver", "spleen", "kidney_right", "kidney_left"), 1) if key not in lacking
        ]
        array = labels(images, numbers) if numbers else np.zeros((len(images), 24, 32), dtype=np.uint8)
        values = [volume_of(images, array, ("slices 4 and 5 interpolated",)), measurements_of(**lacking)]
        run(name, values, list(reversed(images)))

    ct("axial", ct_series())
    ct("oblique", ct_series(orientation=OBLIQUE))
    ct("gaps", ct_series(missing=(4, 5), rows=23, columns=31))
    ct("lacking", ct_series(), liver=Presence.ABSENT, kidney_right=Presence.UNDETERMINED)
    ct("nothing", ct_series(), **dict.fromkeys(ORGANS, Presence.ABSENT))
    for name, change in (("japanese", _japanese), ("bare", _bare)):
        images = ct_series()
        for image in images:
            change(image)
        ct(name, images)
    images = ct_series()
    run("no-seg", [volume_of(images, labels(images)), measurements_of()], images, with_seg=False)

    for name, image in (("cr", radiograph()), ("dx", radiograph("1.2.840.10008.5.1.4.1.1.1.1", "DX"))):
        _japanese(image)
        earlier = dcmread(found["axial"].reports[0])
        followed = StoredInstance(
            sop_class_uid=str(earlier.SOPClassUID),
            sop_instance_uid=str(earlier.SOPInstanceUID),
            study_instance_uid=str(image.StudyInstanceUID),
            series_instance_uid=str(earlier.SeriesInstanceUID),
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            path="",
            data_set_offset=0,
            data_set_length=0,
            sha256="",
            origin=Origin.PRODUCED,
        )
        run(name, [findings_on(image, ("a note",))], [image], predecessors=(followed,))
    for name, images in (("numbers", [radiograph()]), ("numbers of a volume", ct_series())):
        run(name, [_quantities(images)], images)
    return found


CT_CASES = ("axial", "oblique", "gaps", "lacking", "nothing", "japanese", "bare", "no-seg")
CASES = (*CT_CASES, "cr", "dx", "numbers", "numbers of a volume")


# --- dciodvfy --------------------------------------------------------------------------------------------------------


def _complaints(check: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines that say Error; a run that failed without one is a complaint too (and errors may come with status 0)."""
    errors = [line for line in (check.stderr + check.stdout).splitlines() if line.startswith("Error")]
    return errors or ([f"exit status {check.returncode}"] if check.returncode else [])


@pytest.mark.parametrize("name", CASES)
def test_dciodvfy_finds_no_error(
    cases: dict[str, Case], name: str, tool: Callable[[str], str], run: Callable[..., Any]
) -> None:
    dciodvfy = tool("dciodvfy")
    for path in (*cases[name].segs, *cases[name].reports):
        assert _complaints(run(dciodvfy, "-new", path)) == [], path.name


def test_dciodvfy_would_find_one(
    cases: dict[str, Case], tool: Callable[[str], str], run: Callable[..., Any], tmp_path: Path
) -> None:
    broken = dcmread(cases["axial"].segs[0])
    del broken.SegmentSequence[0].SegmentLabel
    broken.save_as(tmp_path / "broken.dcm")
    assert _complaints(run(tool("dciodvfy"), "-new", tmp_path / "broken.dcm"))


# --- PixelMed --------------------------------------------------------------------------------------------------------

# The validator's own main takes one file, and reading its rules takes longer than checking a report: so one JVM, in
# which Xalan calls the validator once per file. The rules exceed the limits of the JDK's compiler of style sheets,
# which is faster than Xalan's interpreter; hence the switches.
BATCH = """<xsl:stylesheet version="1.0" xmlns:xsl="http://www.w3.org/1999/XSL/Transform"
    xmlns:sr="xalan://com.pixelmed.validate.DicomSRValidator" exclude-result-prefixes="sr">
  <xsl:output method="text"/>
  <xsl:template match="/files">
    <xsl:variable name="validator" select="sr:new()"/>
    <xsl:for-each select="file">
      <xsl:text>&#10;FILE </xsl:text><xsl:value-of select="."/><xsl:text>&#10;</xsl:text>
      <xsl:value-of select="sr:validate($validator, string(.))"/>
    </xsl:for-each>
  </xsl:template>
</xsl:stylesheet>
"""
SWITCHES = (
    *("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx1500m", "-Xss8m", "-Djava.awt.headless=true"),
    *(f"-Djdk.xml.{limit}=0" for limit in ("xpathExprOpLimit", "xpathTotalOpLimit", "xpathExprGrpLimit")),
    "-Djdk.xml.enableExtensionFunctions=true",
    "-Djavax.xml.transform.TransformerFactory=com.sun.org.apache.xalan.internal.xsltc.trax.TransformerFactoryImpl",
)


def _objections(told: str) -> list[str]:
    """Lines that are no warning and no progress: not every one of its errors starts with the word."""
    harmless = ("Warning: ", "Found ", "Root Template Validation Complete", "IOD validation complete")
    return [line for line in told.splitlines() if line.strip() and not line.startswith(harmless)]


def _broken_report(path: Path, folder: Path) -> Path:
    """A report with one wrong relationship, for the validator to find."""
    report = dcmread(path)
    groups = report.ContentSequence[-1].ContentSequence
    next(item for item in groups[0].ContentSequence if item.ValueType == "NUM").RelationshipType = "HAS PROPERTIES"
    del groups[1:]
    report.save_as(folder / "broken.dcm")
    return folder / "broken.dcm"


@pytest.mark.timeout(400)
def test_pixelmed_finds_no_error_in_any_kind_of_report(
    cases: dict[str, Case], tool: Callable[[str], str], run: Callable[..., Any], tmp_path: Path
) -> None:
    java = tool("java")
    for jar, package in JARS.items():
        if not (JAVA / jar).exists():
            pytest.skip(f"needs {jar} (Debian package {package})")
    # TID 1501 findings, 1411 and 1501 organs, 1501 numbers
    good = [cases["cr"].reports[0], *cases["lacking"].reports, cases["numbers"].reports[0]]
    broken = _broken_report(good[0], tmp_path)
    (tmp_path / "batch.xsl").write_text(BATCH)
    files = "".join(f"<file>{html.escape(str(path))}</file>" for path in (*good, broken))
    (tmp_path / "files.xml").write_text(f"<files>{files}</files>")
    check = run(
        *(java, *SWITCHES, "-cp", ":".join(str(JAVA / jar) for jar in JARS), "org.apache.xalan.xslt.Process"),
        *("-IN", tmp_path / "files.xml", "-XSL", tmp_path / "batch.xsl"),
        timeout=380,
    )
    assert check.returncode == 0, check.stderr
    told = dict(part.split("\n", 1) for part in check.stdout.split("\nFILE ")[1:])
    for path in good:
        assert "Root Template Validation Complete" in told[str(path)] and "IOD validation complete" in told[str(path)]
        assert _objections(told[str(path)]) == []
    assert _objections(told[str(broken)])  # so it did look


# --- dcmtk -----------------------------------------------------------------------------------------------------------


def _texts(path: Path) -> set[str]:
    """Every text and code meaning of the report's content that a reader must see."""
    found = set()

    def walk(item: Dataset) -> None:
        for child in item.get("ContentSequence", []):
            if child.ValueType == "TEXT":
                found.add(str(child.TextValue))
            elif child.ValueType == "CODE":
                found.add(str(child.ConceptCodeSequence[0].CodeMeaning))
            walk(child)

    walk(dcmread(path))
    return found


@pytest.mark.parametrize("name", CASES)
def test_dcmtk_shows_every_name_and_text_of_a_report(
    cases: dict[str, Case], name: str, tool: Callable[[str], str], run: Callable[..., Any], tmp_path: Path
) -> None:
    for number, path in enumerate(cases[name].reports):
        page = tmp_path / f"{number}.html"
        for check in (run(tool("dsrdump"), "+Pl", path), run(tool("dsr2html"), path, page)):
            assert check.returncode == 0
            assert not [line for line in check.stderr.splitlines() if line.startswith("E:")], check.stderr
        shown = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.read_text(encoding="utf-8"))).split())
        for text in _texts(path):
            assert text in shown
        for value in cases[name].values:
            if isinstance(value, Findings):
                assert [item.name for item in value.items if item.name not in shown] == []
                assert "Tarou Yamada" in shown and "not for clinical use" in shown


# --- dcmqi -----------------------------------------------------------------------------------------------------------


def _nrrd(path: Path) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Voxels (x, y, z), the directions of their axes as columns, and the origin, of what dcmqi writes."""
    header, data = path.read_bytes().split(b"\n\n", 1)
    fields = dict(line.split(": ", 1) for line in header.decode().splitlines() if ": " in line)
    assert (fields["type"], fields["encoding"], fields["endian"]) == ("short", "gzip", "little")
    sizes = [int(size) for size in fields["sizes"].split()]
    voxels = np.frombuffer(gzip.decompress(data), dtype="<i2").reshape(sizes, order="F")
    directions = np.array([json.loads(f"[{word.strip('()')}]") for word in fields["space directions"].split()])
    return voxels, directions.T, np.array(json.loads(f"[{fields['space origin'].strip('()')}]"))


def _places(volume: LabelVolume, images: list[Dataset], label: int) -> npt.NDArray[np.float64]:
    """Patient coordinates of the label's voxels, from the source headers alone, ordered."""
    by_uid = {str(image.SOPInstanceUID): image for image in images}
    found = []
    for plane, uid in zip(volume.labels, volume.sop_instance_uids, strict=True):
        image = by_uid[uid]
        row, column = np.array(image.ImageOrientationPatient, dtype=float).reshape(2, 3)
        down, right = (float(value) for value in image.PixelSpacing)
        y, x = np.nonzero(plane == label)
        origin = np.array(image.ImagePositionPatient, dtype=float)
        found.append(origin + np.outer(x * right, row) + np.outer(y * down, column))
    return _ordered(np.concatenate(found))


def _ordered(places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rounded = np.round(places, 2)
    return places[np.lexsort(rounded.T)]


@pytest.mark.parametrize("name", ["axial", "oblique", "gaps", "lacking", "bare"])
def test_dcmqi_reads_the_same_voxels_in_the_same_places(
    cases: dict[str, Case], name: str, tool: Callable[[str], str], run: Callable[..., Any], tmp_path: Path
) -> None:
    case = cases[name]
    volume: LabelVolume = case.values[0]
    check = run(
        *(tool("segimage2itkimage"), "--inputDICOM", case.segs[0], "--outputDirectory", tmp_path),
        *("--prefix", "s", "-t", "nrrd"),
    )
    assert check.returncode == 0, check.stderr
    labels = [segment.number for segment in volume.segments if (volume.labels == segment.number).any()]
    assert len(list(tmp_path.glob("*.nrrd"))) == len(labels)
    for number, label in enumerate(labels, start=1):
        voxels, directions, origin = _nrrd(tmp_path / f"s-{number}.nrrd")
        assert set(np.unique(voxels)) == {0, number}
        read = origin + np.argwhere(voxels).astype(float) @ directions.T
        expected = _places(volume, case.images, label)
        assert read.shape == expected.shape
        np.testing.assert_allclose(_ordered(read), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["axial", "lacking", "cr", "numbers"])
def test_dcmqi_reads_the_same_values(
    cases: dict[str, Case], name: str, tool: Callable[[str], str], run: Callable[..., Any], tmp_path: Path
) -> None:
    expected: dict[str, list[float]] = {}
    for value in cases[name].values:
        if isinstance(value, Findings):
            for finding in value.items:
                confidence = finding.confidence
                expected[finding.name] = [] if confidence is None else [round(100 * confidence, 2)]
        elif isinstance(value, Measurements):
            for item in value.items:
                numbers = [] if item.volume_cm3 is None or item.mean_hu is None else [item.volume_cm3, item.mean_hu]
                expected[item.segment.label] = numbers
        elif isinstance(value, Quantities):
            expected["Measurements"] = [quantity.value for quantity in value.items]
    read: dict[str, list[float]] = {}
    for number, path in enumerate(cases[name].reports):
        output = tmp_path / f"{number}.json"
        check = run(tool("tid1500reader"), "--inputDICOM", path, "--outputMetadata", output)
        assert check.returncode == 0, check.stderr
        for group in json.loads(output.read_text())["Measurements"]:
            label = group["TrackingIdentifier"].removeprefix("demo-model: ")
            read[label] = [float(item["value"]) for item in group.get("measurementItems", [])]
    assert read.keys() == expected.keys()
    for label, numbers in expected.items():
        assert read[label] == pytest.approx(numbers, abs=0.006)


# --- real headers ----------------------------------------------------------------------------------------------------

# Of the corpus, one image each of scanners, digitisers and tools that write headers their own way
REAL = {  # and whether the image has a place in a patient, without which there is no segmentation of it
    "DIAGNijmegen+rse-panimg/tests/resources/dicom_2d/cxr.dcm": False,
    "neurolabusc+dcm_qa_ct/In/GE/05.dcm": True,
    "pydicom+pydicom/src/pydicom/data/test_files/CT_small.dcm": True,
    "pydicom+pydicom/src/pydicom/data/test_files/MR_small.dcm": True,
    "pydicom+pydicom/src/pydicom/data/test_files/693_J2KI.dcm": False,
}


@pytest.mark.parametrize("path", REAL)
def test_real_headers_give_objects_without_an_error(
    path: str,
    findings_on: Callable[..., Findings],
    organs: Any,
    context: ResultContext,
    tool: Callable[[str], str],
    run: Callable[..., Any],
    tmp_path: Path,
) -> None:
    corpus = os.environ.get("DICOM_NODE_CORPUS")
    if not corpus:
        pytest.skip("DICOM_NODE_CORPUS is not set")
    source = dcmread(Path(corpus) / path, stop_before_pixels=True, force=True)
    made = list(SrEncoder().encode([findings_on(source)], [source], context, []))
    uid = str(source.SOPInstanceUID)
    picture = Picture(pixels=np.zeros((9, 7), np.uint8), sop_instance_uid=uid, title="Heat map")
    made += ScEncoder().encode([picture], [source], context, [])
    made += PdfEncoder().encode([Document(pdf=b"%PDF-", sop_instance_uids=(uid,), title="R")], [source], context, [])
    array = np.zeros((1, int(source.Rows), int(source.Columns)), dtype=np.uint8)
    array[0, 1:4, 2:5] = 1
    volume = LabelVolume(labels=array, sop_instance_uids=(str(source.SOPInstanceUID),), segments=organs[:1])
    if REAL[path]:
        made += SegEncoder().encode([volume], [source], context, [])
        surface = Mesh(
            vertices=np.eye(3, dtype=np.float32),
            triangles=np.array([[0, 1, 2]], np.uint32),
            title="Liver",
            segments=organs[:1],
        )
        made += StlEncoder().encode([surface], [source], context, [])
    else:
        with pytest.raises(EncodingError):
            SegEncoder().encode([volume], [source], context, [])
    for number, result in enumerate(made):
        file = tmp_path / f"{number}.dcm"
        result.save_as(file, enforce_file_format=True)
        assert _complaints(run(tool("dciodvfy"), "-new", file)) == []
