"""How the elements at the beginning of a data set lie, remembered: slices of a series mostly differ in values only.

Where every element head (tag, VR, length: PS3.5 7.1.2) that a walk looked at is there again, byte for byte, the walk
goes the same way. Comparing costs a tenth of walking, and one look at the values does the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

__all__ = ["Shape", "Shapes", "shape_of"]

MAX_SHAPES, MAX_HEADS = 256, 400  # heads of one shape; together they bound what strangers make us keep: 17 MiB
_LE, _BE = struct.Struct("<HH2sH"), struct.Struct(">HH2sH")
_LE_LONG, _BE_LONG = struct.Struct("<I"), struct.Struct(">I")

Pick = Callable[[bytes], tuple[bytes, ...]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The walk up to `end`, where a top-level element begins. `count`: elements and items before it."""

    heads: Pick
    said: tuple[bytes, ...]  # what `heads` picks
    tags: tuple[int, ...]  # of the values that are kept
    vrs: tuple[bytes, ...]
    values: Pick
    end: int
    count: int

    def fits(self, head: bytes) -> bool:
        """Whether a data set that begins with `head`, as long as the one this was made of, is walked the same."""
        return self.heads(head) == self.said


class Shapes:
    """Shapes by the length of the data set. Safe for many threads: what one of them misses, another finds."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], Shape | None] = {}

    def find(self, length: int, little: bool, head: bytes) -> tuple[Shape | None, bool]:
        """A shape that fits, and else whether it is worth making one: a length that comes once may not come again."""
        key = (length, little)
        shape = self._known.get(key)
        if shape is not None and shape.fits(head):
            return shape, False
        seen = key in self._known
        if shape is not None or not seen:
            if len(self._known) >= MAX_SHAPES:
                self._known.clear()
            self._known[key] = None
        return None, seen and shape is None

    def keep(self, length: int, little: bool, shape: Shape | None) -> None:
        """Remember it for data sets of that length."""
        if shape is not None:
            self._known[length, little] = shape


def shape_of(
    head: bytes,
    top: Sequence[int],
    nested: Sequence[int],
    *,
    little: bool,
    kept: frozenset[int],
    short: frozenset[bytes],
) -> Shape | None:
    """The shape of an explicit data set that begins with `head`, None where it has too little or too much.

    `top`, `nested`: where elements begin, at the top level and within sequences, items and delimiters too, each in
    order and without a gap. `kept`: tags whose values are wanted; `short`: VRs with a 16-bit length.
    """
    unpack = (_LE if little else _BE).unpack_from
    long = (_LE_LONG if little else _BE_LONG).unpack_from
    inside = [position for position in top if position <= len(head)]
    if len(inside) < 2:
        return None
    end = inside.pop()
    heads: list[slice] = []
    values: dict[int, tuple[bytes, slice]] = {}
    for position in inside:
        group, element, vr, length = unpack(head, position)
        start = position + 8
        if vr not in short:
            (length,) = long(head, start)
            start += 4
        heads.append(slice(position, start))
        tag = group << 16 | element
        if tag in kept:
            if tag in values or start + length > end:
                return None
            values[tag] = vr, slice(start, start + length)
    for position in nested:
        if position < end:
            group, _, vr, _ = unpack(head, position)
            heads.append(slice(position, position + (8 if group == 0xFFFE or vr in short else 12)))
    if len(values) < 2 or len(heads) > MAX_HEADS:
        return None
    pick: Pick = itemgetter(*heads)
    return Shape(
        heads=pick,
        said=pick(head),
        tags=tuple(values),
        vrs=tuple(vr for vr, _ in values.values()),
        values=itemgetter(*(where for _, where in values.values())),
        end=end,
        count=len(heads),
    )
