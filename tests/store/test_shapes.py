"""A data set whose beginning lies as one before is read the same as if it were the first."""

import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.filereader import _read_file_meta_info, read_preamble

from dicom_node import headers, texts
from dicom_node.errors import InvalidInstance
from dicom_node.headers import scan
from dicom_node.model import InstanceHeader
from dicom_node.shapes import MAX_SHAPES, Shapes
from dicom_node.structure import HEAD_BYTES, Walk, _Frame

EXPLICIT, BIG, JPEG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.4.70"
IMPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"
DataSet = Callable[..., bytes]
Seen = tuple[InstanceHeader, list[str]] | str


def look(body: bytes, syntax: str) -> Seen:
    """The header and the order of its attributes, or why there is none."""
    try:
        header = scan(memoryview(body), syntax, max_inflated_header_bytes=1 << 20)
    except InvalidInstance as exc:
        return str(exc)
    return header, list(header.attributes)


def forget(patch: pytest.MonkeyPatch) -> None:
    asked = replace(headers._asked(), shapes=Shapes())
    patch.setattr(headers, "_asked", lambda: asked)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes, str], Seen]:
    """As `look`, with nothing remembered."""

    def looked(body: bytes, syntax: str) -> Seen:
        with monkeypatch.context() as patch:
            forget(patch)
            for module, name in ((headers, "_normalised"), (texts, "_codecs"), (texts, "_short_text")):
                patch.setattr(module, name, lru_cache(maxsize=0)(getattr(module, name).__wrapped__))
            return look(body, syntax)

    return looked


def learn(body: bytes, syntax: str) -> None:
    for _ in range(3):
        look(body, syntax)


def changed(body: bytes, chance: random.Random) -> bytes:
    """Some bytes among the first are others: heads, lengths or values."""
    damaged = bytearray(body)
    for _ in range(chance.randrange(1, 4)):
        damaged[chance.randrange(min(len(body), 9000))] = chance.choice([0, 1, 2, 8, 0x20, 0x31, 0xFF, 0xFE, 0x7F])
    return bytes(damaged)


@pytest.mark.parametrize(("syntax", "form"), [(EXPLICIT, {}), (BIG, {"little": False}), (JPEG, {})])
def test_what_is_remembered_changes_nothing_whatever_comes(
    data_set: DataSet, alone: Callable[[bytes, str], Seen], syntax: str, form: dict[str, bool]
) -> None:
    chance = random.Random(20261121)
    body = data_set(PatientName="Doe^Jane", StudyDescription="thorax", PixelData=b"\0" * 64, **form)
    learn(body, syntax)
    assert look(body, syntax) == alone(body, syntax)
    for _ in range(1500):
        learn(body, syntax)
        damaged = changed(body, chance)
        assert look(damaged, syntax) == alone(damaged, syntax)


def corpus_files(corpus: Path) -> Iterator[tuple[bytes, str]]:
    for path in sorted(corpus.rglob("*.dcm")):
        if path.stat().st_size > 400_000:
            continue
        with path.open("rb") as file:
            try:
                read_preamble(file, False)
                syntax = str(_read_file_meta_info(file).TransferSyntaxUID)
            except Exception:  # noqa: BLE001 - no Part-10 file
                continue
            yield file.read(), syntax


@pytest.mark.filterwarnings("ignore")
def test_every_corpus_file_is_read_the_same_again_and_damaged(
    corpus: Path, alone: Callable[[bytes, str], Seen]
) -> None:
    chance, count = random.Random(20261122), 0
    for body, syntax in corpus_files(corpus):
        first = alone(body, syntax)
        learn(body, syntax)
        assert look(body, syntax) == first
        for _ in range(6 if body else 0):
            damaged = changed(body, chance)
            assert look(damaged, syntax) == alone(damaged, syntax)
        count += 1
    assert count > 300


def test_a_slice_that_differs_in_values_only_is_not_walked_again(
    data_set: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    learn(data_set(SOPInstanceUID="1.2.3", InstanceNumber="1", PixelData=b"\0" * 64), EXPLICIT)
    walked: list[int] = []
    element = Walk._element

    def counted(walk: Walk, stack: list[_Frame], position: int) -> int:
        walked.append(position)
        return element(walk, stack, position)

    monkeypatch.setattr(Walk, "_element", counted)
    seen = look(data_set(SOPInstanceUID="1.2.4", InstanceNumber="2", PixelData=b"\0" * 64), EXPLICIT)
    assert isinstance(seen, tuple)
    assert seen[0].sop_instance_uid == "1.2.4" and seen[0].attributes["InstanceNumber"] == "2"
    assert len(walked) == 1, "only the pixel data"


# --- data sets made of parts, and others that lie nearly as they do ---------------------------------------------------

LONG = (b"OB", b"OW", b"SQ", b"UC", b"UN", b"UT", b"UV")
UNDEFINED = 0xFFFFFFFF


@dataclass(frozen=True)
class Part:
    """One element. `value`: bytes, or the items of a sequence. `length`: what it says, None for the truth."""

    tag: int
    vr: bytes
    value: bytes | tuple[tuple["Part", ...], ...]
    undefined: bool = False
    length: int | None = None


def encoded(parts: tuple[Part, ...], syntax: str) -> bytes:
    order = ">" if syntax == BIG else "<"

    def one(part: Part) -> bytes:
        value = part.value if isinstance(part.value, bytes) else b"".join(map(item, part.value))
        if part.undefined:
            value += struct.pack(f"{order}HHI", 0xFFFE, 0xE0DD, 0)
        length = UNDEFINED if part.undefined else len(value) if part.length is None else part.length
        group, element = part.tag >> 16, part.tag & 0xFFFF
        if syntax == IMPLICIT:
            return struct.pack("<HHI", group, element, length) + value
        if part.vr in LONG:
            return struct.pack(f"{order}HH2sHI", group, element, part.vr, 0, length) + value
        return struct.pack(f"{order}HH2sH", group, element, part.vr, length & 0xFFFF) + value

    def item(within: tuple[Part, ...]) -> bytes:
        body = b"".join(map(one, within))
        if len(within) % 2:
            return struct.pack(f"{order}HHI", 0xFFFE, 0xE000, len(body)) + body
        end = struct.pack(f"{order}HHI", 0xFFFE, 0xE00D, 0)
        return struct.pack(f"{order}HHI", 0xFFFE, 0xE000, UNDEFINED) + body + end

    return b"".join(map(one, parts))


# of one length each, so that one takes the place of another and nothing moves
CHARACTER_SETS = (b"ISO_IR 100", b"ISO_IR 192", b"ISO_IR 144", b"GB18030   ", b"no set    ", b"\\ISO_IR 13")
NAMES = (b"M\xc3\xbcller^J", b"\xd0\xd2\xb0\xbf\xb3\xd1^AB", b"\x1b$B;3ED^AB", b"Yamada^Tar", b" \0a=b\\c=d ")
PLACES = (  # tag, VRs it may come with, values
    (0x00080008, (b"CS", b"UN"), (b"ORIGINAL\\PRIMARY ", b"DERIVED\\SECONDARY")),
    (0x00080060, (b"CS", b"LO"), (b"CT", b"MR")),
    (0x00091001, (b"UN", b"SH", b"OB"), (b"priv", b"ate!")),
    (0x00091003, (b"ZZ", b"UT"), (b"", b"abcd", b"\0\0\4\0")),  # a VR to come has a longer length, maybe
    (0x00100020, (b"LO", b"SH", b"UN"), (b"P1", b"P2", b"")),
    (0x00104000, (b"LT", b"UT"), (b"x" * 40, b"y" * 300, b"z" * HEAD_BYTES)),
    (0x00180050, (b"DS", b"FD"), (b"1.25    ", struct.pack("<d", 2.5))),
    (0x00200013, (b"IS", b"US"), (b"1 ", b"2 ")),
    (0x0020000E, (b"UI",), (b"1.2.826.1.9\0", b"1.2.826.1.8\0")),  # a second one, or one out of order
    (0x00280010, (b"US", b"SS", b"UN"), (b"\0\2", b"\2\0", b"\xff\xff")),
    (0x00280106, (b"SS", b"US"), (b"\xff\xff", b"\0\1")),
)
IDENTITY = (
    Part(0x00080016, b"UI", b"1.2.840.10008.5.1.4.1.1.2\0"),
    Part(0x00080018, b"UI", b"1.2.826.5\0"),
    Part(0x0020000D, b"UI", b"1.2.826.1\0"),
    Part(0x0020000E, b"UI", b"1.2.826.1.1\0"),
)
PIXELS = (
    (),
    (Part(0x7FE00010, b"OW", bytes(64)),),
    (Part(0x7FE00010, b"OB", ((), (Part(0x00100010, b"PN", b"in a fragm"),)), undefined=True),),
    (Part(0x7FE00010, b"OW", bytes(64), length=66),),
    (Part(0x7FE00010, b"OW", bytes(64)), Part(0xFFFCFFFC, b"OB", bytes(8))),
)


def _drawn(place: tuple[int, tuple[bytes, ...], tuple[bytes, ...]]) -> st.SearchStrategy[Part]:
    tag, vrs, values = place
    return st.builds(Part, st.just(tag), st.sampled_from(vrs), st.sampled_from(values))


plain = st.sampled_from(PLACES).flatmap(_drawn)
named = st.one_of(
    st.builds(Part, st.just(0x00080005), st.just(b"CS"), st.sampled_from(CHARACTER_SETS)),
    st.builds(Part, st.just(0x00100010), st.sampled_from((b"PN", b"LO")), st.sampled_from(NAMES)),
)
FRAGMENTS = (b"\xfe\xff\0\xe0\4\0\0\0abcd", b"\xfe\xff\0\xe0\0\0\0\0\xfe\xff\0\xe0")  # the second is cut short
fragments = st.builds(Part, st.just(0x00091004), st.just(b"OB"), st.sampled_from(FRAGMENTS), st.just(True))
nested = st.lists(st.one_of(plain, named), max_size=3).map(tuple)
sequences = st.builds(
    Part,
    st.sampled_from((0x00081115, 0x00100010, 0x00091002)),  # the second is asked for, and should be none
    st.sampled_from((b"SQ", b"SQ", b"UN")),
    st.lists(nested, max_size=3).map(tuple),
    st.booleans(),
)


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[Part, ...]:
    parts = draw(st.lists(st.one_of(plain, sequences, fragments), max_size=8, unique_by=lambda part: part.tag))
    spoken = draw(st.lists(named, max_size=3, unique_by=lambda part: part.tag))
    whole = [*IDENTITY, *parts, *spoken]
    if draw(st.integers(0, 3)):
        whole.sort(key=lambda part: part.tag)
    return (*whole, *draw(st.sampled_from(PIXELS)))


SAME = (*CHARACTER_SETS, *NAMES, *FRAGMENTS, *(value for _, _, values in PLACES for value in values))


def _changed(draw: st.DrawFn, parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """One part is another, or one within it."""
    at = draw(st.integers(0, len(parts) - 1))
    part = parts[at]
    how = draw(st.sampled_from(("value", "value", "value", "vr", "length", "tag")))
    if isinstance(part.value, tuple) and any(part.value) and how != "tag":
        within = draw(st.sampled_from([number for number, item in enumerate(part.value) if item]))
        items = list(part.value)
        items[within] = _changed(draw, items[within])
        part = replace(part, value=tuple(items))
    elif how == "value" and isinstance(part.value, bytes):
        as_long = [value for value in SAME if len(value) == len(part.value)]
        part = replace(part, value=draw(st.sampled_from(as_long or [part.value])))
    elif how == "vr":
        part = replace(part, vr=draw(st.sampled_from((b"LO", b"UN", b"PN", b"US", b"SQ", b"UI", b"ZZ", b"??"))))
    elif how == "length":
        part = replace(part, length=draw(st.integers(0, 40)))
    else:
        part = replace(part, tag=part.tag ^ draw(st.sampled_from((1, 0x10, 0x80000, 0x100000))))
    return (*parts[:at], part, *parts[at + 1 :])


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A data set and some that differ in a little, in the order in which they come."""
    syntax = draw(st.sampled_from((EXPLICIT, EXPLICIT, BIG, IMPLICIT, DEFLATED)))
    first = draw(data_sets())
    family = [encoded(first, syntax)]
    for _ in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(("part", "part", "part", "bytes", "cut", "another")))
        body = bytearray(encoded(_changed(draw, first) if how == "part" else first, syntax))
        if how == "bytes":
            for _ in range(draw(st.integers(1, 3))):
                at = draw(st.integers(0, min(len(body), HEAD_BYTES + 600) - 1))
                body[at] = draw(st.sampled_from((0, 1, 2, 4, 8, 0x10, 0x53, 0x55, 0x7F, 0xE0, 0xFE, 0xFF)))
        elif how == "cut":
            del body[draw(st.integers(0, len(body) - 1)) :]
        elif how == "another":
            body[:] = encoded(draw(data_sets()), syntax)
        family.append(bytes(body))
    turns = draw(st.lists(st.sampled_from(range(len(family))), min_size=4, max_size=12))
    return syntax, [family[turn] for turn in (0, 0, 0, *turns)]


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(neighbours())
def test_data_sets_that_nearly_lie_as_their_neighbours_are_each_read_as_if_alone(
    alone: Callable[[bytes, str], Seen], came: tuple[str, list[bytes]]
) -> None:
    syntax, bodies = came
    if syntax == DEFLATED:
        pack = [zlib.compressobj(wbits=-zlib.MAX_WBITS) for _ in bodies]
        bodies = [one.compress(body) + one.flush() for one, body in zip(pack, bodies, strict=True)]
    for body in bodies:
        assert look(body, syntax) == alone(body, syntax)


@pytest.mark.parametrize("undefined", [False, True])
def test_a_length_within_a_sequence_counts_as_one_outside_does(
    alone: Callable[[bytes, str], Seen], undefined: bool
) -> None:
    def body(length: int | None) -> bytes:
        inner = Part(0x00080100, b"SH", b"T-D1", length=length)
        parts = (*IDENTITY, Part(0x00400275, b"SQ", ((inner, inner), (inner,)), undefined=undefined), *PIXELS[1])
        return encoded(parts, EXPLICIT)

    learn(body(None), EXPLICIT)
    for length in (None, 2, 40, None):
        assert look(body(length), EXPLICIT) == alone(body(length), EXPLICIT)
        assert isinstance(look(body(length), EXPLICIT), tuple) is (length is None)


def test_the_parts_of_the_test_above_are_remembered_and_do_differ(
    alone: Callable[[bytes, str], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch)
    name = Part(0x00100010, b"PN", NAMES[0])
    seen = []
    for character_set in CHARACTER_SETS:
        parts = (Part(0x00080005, b"CS", character_set), *IDENTITY[:2], name, *IDENTITY[2:], *PIXELS[1])
        body = encoded(parts, EXPLICIT)
        learn(body, EXPLICIT)
        seen.append(look(body, EXPLICIT))
        assert seen[-1] == alone(body, EXPLICIT)
    (shape,) = headers._asked().shapes._known.values()
    assert shape is not None and shape.end == len(body) - 64 - 12
    assert len({one[0].attributes["PatientName"] for one in seen if isinstance(one, tuple)}) >= 4


def test_many_threads_read_what_each_would_read_alone(
    data_set: DataSet, alone: Callable[[bytes, str], Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = [
        data_set(SOPInstanceUID=f"1.2.{number}", PatientName=name, StudyDescription="x" * (number % 7))
        for number, name in enumerate(("Doe^Jane", "Doe^Jona", "Roe") * 10, start=100)
    ]
    expected = [alone(body, EXPLICIT) for body in bodies]
    forget(monkeypatch)
    monkeypatch.setattr("dicom_node.shapes.MAX_SHAPES", 5)  # what is remembered is thrown away again and again
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda body: look(body, EXPLICIT), bodies * 40))
    assert found == expected * 40


def test_what_is_remembered_has_a_bound() -> None:
    shapes = Shapes()
    for length in range(3 * MAX_SHAPES):
        shapes.find(length, True, b"")
    assert len(shapes._known) <= MAX_SHAPES


def test_strangers_cannot_make_it_remember_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of nothing but heads, each as long as no other; character sets of nothing but backslashes."""
    forget(monkeypatch)
    texts._codecs.cache_clear()
    texts._short_text.cache_clear()
    identity = encoded(IDENTITY, EXPLICIT)
    tracemalloc.start()
    try:
        for number in range(24):
            pad = Part(0x00210010, b"LT", b" " * number)
            heads = tuple(Part(0x00210011, b"US", b"") for _ in range(HEAD_BYTES // 8))
            learn(identity + encoded((pad, *heads), EXPLICIT), EXPLICIT)
            terms = Part(0x00080005, b"CS", b"\\" * (30_000 + number))
            look(identity + encoded((terms, Part(0x00100010, b"PN", b"%d\xff" % number)), EXPLICIT), EXPLICIT)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1 << 20, f"{held >> 10} KiB"
