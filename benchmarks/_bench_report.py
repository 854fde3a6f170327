"""What `peers.py` found, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log10
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["Figure", "Report"]

OURS, OTHER = "ours", "Orthanc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. `target`: our value over Orthanc's, at least (or, `less_is_better`, at most)."""

    name: str
    unit: str
    target: float | None = None
    less_is_better: bool = False
    note: str = ""


@dataclass
class Report:
    """Samples by figure and system, one for each round, and what was not as it should be."""

    samples: dict[Figure, dict[str, list[float]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add(self, figure: Figure, system: str, value: float) -> None:
        """One measurement."""
        self.samples.setdefault(figure, {}).setdefault(system, []).append(value)

    def ratios(self, figure: Figure) -> tuple[float, float, float] | None:
        """Of the medians; and the lowest and the highest of one round."""
        found = self.samples[figure]
        ours, other = found.get(OURS, []), found.get(OTHER, [])
        if not ours or not other or not all(other):
            return None
        each = [mine / theirs for mine, theirs in zip(ours, other, strict=False)]
        return statistics.median(ours) / statistics.median(other), min(each), max(each)

    def table(self) -> str:
        """Medians with [lowest-highest], ratios of medians with those of single rounds."""
        lines = [f"{'':47}{OURS:>27}{OTHER:>27}   {'ratio':<24}target"]
        for figure in self.samples:
            cells = "".join(f"{_spread(self.samples[figure].get(name, [])):>27}" for name in (OURS, OTHER))
            title = f"{figure.name}, {figure.unit}"
            lines.append(f"{title:47}{cells}   {self._ratio(figure):<24}{_target(figure)}")
        return "\n".join(lines + [f"NOT AS IT SHOULD BE: {fault}" for fault in self.faults])

    def _ratio(self, figure: Figure) -> str:
        ratios = self.ratios(figure)
        if ratios is None:
            return "-"
        middle, low, high = ratios
        return f"{_number(middle)}x [{_number(low)}-{_number(high)}]"

    def write_json(self, path: Path, facts: Mapping[str, object]) -> None:
        """Every sample."""
        figures = [
            {
                "name": figure.name,
                "unit": figure.unit,
                "target": figure.target,
                "less_is_better": figure.less_is_better,
                "samples": self.samples[figure],
                "ratio": self.ratios(figure),
            }
            for figure in self.samples
        ]
        content = {"facts": dict(facts), "figures": figures, "faults": self.faults}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def write_plot(self, path: Path, caption: str) -> None:
        """An SVG: a bar for each ratio on a logarithmic scale, its spread, and a mark where the target is."""
        rows = [(figure, ratios) for figure in self.samples if (ratios := self.ratios(figure)) is not None]
        path.write_text(_picture(rows, caption), encoding="utf-8")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{_number(statistics.median(values))} [{_number(min(values))}-{_number(max(values))}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _target(figure: Figure) -> str:
    if figure.target is None:
        return figure.note
    return f"{'<=' if figure.less_is_better else '>='} {figure.target:g}x {figure.note}".rstrip()


# --- the picture -----------------------------------------------------------------------------------------------------

_LEFT, _WIDTH, _ROW, _TOP = 330, 560, 24, 64
_LOWEST, _HIGHEST = 0.1, 100.0


def _x(ratio: float) -> float:
    held = min(max(ratio, _LOWEST), _HIGHEST)
    return _LEFT + _WIDTH * log10(held / _LOWEST) / log10(_HIGHEST / _LOWEST)


def _picture(rows: Iterable[tuple[Figure, tuple[float, float, float]]], caption: str) -> str:
    rows = list(rows)
    bottom = _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 110}" height="{bottom + 40}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="12" y="22" font-size="15">dicom-node over Orthanc, same run (logarithmic; green meets its target)'
        f'</text><text x="12" y="42" fill="#555">{escape(caption)}</text>',
    ]
    for mark in (0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100):
        x, colour = _x(mark), "#444" if mark == 1 else "#ddd"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{bottom}" stroke="{colour}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{mark:g}x</text>')
    for number, (figure, ratios) in enumerate(rows):
        parts += _bar(figure, ratios, _TOP + _ROW * number)
    return "\n".join([*parts, "</svg>", ""])


def _bar(figure: Figure, ratios: tuple[float, float, float], y: float) -> list[str]:
    middle, low, high = ratios
    met = figure.target is None or (middle <= figure.target if figure.less_is_better else middle >= figure.target)
    left, right = sorted((_x(1), _x(middle)))
    colour = "#8a8a8a" if figure.target is None else "#3a8f5c" if met else "#c0504d"
    parts = [
        f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(figure.name)}</text>',
        f'<rect x="{left:.1f}" y="{y + 4}" width="{max(right - left, 1):.1f}" height="13" fill="{colour}"/>',
        f'<line x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{y + 10.5}" y2="{y + 10.5}" stroke="black"/>',
        f'<text x="{max(_x(high), right) + 8:.1f}" y="{y + 14}">{_number(middle)}x</text>',
    ]
    if figure.target is not None:
        x = _x(figure.target)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 1}" y2="{y + 20}" stroke="#1f4e9c" stroke-width="2.5"/>'
        )
    return parts
