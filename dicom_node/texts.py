"""What bytes of a data set say, as text: numbers written out, strings in their character set (PS3.5 6.1, 6.2).

As `pydicom` reads them, without its warnings: a peer's bytes must not write our log.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

from pydicom.charset import CODES_TO_ENCODINGS, handled_encodings, python_encoding

__all__ = ["ONE_VALUE_VRS", "codecs_of", "text_of"]

_NUMBERS = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d", b"UV": "Q", b"SV": "q"}
# PS3.5 6.1.2.2: what (0008,0005) applies to
_LOCAL_TEXT_VRS = frozenset({b"SH", b"LO", b"ST", b"LT", b"UC", b"UT", b"PN"})
ONE_VALUE_VRS = frozenset({b"ST", b"LT", b"UT", b"UR"})
MAX_SHORT = 64  # bytes of a value whose text is remembered: most are the same in every slice of a series
MAX_CHARACTER_SET = 1024  # characters of (0008,0005) that are looked at: all terms there are take half of it


def text_of(raw: bytes, vr: bytes, codecs: tuple[str, ...], *, little: bool) -> str:
    """The text of a value: without padding, several values joined by a backslash. `codecs`: as `codecs_of` has them."""
    return (_short_text if len(raw) <= MAX_SHORT else _text)(raw, vr, codecs, little)


def _text(raw: bytes, vr: bytes, codecs: tuple[str, ...], little: bool) -> str:
    if (code := _NUMBERS.get(vr)) is not None:
        size = struct.calcsize(code)
        count = len(raw) // size
        values = struct.unpack_from(f"{'<' if little else '>'}{count}{code}", raw)
        return "\\".join(str(value) for value in values)
    if vr in _LOCAL_TEXT_VRS and (not raw.isascii() or b"\x1b" in raw):
        text = _decode(raw, vr, codecs)
    else:
        text = raw.decode("latin-1")
    if vr in ONE_VALUE_VRS:
        return text.strip("\0 ")
    return "\\".join(value.strip("\0 ") for value in text.split("\\")) if "\\" in text else text.strip("\0 ")


_short_text = lru_cache(maxsize=4096)(_text)


def _decode(raw: bytes, vr: bytes, codecs: tuple[str, ...]) -> str:
    """Decode before splitting at backslashes: in GB18030, GBK and Shift JIS they occur as second bytes."""
    if b"\x1b" not in raw:
        return raw.decode(codecs[0], "replace")
    delimiters = _NAME_DELIMITERS if vr == b"PN" else _DELIMITERS
    return "".join(_decode_fragment(part, codecs, delimiters) for part in _FRAGMENTS.findall(raw))


# PS3.5 6.1.2.5.3: after these the first character set is in force again
_DELIMITERS = re.compile(rb"[\t\n\f\r\\]")
_NAME_DELIMITERS = re.compile(rb"[\t\n\f\r\\^=]")
_FRAGMENTS = re.compile(rb"[^\x1b]+|\x1b[^\x1b]*")


def _decode_fragment(part: bytes, codecs: tuple[str, ...], delimiters: re.Pattern[bytes]) -> str:
    """Text up to the next escape sequence, which the part may begin with (PS3.3 tables C.12-3, C.12-4)."""
    length = 4 if part.startswith((b"\x1b$(", b"\x1b$)")) else 3
    codec = CODES_TO_ENCODINGS.get(part[:length], "")
    if codec not in codecs and codec != _DEFAULT_CODEC:  # none, or one the object does not announce
        return part.decode(codecs[0], "replace")
    if codec in handled_encodings:  # these codecs read their escape sequence themselves
        return part.decode(codec, "replace")
    rest = part[length:]
    found = delimiters.search(rest)
    end = found.start() if found else len(rest)
    return rest[:end].decode(codec, "replace") + rest[end:].decode(codecs[0], "replace")


_DEFAULT_CODEC = python_encoding[""]
_ALMOST_ISO_IR = re.compile(r"ISO[-_ ]?(?:IR[-_ ]?)?(\d+)")
_ALMOST_ISO_2022 = re.compile(r"ISO[-_ ]?2022[-_ ]?(?:IR[-_ ]?)?(\d+|GBK)")


def codecs_of(character_set: str) -> tuple[str, ...]:
    """Python's codecs for a Specific Character Set value (PS3.3 C.12.1.1.2), as `pydicom.charset` names them.

    The first is the one in force at the beginning, each of the others is there once. Terms that are almost right are
    read as meant; one that is unknown counts as the default repertoire.
    """
    return _codecs(character_set[:MAX_CHARACTER_SET])


@lru_cache(maxsize=256)
def _codecs(character_set: str) -> tuple[str, ...]:
    # each once: these are part of what `_short_text` remembers, and a peer may name as many as it likes
    return tuple(dict.fromkeys(_codec(term.strip("\0 ")) for term in character_set.split("\\")))


def _codec(term: str) -> str:
    if term in python_encoding:
        return python_encoding[term]
    upper = term.upper()
    candidates: tuple[str, ...]
    if found := _ALMOST_ISO_2022.fullmatch(upper):
        candidates = (f"ISO 2022 IR {found[1]}", f"ISO 2022 {found[1]}")
    elif found := _ALMOST_ISO_IR.fullmatch(upper):
        candidates = (f"ISO_IR {found[1]}",)
    else:
        candidates = (upper,)
    for candidate in candidates:
        if candidate in python_encoding:
            return python_encoding[candidate]
    return "UTF8" if upper.replace("-", "") == "UTF8" else _DEFAULT_CODEC
