"""Which of the objects that came back answer a job: by what they refer to, in its study, after it was sent.

An object that refers to an image or series that was sent is of that job. One that refers to no image at all may be so
by its frame of reference, or, where that is allowed, by its study alone. One that refers only to other images is not,
unless these are objects of the answer (an SR on the SEG beside it). What fits another open job as well is of neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from dicom_node.engines._dicom_objects import Described
from dicom_node.model import Origin

__all__ = ["Fit", "Matched", "Sent", "fit", "matched"]


class Fit(IntEnum):
    """How an object belongs to what was sent, the closest greatest."""

    NONE = 0
    STUDY = 1
    FRAME = 2
    IMAGE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """The UIDs a job sent, as they left, and the position of the latest arrival before it did."""

    instances: frozenset[str]
    series: frozenset[str]
    frames: frozenset[str]
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """What came back, sorted: the answer so far; images that were sent; what fits `others`, jobs that wait, too."""

    answer: tuple[Described, ...]
    echoes: tuple[Described, ...]
    ambiguous: tuple[Described, ...]
    others: tuple[int, ...]


def fit(one: Described, sent: Sent) -> Fit:
    """How close the object is to what was sent."""
    if one.refers_to & (sent.instances | sent.series):
        return Fit.IMAGE
    if one.refers_to:
        return Fit.NONE
    if one.frames:
        return Fit.FRAME if one.frames & sent.frames else Fit.NONE
    return Fit.STUDY


def matched(found: Sequence[Described], sent: Sent, rivals: Mapping[int, Sent], *, least: Fit) -> Matched:
    """Sort `found`, which came in the study that was sent, after it was. `rivals`: other jobs that wait there."""
    echoes = tuple(one for one in found if one.uid in sent.instances or one.series in sent.series)
    # what the node has from elsewhere, or made itself, is no answer: the engine passes on what it was given
    fresh = [one for one in found if one not in echoes and one.returned.known_as in (None, Origin.RETURNED)]
    answer: dict[str, Described] = {}
    ambiguous: dict[str, Described] = {}
    others: set[int] = set()
    for one in fresh:
        close = fit(one, sent)
        if close < max(least, Fit.STUDY):
            continue
        theirs = {job: fit(one, rival) for job, rival in rivals.items() if one.returned.position > rival.after}
        if any(other > close for other in theirs.values()):
            continue
        if same := [job for job, other in theirs.items() if other == close]:
            ambiguous[one.uid] = one
            others.update(same)
        else:
            answer[one.uid] = one
    _add_related(fresh, answer, ambiguous)
    in_order = sorted(answer.values(), key=lambda one: one.returned.position)
    return Matched(
        answer=tuple(in_order), echoes=echoes, ambiguous=tuple(ambiguous.values()), others=tuple(sorted(others))
    )


def _add_related(fresh: Iterable[Described], answer: dict[str, Described], ambiguous: dict[str, Described]) -> None:
    """Objects that refer to objects of the answer belong to it, as often as that adds some."""
    left = [one for one in fresh if one.uid not in answer and one.uid not in ambiguous]
    known = {uid for one in answer.values() for uid in (one.uid, one.series)}
    while more := [one for one in left if one.refers_to & known]:
        answer |= {one.uid: one for one in more}
        known |= {uid for one in more for uid in (one.uid, one.series)}
        left = [one for one in left if one not in more]
