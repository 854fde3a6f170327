"""Slides on their way out, and what comes back about them in files: shapes, class maps, tables."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.filereader import _read_file_meta_info

from dicom_node.engines import _class_map, _geojson, slide_answers
from dicom_node.engines.labels import LabelTable
from dicom_node.engines.privacy import Pseudonyms
from dicom_node.engines.slide_answers import Matrix, annotations_of, quantities_of, slide_labels_of
from dicom_node.engines.slides import DICOM, ZIP, read_slide, write_slide
from dicom_node.errors import EngineError, SeriesRejected
from dicom_node.model import Origin, StoredInstance
from dicom_node.values import Annotations, GraphicType, Quantities, SlideLabels

SLIDE = Matrix(sop_instance_uid="1.2.3", columns=100, rows=60)
SECRET = bytes(range(32))
Write = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    def write(content: Any, name: str = "answer") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


# --- shapes ----------------------------------------------------------------------------------------------------------


def feature(kind: str, coordinates: Any, name: str = "Tumor", **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"classification": {"name": name}, **properties},
    }


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def ring(x: float, y: float, side: float = 4) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def shapes(path: Path, **table: Any) -> Annotations:
    return annotations_of(path, SLIDE, labels=LabelTable.model_validate(table))


def test_shapes_keep_their_pixels_and_are_grouped_by_class_and_kind(written: Write) -> None:
    told = shapes(
        written(
            collection(
                feature("Polygon", [ring(0, 0)]),
                feature("MultiPolygon", [[ring(10, 10)], [ring(20, 20)]]),
                feature("Point", [99.5, 59.5], "Cell"),
                feature("MultiPoint", [[1, 2, 7], [3, 4, 7]], "Cell"),
                feature("LineString", [[0, 0], [100, 60]], "Border"),
            )
        )
    )
    assert told.sop_instance_uid == "1.2.3" and told.notes == ()
    assert [(g.label, g.graphic_type, len(g.shapes)) for g in told.groups] == [
        ("Tumor", GraphicType.POLYGON, 3),
        ("Cell", GraphicType.POINT, 3),
        ("Border", GraphicType.POLYLINE, 1),
    ]
    assert told.groups[0].shapes[0].tolist() == [[0, 0], [4, 0], [4, 4], [0, 4]]  # closed: the first not said again
    assert told.groups[1].shapes[1].tolist() == [[1, 2]]


def test_holes_are_counted_and_left_out(written: Write) -> None:
    told = shapes(written(collection(feature("Polygon", [ring(0, 0, 20), ring(2, 2), ring(8, 8)]))))
    assert len(told.groups[0].shapes) == 1
    assert told.notes == ("2 hole(s) in 1 polygon(s) left out: annotations have none",)


def test_shapes_beyond_the_slide_are_left_out_and_rounding_at_its_edge_is_taken_back(written: Write) -> None:
    told = shapes(
        written(
            collection(
                feature("Polygon", [ring(96.5, 10)]), feature("Polygon", [ring(98, 10)]), feature("Point", [5, -2])
            )
        )
    )
    (group,) = told.groups
    assert group.shapes[0][:, 0].max() == 100.0
    assert told.notes == (
        "2 shape(s) left out that reach beyond the slide",
        "1 shape(s) ended less than a pixel beyond the slide and were clipped to it",
    )


def test_shapes_of_another_slide_are_refused(written: Write) -> None:
    with pytest.raises(EngineError, match="of another slide"):
        shapes(written(collection(feature("Polygon", [ring(5000, 5000)]))))


@pytest.mark.parametrize(
    "corners",
    [
        [[1, 1], [2, 2], [1, 1]],
        [[3, 3], [3, 3], [3, 3], [3, 3]],
        [[100.5, -0.3], [100.2, -0.1], [100.7, -0.6], [100.5, -0.3]],  # one corner once it is clipped
    ],
)
def test_a_polygon_that_encloses_nothing_does_not_take_the_others_with_it(written: Write, corners: Any) -> None:
    told = shapes(written(collection(feature("Polygon", [corners]), feature("Polygon", [ring(5, 5)]))))
    assert [len(group.shapes) for group in told.groups] == [1]
    assert "1 polygon(s) of fewer than three different corners left out" in told.notes


@pytest.mark.parametrize(
    "geometry",
    [
        {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [1, 1]}]},
        {"type": "Polygon", "coordinates": [[[1, 1], [2, 2], [1, 1]]]},
        None,
    ],
)
def test_features_of_which_none_can_be_told_are_refused_and_not_forgotten(written: Write, geometry: Any) -> None:
    with pytest.raises(EngineError, match="no feature"):
        shapes(written(collection({"type": "Feature", "geometry": geometry})))


def test_no_shapes_at_all_are_an_answer(written: Write) -> None:
    assert shapes(written(collection())).groups == ()


def test_the_table_says_what_a_class_is_and_which_to_ignore(written: Write) -> None:
    coded = {"name": "Malignant", "type": ["SCT", "86049000", "Malignant neoplasm, primary"]}
    told = shapes(
        written(collection(feature("Point", [1, 1]), feature("Point", [2, 2], "Artifact"))),
        tumor=coded,
        artifact="ignore",
    )
    (group,) = told.groups
    assert (group.label, group.type.value) == ("Malignant", "86049000")
    assert told.notes == ("1 feature(s) left out as configured",)


def test_confidences_are_taken_when_every_shape_has_one(written: Write) -> None:
    both = [feature("Point", [1, 1], confidence=0.5), feature("Point", [2, 2], confidence=1)]
    assert shapes(written(collection(*both))).groups[0].confidences == (0.5, 1.0)
    both[1]["properties"]["confidence"] = 50
    told = shapes(written(collection(*both)))
    assert told.groups[0].confidences == ()
    assert told.notes == ("2 confidence(s) left out: none from 0 to 1, or not of every shape of a class",)


@pytest.mark.parametrize("form", ["list", "single", "late", "bom", "spaced"])
def test_geojson_is_read_in_every_form_it_comes_in(written: Write, form: str) -> None:
    one = feature("Point", [1, 1])
    told: Any = {
        "list": [one],
        "single": one,
        "late": {"crs": {"x": [1, {"features": [2]}]}, "features": [one], "type": "FeatureCollection"},
    }.get(form, collection(one))
    text = json.dumps(told, indent=3 if form == "spaced" else None)
    assert len(shapes(written((b"\xef\xbb\xbf" if form == "bom" else b"") + text.encode())).groups) == 1


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_geojson_is_the_same_however_it_is_cut(written: Write, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    features = [feature("Polygon", [ring(n % 90, n % 50)], f"Class {n % 3}", note='a "b" \\ {[') for n in range(40)]
    path = written(collection(*features))
    whole = shapes(path)
    monkeypatch.setattr(_geojson, "PIECE", piece)
    cut = shapes(path)
    assert [g.label for g in cut.groups] == [g.label for g in whole.groups]
    for one, other in zip(cut.groups, whole.groups, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.shapes, other.shapes, strict=True))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"\xff\xfe",
        b'{"type": "FeatureCollection", "features": [{"a": 1}',
        b'{"type": "FeatureCollection", "features": [1]}',
        b'{"type": "Topology"}',
        b"[" * 100_000,
        b'{"features": [{"geometry": {"type": "Point", "coordinates": [NaN, 1]}}]}',
        b'{"features": [{"geometry": {"type": "Point", "coordinates": [1e999, 1]}}]}',
        b'{"features": [{"geometry": {"type": "Point", "coordinates": [' + b"9" * 5000 + b", 1]}}]}",
        b'{"features": [{"geometry": {"type": "Point", "coordinates": "ab"}}]}',
        b'{"features": [{"geometry": {"type": "Polygon", "coordinates": [[[1, 1]]]}}]}',
        b'{"features": [{"geometry": {"type": "Polygon", "coordinates": []}}]}',
        b'{"features": [{"geometry": {"type": "Polygon", "coordinates": [[{"a": 1}, 2, 3]]}}]}',
    ],
)
def test_what_is_no_geojson_is_refused(written: Write, content: bytes) -> None:
    with pytest.raises(EngineError):
        shapes(written(content))


def test_geometry_nobody_knows_is_counted(written: Write) -> None:
    told = shapes(written(collection({"type": "Feature", "geometry": None}, feature("Point", [1, 1]))))
    assert told.notes == ("1 feature(s) left out that are no points, lines or polygons",)


def test_shapes_are_bounded(written: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(collection(*[feature("Point", [1, 1], str(n)) for n in range(20)]))
    for bound in ("MAX_SHAPES", "MAX_POINTS", "MAX_GROUPS"):
        with monkeypatch.context() as patch:
            patch.setattr(slide_answers, bound, 10)
            with pytest.raises(EngineError, match="more than"):
                shapes(path)
    monkeypatch.setattr(_geojson, "MAX_VALUE", 1000)
    with pytest.raises(EngineError, match="more than 1000 characters"):
        shapes(written(b'{"features": [{"x": "' + b"y" * 5_000_000 + b'"}]}'))


# --- class maps ------------------------------------------------------------------------------------------------------

COLOURS = {"Tumor": (255, 0, 0), "Stroma": (0, 255, 0), "Necrosis": (0, 0, 255)}


def picture(pixels: Any, **more: Any) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, "TIFF", **more)
    return out.getvalue()


def painted(width: int, height: int) -> Any:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = COLOURS["Tumor"]
    pixels[: height // 2, width // 2 :] = COLOURS["Stroma"]
    return pixels


def classes(path: Path, colours: Any = COLOURS, matrix: Matrix = SLIDE, **table: Any) -> SlideLabels:
    return slide_labels_of(path, matrix, colours=colours, labels=LabelTable.model_validate(table))


@pytest.mark.parametrize("factor", [1, 2, 4, 20])
@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
def test_colours_become_classes_found_or_not(written: Write, factor: int, compression: str | None) -> None:
    pixels = painted(100 // factor, 60 // factor)
    told = classes(written(picture(pixels, compression=compression)))
    assert told.labels.shape == (60 // factor, 100 // factor) and told.notes == ()
    assert np.array_equal(told.labels == 1, (pixels == (255, 0, 0)).all(axis=2))
    assert np.array_equal(told.labels == 2, (pixels == (0, 255, 0)).all(axis=2))
    assert [(s.number, s.label, s.color_rgb) for s in told.segments] == [
        (n, name, colour) for n, (name, colour) in enumerate(COLOURS.items(), 1)
    ]


def test_a_palette_and_transparency_are_seen_as_they_look(written: Write) -> None:
    flat = Image.fromarray(painted(50, 30)).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    assert np.array_equal(classes(written(picture(flat))).labels[:, :25], np.ones((30, 25)))
    clear = np.dstack([np.full((30, 50, 3), 77, np.uint8), np.zeros((30, 50), np.uint8)])
    clear[:5, :5] = (0, 0, 255, 255)
    told = classes(written(picture(clear)))
    assert told.labels.sum() == 25 * 3 and set(np.unique(told.labels)) == {0, 3}


def test_white_may_be_a_class(written: Write) -> None:
    pixels = np.full((30, 50, 3), 255, np.uint8)
    assert classes(written(picture(pixels))).labels.max() == 0
    assert classes(written(picture(pixels)), {"Glass": (255, 255, 255)}).labels.min() == 1


def test_a_colour_nobody_told_is_refused_not_guessed(written: Write) -> None:
    pixels = painted(50, 30)
    pixels[3, 3] = (254, 0, 0)
    with pytest.raises(EngineError, match="#fe0000, which is no class"):
        classes(written(picture(pixels)))
    with pytest.raises(EngineError, match="same colour"):
        classes(written(picture(pixels)), {"a": (1, 1, 1), "b": (1, 1, 1)})
    with pytest.raises(EngineError, match="nobody told what its colours mean"):
        classes(written(picture(pixels)), {})


def test_numbers_are_classes_of_the_table_or_without_a_name(written: Write) -> None:
    values = np.zeros((60, 100), np.uint8)
    values[:10], values[10:20], values[20:30] = 1, 2, 5
    told = classes(written(picture(values)), {}, **{"1": {"name": "Tumor"}, "2": "ignore", "7": {"name": "Rare"}})
    assert [(s.number, s.label) for s in told.segments] == [(1, "Tumor"), (5, "label 5"), (7, "Rare")]
    assert np.array_equal(np.unique(told.labels), [0, 1, 5])
    assert told.notes == (
        "the engine did not say what the numbers of its class map mean",
        "1 class(es) left out as configured",
    )
    with pytest.raises(EngineError, match="beyond 255"):
        classes(written(picture(np.full((60, 100), 300, np.uint16))), {})


def test_a_class_that_is_ignored_is_painted_over(written: Write) -> None:
    told = classes(written(picture(painted(50, 30))), Tumor="ignore")
    assert [s.number for s in told.segments] == [2, 3] and set(np.unique(told.labels)) == {0, 2}


@pytest.mark.parametrize(("width", "height"), [(15, 9), (14, 8), (15, 8)])
def test_a_map_whose_pixels_do_not_divide_the_slide_is_brought_onto_its_extent(
    written: Write, width: int, height: int
) -> None:
    slide = Matrix(sop_instance_uid="1", columns=100, rows=60)  # of pixels of 7 x 7
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :7] = COLOURS["Tumor"]  # 49 of the slide's pixels
    told = classes(written(picture(pixels)), matrix=slide)
    assert told.labels.shape == (height, width)
    edge = int((told.labels[0] == 1).sum()) * 100 / width
    assert abs(edge - 49) <= 100 / width / 2 + 1e-6  # never off by more than half a pixel of the map
    assert "nearest neighbour" in told.notes[0]


@pytest.mark.parametrize(("width", "height"), [(60, 100), (50, 31), (200, 120), (99, 60), (1, 60)])
def test_a_map_that_does_not_cover_the_slide_is_refused(written: Write, width: int, height: int) -> None:
    with pytest.raises(EngineError, match="does not cover a slide of 100 x 60"):
        classes(written(picture(np.zeros((height, width, 3), np.uint8))))


def test_of_a_pyramid_the_first_page_that_is_small_enough_is_taken(
    written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [Image.fromarray(painted(100 // n, 60 // n)) for n in (1, 2, 4)]
    path = written(picture(pages[0], save_all=True, append_images=pages[1:]))
    assert classes(path).labels.shape == (60, 100)
    monkeypatch.setattr(_class_map, "MAX_MAP_PIXELS", 1500)
    assert classes(path).labels.shape == (30, 50)
    monkeypatch.setattr(_class_map, "MAX_MAP_PIXELS", 100)
    with pytest.raises(EngineError, match="more than 100 pixels"):
        classes(path)


def test_of_a_pyramid_as_large_as_a_slide_a_small_page_is_taken(
    written: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own bound, for pictures that are decoded
    monkeypatch.setattr(_class_map, "MAX_MAP_PIXELS", 1500)
    pages = [Image.fromarray(painted(100 // n, 60 // n)) for n in (1, 2)]
    assert classes(written(picture(pages[0], save_all=True, append_images=pages[1:]))).labels.shape == (30, 50)


def test_a_header_that_claims_too_much_takes_no_memory(written: Write) -> None:
    data = bytearray(picture(np.zeros((60, 100), np.uint8)))
    at = data.index((256).to_bytes(2, "little") + (4).to_bytes(2, "little"))  # ImageWidth, LONG
    for entry in (at, at + 12):
        data[entry + 8 : entry + 12] = (1_000_000).to_bytes(4, "little")
    huge = Matrix(sop_instance_uid="1", columns=1_000_000, rows=1_000_000)
    with pytest.raises(EngineError, match=r"pixels|cannot be read"):
        classes(written(bytes(data)), {}, matrix=huge)


@pytest.mark.parametrize(
    "content", [b"", b"II*\x00", b"\x89PNG\r\n\x1a\n" + bytes(99), b"II*\x00\x08\x00\x00\x00\xff\xff"]
)
def test_what_is_no_tiff_is_refused(written: Write, content: bytes) -> None:
    with pytest.raises(EngineError, match="cannot be read as TIFF"):
        classes(written(content))


def test_a_tiff_cut_short_is_refused(written: Write) -> None:
    whole = picture(painted(100, 60))
    with pytest.raises(EngineError, match="cannot be read as TIFF"):
        classes(written(whole[: len(whole) // 2]))


# --- numbers ---------------------------------------------------------------------------------------------------------


def numbers(path: Path) -> list[tuple[str, float, str]]:
    return [(one.code.meaning, one.value, one.unit.value) for one in quantities_of(path, ("1.2.3",)).items]


def test_one_row_of_named_columns(written: Write) -> None:
    table = "slide,Area [µm²],Tumor (%),Cells\nslide-1,12.5,40,1e3\n".encode()
    assert numbers(written(table)) == [("Area", 12.5, "um2"), ("Tumor", 40.0, "%"), ("Cells", 1000.0, "1")]


def test_rows_named_by_their_text(written: Write) -> None:
    table = b"# version 1\nTissue classes\nclass;area [mm2];share [%]\nTumor;1.5;60\nStroma;1;\n"
    path = written(table)
    assert numbers(path) == [
        ("Tumor: area", 1.5, "mm2"),
        ("Tumor: share", 60.0, "%"),
        ("Stroma: area", 1.0, "mm2"),
    ]
    assert quantities_of(path, ("1",)).notes == ("1 cell(s) of the table without a number left out",)


def test_a_list_of_names_values_and_units(written: Write) -> None:
    table = b"name,value,unit\ndensity,120,cells/mm2\nratio,0.5,\nodd,3,furlong\n"
    assert numbers(written(table)) == [("density", 120.0, "/mm2"), ("ratio", 0.5, "1"), ("odd (furlong)", 3.0, "1")]


def test_words_for_no_number_make_no_name_of_a_column(written: Write) -> None:
    path = written(b"class,area,count,spare\nTumor,NA,3,n/a\nStroma,12.5,4,\n")
    assert numbers(path) == [("Tumor: count", 3.0, "1"), ("Stroma: area", 12.5, "1"), ("Stroma: count", 4.0, "1")]
    assert quantities_of(path, ("1",)).notes == ("3 cell(s) of the table without a number left out",)


@pytest.mark.parametrize(
    "table",
    [
        "a;b;c\n0,5;1,5;2,5\n",
        "a;b;c\n0,5;1,5;2,5\n1,5;2,5;3,5\n",  # cut at its commas this is a table of other numbers
        "class;area;ratio\nTumor;1.234;0,5\nStroma;2.000;0,4\n",
        'area,count\n"1,234",4\n',
        "class;share\nTumor;12,5 %\nStroma;87,5 %\n",
        "area;count\n1.234;4\n",
    ],
)
def test_numbers_that_may_be_others_elsewhere_are_refused(written: Write, table: str) -> None:
    with pytest.raises(EngineError, match="nobody can say whether it is a decimal one"):
        quantities_of(written(table.encode()), ("1",))


def test_a_point_is_decimal_where_the_table_shows_it(written: Write) -> None:
    assert numbers(written(b"area;ratio\n1.234;0.5\n")) == [("area", 1.234, "1"), ("ratio", 0.5, "1")]
    assert numbers(written(b"area,count\n1.234,4\n")) == [("area", 1.234, "1"), ("count", 4.0, "1")]


def test_equal_names_have_equal_codes_and_long_ones_stay_apart(written: Write) -> None:
    long = "a very long name of a column that goes on beyond sixty four characters "
    told: Quantities = quantities_of(written(f"{long}one,{long}two\n1,2\n".encode()), ("1",))
    one, two = told.items
    assert one.code.value != two.code.value and len(one.code.meaning) <= 64
    assert quantities_of(written(f"{long}ONE\n1\n".encode()), ("1",)).items[0].code.value == one.code.value


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n",
        b"a,b\nx,y\n",
        b"a,b\n1,2\n3,4\n",
        b"a,b\n1\n",
        b"name,v\n" + b"x,1\n" * 100,
        b"a\n" + b"1" * (5 * 1024**2),
        b"\xff\xfea\x00",
        b'a,b\n"1,2\n',
        b"a\nnan\n",
        b"a\n1e999\n",
        b",".join(b"c%d" % n for n in range(2000)) + b"\n" + b",".join(b"1" for _ in range(2000)) + b"\n",
    ],
)
def test_what_is_no_table_of_a_slide_is_refused(written: Write, content: bytes) -> None:
    with pytest.raises(EngineError):
        quantities_of(written(content), ("1",))


# --- slides of the corpus --------------------------------------------------------------------------------------------


def stored(path: Path) -> StoredInstance:
    with path.open("rb") as file:
        file.seek(132)
        meta = _read_file_meta_info(file)
        offset = file.tell()
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    return StoredInstance(
        sop_class_uid=str(ds.SOPClassUID),
        sop_instance_uid=str(ds.SOPInstanceUID),
        study_instance_uid=str(ds.StudyInstanceUID),
        series_instance_uid=str(ds.SeriesInstanceUID),
        transfer_syntax_uid=str(meta.TransferSyntaxUID),
        path=str(path),
        data_set_offset=offset,
        data_set_length=path.stat().st_size - offset,
        sha256="0" * 64,
        origin=Origin.RECEIVED,
        modality=str(ds.Modality),
    )


def test_slides_of_the_corpus_are_understood_and_leave_as_they_are_stored(corpus: Path) -> None:
    files = sorted(corpus.rglob("*highdicom*/**/sm_image*.dcm"))
    assert len(files) >= 6
    for file in files:
        instance = stored(file)
        slide = read_slide([instance], hide=True)
        assert (slide.base.columns, slide.base.rows, slide.mpp) == (50, 50, pytest.approx(0.499))
        assert slide.stain == ("" if "grayscale" in file.name else "H&E")
        source = pydicom.dcmread(file)
        for kind in (DICOM, ZIP):
            out = io.BytesIO()
            assert write_slide(slide, out, Pseudonyms("7", SECRET), media_type=kind) == 1
            data = out.getvalue()
            if kind == ZIP:
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    (entry,) = archive.infolist()
                    assert entry.compress_type == zipfile.ZIP_STORED
                    data = archive.read(entry)
            sent = pydicom.dcmread(io.BytesIO(data))
            assert sent.PixelData == source.PixelData and sent.TotalPixelMatrixColumns == 50
            assert str(source.PatientID or "-").encode() not in data or not source.PatientID
            assert instance.sop_instance_uid.encode() not in data


def test_series_that_are_not_one_slide_are_refused(corpus: Path) -> None:
    first, second = (stored(path) for path in sorted(corpus.rglob("sm_image*.dcm"))[:2])
    with pytest.raises(SeriesRejected):
        read_slide([first, second], hide=True)
    with pytest.raises(SeriesRejected, match="no images"):
        read_slide([], hide=True)
    (annotations,) = corpus.rglob("sm_annotations.dcm")
    with pytest.raises(SeriesRejected, match="only whole slide images"):
        read_slide([stored(annotations)], hide=False)


def test_coarse_slides_of_the_corpus_say_how_coarse(corpus: Path) -> None:
    file = next(corpus.rglob("full_no_bot.dcm"))
    slide = read_slide([stored(file)], hide=False)
    assert (slide.base.columns, slide.base.rows) == (154, 290)
    assert slide.mpp == pytest.approx(124.2, abs=0.1)
