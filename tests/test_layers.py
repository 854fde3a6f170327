"""Import directions and owners, as DESIGN section 3 sets them, checked on the source with `ast`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dicom_node

PACKAGE = Path(dicom_node.__file__).parent
CORE = {
    *("errors", "model", "values", "interfaces", "clock", "config", "settings", "access_settings"),
    *("auditing", "audited", "addresses", "private_files", "retention"),
    *("logs", "metrics", "headers", "geometry", "pixels"),
    *("planes", "frames", "stored_values", "decoder", "decoder_link", "decoding"),
    *("apart", "breaker", "budget", "identity", "lifeline", "quiet", "memory_files", "nudge"),
    *("radiograph", "chest_gate", "anatomy", "anatomy_codes", "transcode", "plugins", "digests"),
    *("shapes", "structure", "texts"),
}
# the composition root: may import anything
ROOT = {
    *("cli", "commands", "engine_commands", "aiaa_commands", "model_commands", "user_commands", "transfers", "screen"),
    *("supervisor", "process", "pulse", "places", "bells", "node", "receiver", "service", "worker", "wiring"),
    *("watching", "deciding", "gauges", "backpressure", "handing_out", "operations", "doctor", "doctor_checks"),
    *("trails", "audit_commands", "doctor_audit", "doctor_http", "doctor_retention", "retaining"),
    *("recovery", "starting"),
}
FOLDERS: dict[str, set[str]] = {
    "services": set(),
    "dimse": {"services"},
    "store": set(),
    "routing": set(),
    "pipeline": {"routing"},
    "models": set(),
    "engines": set(),
    "results": set(),
    "http": set(),
    "audit": set(),
    "demo": {
        "services",
        "dimse",
        "store",
        "routing",
        "pipeline",
        "models",
        "engines",
        "results",
        "http",
        "audit",
        *ROOT,
    },
}
OWNERS: dict[str, tuple[str, ...]] = {
    "pynetdicom": ("dimse/pynetdicom_*.py",),
    "sqlite3": ("store/*.py",),
    "sqlite_utils": ("store/*.py",),
    "torch": ("models/*.py", "models/loaders/*.py", "demo/train.py", "demo/measure.py"),
    "monai": ("models/*.py", "models/loaders/*.py", "demo/train.py", "demo/measure.py"),
    "highdicom": ("results/*.py",),
    "apscheduler": ("node.py",),
    "prometheus_client": ("metrics.py",),
    "jwt": ("dimse/tokens.py",),
    "cryptography": ("dimse/tokens.py",),
    "httpx2": ("engines/_http.py", "engines/_exchange.py", "engines/_wire.py"),
    "httpcore2": ("engines/_wire.py",),
    "google_crc32c": ("engines/_downloads.py",),
    "nibabel": ("engines/nifti.py",),
    "PIL": ("engines/_class_map.py", "engines/_leapai_pictures.py", "demo/pictures.py"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything the file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _part(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def _violations(file: Path, package: Path) -> list[str]:
    relative = file.relative_to(package)
    part = _part(relative.parts)
    found = []
    for line, name in _imports(file):
        words = name.split(".")
        if words[0] in OWNERS and not any(relative.match(pattern) for pattern in OWNERS[words[0]]):
            found.append(f"{relative}:{line}: only {OWNERS[words[0]]} may import {words[0]}")
        if words[0] != "dicom_node" or len(words) == 1 or part in ROOT or part == "__init__":
            continue
        target = words[1]
        allowed = CORE if part in CORE else CORE | {part} | FOLDERS[part]
        if target not in allowed and not target.startswith("__"):
            found.append(f"{relative}:{line}: {part} may not import {target}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_import_goes_in_the_allowed_direction(file: Path) -> None:
    assert _violations(file, PACKAGE) == []


def test_every_file_belongs_to_a_known_part() -> None:
    assert {_part(file.relative_to(PACKAGE).parts) for file in FILES} <= CORE | ROOT | set(FOLDERS) | {"__init__"}


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("pipeline/work.py", "from dicom_node.store.catalog import open_catalog"),
        ("pipeline/work.py", "def f():\n    import torch"),
        ("store/sqlite.py", "import dicom_node.dimse.query"),
        ("headers.py", "from dicom_node import routing"),
        ("http/health.py", "from prometheus_client import Counter"),
        ("dimse/upper_layer.py", "from pynetdicom import AE"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path: Path, where: str, source: str) -> None:
    file = tmp_path / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    assert len(_violations(file, tmp_path)) == 1


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("cli", "torch monai pynetdicom highdicom pydicom numpy apscheduler prometheus_client cel sqlite_utils"),
        ("supervisor", "torch monai pynetdicom highdicom pydicom numpy apscheduler cel sqlite_utils"),
        ("starting", "torch monai pynetdicom highdicom apscheduler cel"),  # receivers wait until it has recovered
        ("receiver", "torch monai highdicom apscheduler cel sqlite_utils yaml"),
        ("worker", "torch monai highdicom apscheduler cel sqlite_utils yaml"),
        ("service", "torch monai highdicom sqlite_utils rich typer prompt_toolkit"),
    ],
)
def test_what_is_slow_to_load_is_loaded_only_where_it_is_needed(module: str, heavy: str) -> None:
    code = f"import sys, dicom_node.{module}; print([m for m in {heavy.split()!r} if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_the_expression_library_is_itself_again_once_loaded() -> None:
    code = (
        "from dicom_node.routing.cel_library import cel; assert cel.evaluate('1 + 1') == 2\n"
        "import cel as named, cel.cli; assert named is cel and cel.cli.__file__"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
