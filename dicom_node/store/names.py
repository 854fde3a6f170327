"""Names and patterns as the index matches them: folded once when stored, folded the same way when asked for.

PS3.4 C.2.2.2.1 lets a node match person names without regard to case and accents; this one does.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["beyond", "fold", "glob_pattern", "literal_prefix", "name_key"]

# Japanese voicing marks are combining characters to Unicode but letters to a reader: が is not か
_VOICING = frozenset("\u3099\u309a")


def fold(text: str) -> str:
    """Without case, accents and width: "Äpfel" and "APFEL" fold alike, "が" and "か" do not."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(char for char in decomposed if not unicodedata.combining(char) or char in _VOICING)
    return unicodedata.normalize("NFC", bare).casefold()


def name_key(names: str) -> str:
    """The folded form of a PN value: groups joined by "=", values by a backslash, padding and empty ends gone.

    PS3.5 6.2.1.1: trailing "^" and spaces around components say nothing.
    """
    return "\\".join("=".join(name_group(group) for group in name.split("=")).rstrip("=") for name in names.split("\\"))


def name_group(group: str) -> str:
    """One folded component group."""
    return "^".join(" ".join(component.split()) for component in fold(group).split("^")).rstrip("^")


def glob_pattern(wildcards: str) -> str:
    """A DICOM pattern (* and ?) as SQLite's GLOB, which is case-sensitive and knows [ ] besides."""
    return wildcards.replace("[", "[[]")


def literal_prefix(wildcards: str) -> str:
    """What every match must begin with."""
    return re.split(r"[*?]", wildcards, maxsplit=1)[0]


def beyond(prefix: str) -> str:
    """The first text after all that begin with `prefix`, which is not empty: by code points, as SQLite compares."""
    for end in range(len(prefix), 0, -1):
        code = ord(prefix[end - 1])
        if code < 0x10FFFF:
            return prefix[: end - 1] + chr(0xE000 if code == 0xD7FF else code + 1)  # no text has surrogates
    return prefix + "\U0010ffff" * 64  # there is none; a text of so many of them is no value
