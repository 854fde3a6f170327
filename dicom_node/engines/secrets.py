"""Credentials, named and never written down: the configuration says where one lies, its value is read when needed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import PydanticCustomError, core_schema

from dicom_node.errors import ConfigError
from dicom_node.private_files import read_private

__all__ = ["Secret"]

MAX_BYTES = 64 * 1024
_ENV = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
_REMEDY = "write env:NAME or file:/absolute/path, never the value itself"


class Secret:
    """A credential at `env:NAME` or `file:/path`. Its value leaves through `reveal` only.

    `repr`, `str`, format and pydantic's dumps show where it lies, never what it is; nothing is kept between two
    calls of `reveal`, so a renewed file or variable is taken at once. Raises ConfigError for anything else, without
    repeating it: it may be the value. Usable as the type of a pydantic field; the model should set
    `hide_input_in_errors`, because pydantic otherwise quotes what it was given.
    """

    __slots__ = ("_source",)

    def __init__(self, source: str) -> None:
        if problem := _problem(source):
            raise ConfigError(f"a secret {problem}; {_REMEDY}")
        self._source = source

    @property
    def source(self) -> str:
        """Where it lies."""
        return self._source

    def reveal(self) -> str:
        """Its value now, without the line end of its file.

        Raises ConfigError when it is missing, empty, longer than 64 KiB, in a file that others than its owner and
        group can read, or no single line of printable ASCII (RFC 9110 5.5: it would not pass as a header value).
        """
        kind, _, where = self._source.partition(":")
        value = os.environ.get(where, "") if kind == "env" else self._read(Path(where))
        if not value:
            raise ConfigError(f"the secret {self._source} is missing or empty; set it for the process of the node")
        if not re.fullmatch(r"[\x20-\x7e]+", value):
            raise ConfigError(f"the secret {self._source} is not one line of printable ASCII characters")
        return value

    def _read(self, path: Path) -> str:
        return read_private("a secret", path, MAX_BYTES).decode("latin-1").strip("\r\n")

    def __repr__(self) -> str:
        return f"Secret({self._source})"

    def __str__(self) -> str:
        return self._source

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._source == self._source

    def __hash__(self) -> int:
        return hash(self._source)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _validated(cls, value: Any) -> Secret:
        if isinstance(value, Secret):
            return value
        if problem := _problem(value):
            raise PydanticCustomError("secret", f"a secret {problem}; {_REMEDY}")
        return cls(value)


def _problem(source: Any) -> str:
    """What is wrong with it as the place of a secret; "" if nothing."""
    if not isinstance(source, str) or not source.startswith(("env:", "file:")):
        return "must not be given as a value"
    if source.startswith("env:") and not _ENV.fullmatch(source):
        return "in the environment needs the name of a variable"
    if source.startswith("env:DICOM_NODE_"):
        return "cannot be in a variable whose name starts with DICOM_NODE_, which would be taken for a setting"
    if source.startswith("file:") and not Path(source.removeprefix("file:")).is_absolute():
        return "in a file needs an absolute path"
    return ""
