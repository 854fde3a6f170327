"""Which CEL library: speed, conformance where rules need it, and error detail, of those on PyPI with Python wheels.

    python benchmarks/cel_libraries.py

`common-expression-language` (module `cel`, a binding of the Rust implementation) is what the node uses; `cel-python`
(module `celpy`, pure Python on lark) is compared when it is installed: `pip install cel-python`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import metadata, requires, version
from typing import Any, Protocol

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
SERIES: dict[str, Any] = {
    "Modality": "DX",
    "SliceThickness": 3,
    "Rows": 512,
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "SeriesDescription": "Abdomen THIN 1mm",
    "ViewCodeSequence": [{"CodeValue": "272479007", "CodingSchemeDesignator": "SCT"}],
    "values": {"ViewPosition": ["LL", "PA"]},
    "now": NOW,
}
REFUSED = "refused"  # an error instead of a value is what CEL asks for

# expression, what the CEL specification gives
CASES: tuple[tuple[str, Any], ...] = (
    ('Modality in ["CR", "DX"]', True),
    ("SliceThickness < 5.0", True),
    ("SliceThickness == 3.0", True),
    ("SliceThickness in [3.0, 5.0]", True),
    ("Rows > 511.5 && Rows <= 512", True),
    ("1 == 1.0 && 1u == 1", True),
    ("[1] == [1.0]", True),
    ('values.ViewPosition.exists(v, v == "PA")', True),
    ('values.ViewPosition.all(v, v == "PA")', False),
    ('values.ViewPosition.filter(v, v == "PA").size() == 1', True),
    ("has(values.ViewPosition) && !has(values.PatientID)", True),
    ('ViewCodeSequence[0].CodeValue == "272479007"', True),
    ('"LOCALIZER" in ImageType', False),
    ('SeriesDescription.matches("(?i)thin")', True),
    ('SeriesDescription.contains("THIN") && SeriesDescription.startsWith("Abd")', True),
    ('now > timestamp("2026-03-02T11:00:00Z")', True),
    ("now.getHours() == 12 && now.getDayOfWeek() == 1", True),
    ('now - duration("1h") < now', True),
    ("Absent == 1 || true", True),  # what decides absorbs what is not there
    ("true || Absent == 1", True),
    ("Absent == 1 && false", False),
    ("Absent == 1", REFUSED),
    ("Absent == 1 || false", REFUSED),
    ("ImageType[7] == 'x'", REFUSED),
    ("values.PatientID.size() > 0", REFUSED),
    ("Modality < 5", REFUSED),
    ("Modality == 5", False),
    ("Modality && true", REFUSED),
    ("Modality.exists(m, m == 'D')", REFUSED),
    ("Rows / 0 == 1", REFUSED),
    ("Rows + 9223372036854775807 > 0", REFUSED),
)
MISTAKES = ("Modality = 'CT'", "Modality in ['CT'", "Modality == 'CT", "Modality ==", "a b")


class Library(Protocol):
    """One candidate."""

    @property
    def package(self) -> str: ...

    @property
    def module(self) -> str: ...

    def compile(self, text: str) -> Callable[[Mapping[str, Any]], Any]: ...

    def position(self, error: Exception) -> bool: ...

    def identifiers(self) -> str: ...


@dataclass(frozen=True)
class RustCel:
    """`common-expression-language`."""

    package: str = "common-expression-language"
    module: str = "cel"

    def compile(self, text: str) -> Callable[[Mapping[str, Any]], Any]:
        """A function of the variables."""
        import cel

        program = cel.compile(text)
        return lambda variables: program.execute(dict(variables))

    def position(self, error: Exception) -> bool:
        """Whether the message has line and column."""
        return "<input>:1:" in str(error)

    def identifiers(self) -> str:
        """How one learns which variables an expression uses."""
        return "names (Program.variables), no positions"


@dataclass(frozen=True)
class PythonCel:
    """`cel-python`."""

    package: str = "cel-python"
    module: str = "celpy"

    def compile(self, text: str) -> Callable[[Mapping[str, Any]], Any]:
        """A function of the variables."""
        import celpy
        from celpy.adapter import json_to_cel

        environment = _environment()
        program = environment.program(environment.compile(text))

        def run(variables: Mapping[str, Any]) -> Any:
            converted = {
                name: celpy.celtypes.TimestampType(value) if isinstance(value, datetime) else json_to_cel(value)
                for name, value in variables.items()
            }
            value = program.evaluate(converted)
            return bool(value) if isinstance(value, celpy.celtypes.BoolType) else value

        return run

    def position(self, error: Exception) -> bool:
        """Whether the exception has line and column."""
        return getattr(error, "column", None) is not None

    def identifiers(self) -> str:
        """How one learns which variables an expression uses."""
        return "syntax tree with positions"


_kept: list[Any] = []


def _environment() -> Any:
    if not _kept:
        import celpy

        _kept.append(celpy.Environment())
    return _kept[0]


def conformance(library: Library) -> list[str]:
    """The cases it gets wrong, as `expression: what it gave`."""
    wrong = []
    for text, wanted in CASES:
        try:
            given = library.compile(text)(SERIES)
        except Exception as exc:  # noqa: BLE001 - whatever a candidate raises is its answer
            given = REFUSED
            if wanted is not REFUSED:
                wrong.append(f"{text}: {type(exc).__name__}")
                continue
        if given is not wanted and given != wanted:
            wrong.append(f"{text}: {given!r}")
    return wrong


def positions(library: Library) -> int:
    """Syntax errors that say where."""
    found = 0
    for text in MISTAKES:
        try:
            library.compile(text)
        except Exception as exc:  # noqa: BLE001 - as above
            found += library.position(exc)
    return found


def microseconds(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Best mean of five rounds, so that a busy machine disturbs little."""
    count, best = 1, float("inf")
    while True:
        began = time.perf_counter()
        for _ in range(count):
            call()
        spent = time.perf_counter() - began
        if spent > seconds / 10:
            break
        count *= 2
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - began) / count)
    return best * 1e6


def import_ms(module: str) -> float:
    """Best of three imports in fresh processes."""
    code = f"import time; t = time.perf_counter(); import {module}; print((time.perf_counter() - t) * 1e3)"
    return min(float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3))


def measure(library: Library) -> dict[str, Any]:
    """Everything about one candidate."""
    wrong = conformance(library)
    speed = {}
    for name, text in (
        ("list", 'Modality in ["CR", "DX"]'),
        ("and", 'Modality == "DX" && Rows > 100 && SeriesDescription.contains("THIN")'),
        ("exists", 'values.ViewPosition.exists(v, v == "PA")'),
        ("matches", 'SeriesDescription.matches("(?i)thin")'),
    ):
        needed = {key: value for key, value in SERIES.items() if key in text}
        run = library.compile(text)
        speed[f"evaluate {name} (us)"] = round(microseconds(partial(run, needed)), 1)
        speed[f"compile {name} (us)"] = round(microseconds(partial(library.compile, text)), 1)
    hostile = library.compile('SeriesDescription.matches("^(a|a)*(a+)+$")')
    began = time.perf_counter()
    hostile({"SeriesDescription": "a" * 4000 + "b"})
    hostile_ms = round((time.perf_counter() - began) * 1e3, 1)
    return {
        "version": version(library.package),
        "licence": metadata(library.package).json.get("license_expression", "see its licence file"),
        "direct dependencies": len([r for r in requires(library.package) or [] if "extra ==" not in r]),
        "import (ms)": round(import_ms(library.module)),
        "cases right": f"{len(CASES) - len(wrong)} of {len(CASES)}",
        "errors with position": f"{positions(library)} of {len(MISTAKES)}",
        "identifiers": library.identifiers(),
        **speed,
        "hostile pattern (ms)": hostile_ms,
        "wrong": wrong,
    }


def main() -> None:
    """Print one column for each library."""
    libraries: list[Library] = [RustCel(), PythonCel()]
    measured = {}
    for library in libraries:
        if importlib.util.find_spec(library.module) is None:
            print(f"{library.package} is not installed: left out")
        else:
            measured[library.package] = measure(library)
    rows = list(next(iter(measured.values())))
    width = max(map(len, rows)) + 2
    print(" " * width + "".join(f"{name:>42}" for name in measured))
    for row in rows:
        if row != "wrong":
            print(f"{row:<{width}}" + "".join(f"{m[row]!s:>42}" for m in measured.values()))
    for name, m in measured.items():
        print(f"\n{name} gets wrong:")
        print("\n".join(f"  {line}" for line in m["wrong"]) or "  nothing")
    print("\n" + json.dumps(measured))


if __name__ == "__main__":
    main()
