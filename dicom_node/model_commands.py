# ruff: noqa: T201 - what commands say goes to standard output
"""`dicom-node models ...`: what is installed, what a package is, install, enable, remove. No catalog is opened."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from dicom_node.commands import FAILED, OK, offline, table
from dicom_node.config import NodeConfig
from dicom_node.errors import NodeError, PackageError
from dicom_node.models.library import Library
from dicom_node.wiring import engines, kept_in, models_dir, put_away

_WIDTH = 110
_HEADING = 14


def models_list(arguments: argparse.Namespace) -> int:
    """Every embedded and installed version, and what engines run from elsewhere."""
    from dicom_node.models.report import HEADINGS, listed_models

    config = offline(arguments)
    rows = listed_models(models_dir(config), _models_of(config))
    table(HEADINGS, rows, "no models")
    for name, engine in config.engines.items():
        if engine.kind != "local":
            print(f"engine {name} is of kind {engine.kind}")
    return OK


def models_check(arguments: argparse.Namespace) -> int:
    """Whether the engines could run; of a package, what it is and how its self-test ended."""
    config = offline(arguments)
    if arguments.name and arguments.name not in config.engines:
        from dicom_node.models.report import package_report

        if arguments.write:
            from dicom_node.models.importing import write_manifest

            print(f"wrote {write_manifest(Path(arguments.name))}; it is read from now on")
        device, run = arguments.device or config.jobs.devices[0], not arguments.no_self_test
        for heading, text in package_report(
            arguments.name, device, models_dir(config), run=run, trusted_code=_trusted_code(arguments, config)
        ):
            lines = textwrap.wrap(text, _WIDTH - _HEADING) or [""]
            print(f"{heading + ':':<{_HEADING}}{lines[0]}")
            for line in lines[1:]:
                print(" " * _HEADING + line)
        return OK
    wrong = 0
    for name, engine in engines(config, arguments.name).items():
        try:
            with kept_in(name, "check"):
                engine.check()
            print(f"{name}: can run")
        except NodeError as exc:
            wrong += 1
            print(f"dicom-node: {name}: {exc}", file=sys.stderr)
        finally:
            put_away(name, engine)
    return FAILED if wrong else OK


def models_import(arguments: argparse.Namespace) -> int:
    """Install a package, its network having run first."""
    from dicom_node.models.importing import import_package
    from dicom_node.models.package import ModelPackage
    from dicom_node.models.report import self_test

    config = offline(arguments)

    def tested(package: ModelPackage) -> None:
        self_test(
            package, arguments.device or config.jobs.devices[0], _trusted_code(arguments, config), models_dir(config)
        )

    imported = import_package(
        Library(models_dir(config)),
        Path(arguments.path),
        self_test=None if arguments.no_self_test else tested,
        enable=arguments.enable,
        sha256=arguments.sha256,
    )
    manifest = imported.package.manifest
    name = f"{manifest.id}@{manifest.version}"
    print(f"{name}: {'installed' if imported.new else 'was installed already, with the same content'}")
    for note in imported.pin.notes:
        print(f"note: {note}")
    if imported.enabled:
        print(f"it is enabled: an engine with 'model: {manifest.id}' runs it")
    else:
        print(f"another version is enabled; 'dicom-node models enable {name}' makes the switch")
    return OK


def models_remove(arguments: argparse.Namespace) -> int:
    """Delete a version, or all of a model."""
    from dicom_node.models.enabling import remove_model

    config = offline(arguments)
    library = _library(config)
    for version in remove_model(library, arguments.model, engines=_models_of(config), force=arguments.force):
        print(f"{arguments.model.partition('@')[0]}@{version}: removed")
    return OK


def models_enable(arguments: argparse.Namespace) -> int:
    """Let a model run, or switch to another version of it."""
    from dicom_node.models.enabling import enable_model

    library, name = Library(models_dir(offline(arguments))), arguments.model.partition("@")[0]
    version = enable_model(library, arguments.model)
    print(f"{name}@{version}: enabled, from the next job on")
    if version in library.versions(name) and library.pin(name, version).self_test == "not run":
        print(f"its network was not run at its import; 'dicom-node models check {name}' does that")
    return OK


def models_disable(arguments: argparse.Namespace) -> int:
    """Keep a model from running."""
    from dicom_node.models.enabling import disable_model

    disable_model(Library(models_dir(offline(arguments))), arguments.model)
    print(f"{arguments.model}: disabled, from the next job on")
    return OK


def _trusted_code(arguments: argparse.Namespace, config: NodeConfig) -> tuple[str, ...]:
    """Only of a file that was named: the one in the working folder may have come with the package."""
    return config.jobs.trusted_code if arguments.config else ()


def _library(config: NodeConfig) -> Library:
    folder = models_dir(config)
    if not folder.is_dir():
        raise PackageError(f"{folder}: no model was installed there; name the node's folder with --data-dir")
    return Library(folder)


def _models_of(config: NodeConfig) -> Mapping[str, str]:
    """What each local engine names as its model."""
    return {name: engine.model for name, engine in config.engines.items() if engine.kind == "local"}
