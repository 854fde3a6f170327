"""pydicom without a word: its warnings and log lines quote values, which may name patients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pydicom import config

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom from warning about, and logging, values that break their VR."""
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield
