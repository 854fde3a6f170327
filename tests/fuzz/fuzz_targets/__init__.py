"""Every door that strangers' bytes come through, with inputs to begin with."""

from . import answers, data_sets, disk, wire, words
from ._target import Target

__all__ = ["TARGETS", "Target"]

TARGETS: tuple[Target, ...] = (
    *wire.TARGETS,
    *data_sets.TARGETS,
    *disk.TARGETS,
    *words.TARGETS,
    *answers.TARGETS,
)
