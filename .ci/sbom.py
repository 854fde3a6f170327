"""What the node is made of, as a CycloneDX 1.5 bill of materials on standard output. Needs no network.

    python .ci/sbom.py > build/sbom.cdx.json

Every distribution that dicom-node and its extras need, by name, version, licence and package URL, and who needs whom.
What dicom-node itself needs stands in pyproject.toml; versions are those that are installed where this runs.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from datetime import UTC, datetime
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("codecs", "onnx")  # what an installation in a hospital has; tests are not part of it


def bill(extras: tuple[str, ...] = EXTRAS) -> dict[str, object]:
    """The document."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    known: dict[str, tuple[Distribution, set[str]]] = {}
    needed = {name for text in wanted if (name := _gather(Requirement(text), known)) is not None}
    root = f"pkg:pypi/{project['name']}@{project['version']}"
    reference = {name: _purl(found) for name, (found, _) in known.items()}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {
                **{"type": "application", "bom-ref": root, "purl": root},
                **{"name": project["name"], "version": project["version"]},
            },
        },
        "components": [_component(found) for _, (found, _) in sorted(known.items())],
        "dependencies": [
            {"ref": root, "dependsOn": sorted(reference[name] for name in needed)},
            *(
                {"ref": reference[name], "dependsOn": sorted(reference[one] for one in others)}
                for name, (_, others) in sorted(known.items())
            ),
        ],
    }


def _gather(wanted: Requirement, known: dict[str, tuple[Distribution, set[str]]]) -> str | None:
    """Its name when it is installed here; it and what it needs are in `known` then, each once."""
    name = _plain(wanted.name)
    if name == "dicom-node":  # an extra that names other extras of its own
        return None
    try:
        found = distribution(name)
    except PackageNotFoundError:  # of another platform, or an extra that is not installed
        return None
    is_new = name not in known
    others = known.setdefault(name, (found, set()))[1]
    if is_new or wanted.extras:
        for text in found.requires or ():
            one = Requirement(text)
            asked = [{"extra": extra} for extra in ("", *wanted.extras)]
            if one.marker is None or any(one.marker.evaluate(environment) for environment in asked):
                other = _gather(one, known)
                others |= {other} - {None}
    return name


def _component(found: Distribution) -> dict[str, object]:
    told = found.metadata
    licence = told.get("License-Expression") or (told.get("License") or "").split("\n")[0].strip()
    component: dict[str, object] = {
        "type": "library",
        "bom-ref": _purl(found),
        "name": told["Name"],
        "version": found.version,
        "purl": _purl(found),
    }
    if licence:
        component["licenses"] = [{"license": {"name": licence[:200]}}]
    return component


def _purl(found: Distribution) -> str:
    return f"pkg:pypi/{_plain(found.metadata['Name'])}@{found.version}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    json.dump(bill(), sys.stdout, indent=2)
    sys.stdout.write("\n")
