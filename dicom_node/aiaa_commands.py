# ruff: noqa: T201 - what commands say goes to standard output
"""`dicom-node engines aiaa-model get | put | patch | delete`: the models of a configured AIAA server.

These are the server's own admin calls, made from this machine at once; nothing is written to the catalog.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dicom_node.commands import OK, offline
from dicom_node.errors import ConfigError

if TYPE_CHECKING:
    from dicom_node.engines.aiaa import AiaaEngine

__all__ = ["engines_aiaa_model"]


def engines_aiaa_model(arguments: argparse.Namespace) -> int:
    """Do what was asked. Raises ConfigError, NotFound and what the server made of it."""
    from dicom_node.wiring import engines

    config = offline(arguments)
    engine = engines(config, arguments.name)[arguments.name]
    try:
        if config.engines[arguments.name].kind != "aiaa":
            raise ConfigError(f"engines.{arguments.name}: is of kind {config.engines[arguments.name].kind}, not aiaa")
        return _done(engine, arguments.model or config.engines[arguments.name].model, arguments)  # type: ignore[arg-type]
    finally:
        engine.close()


def _done(engine: AiaaEngine, model: str, arguments: argparse.Namespace) -> int:
    if arguments.verb == "get":
        print(json.dumps(engine.model_config(model), indent=2, ensure_ascii=False))
        return OK
    if arguments.verb == "delete":
        if not (arguments.yes or _agreed(f"Take model {model} off the server of engine {arguments.name}?")):
            print(f"model {model} stays")
            return OK
        engine.unload_model(model)
        print(f"model {model} is off the server")
        return OK
    if arguments.model_config is None:
        raise ConfigError(f"--model-config: missing; {arguments.verb} needs the model's config_aiaa.json")
    if arguments.verb == "patch":
        if arguments.model_data is not None:
            raise ConfigError("--model-data: patch changes the configuration only; use put")
        engine.reload_model(model, Path(arguments.model_config))
        print(f"model {model} is loaded with the new configuration")
        return OK
    data = None if arguments.model_data is None else Path(arguments.model_data)
    engine.load_model(model, Path(arguments.model_config), data)
    print(f"model {model} is loaded")
    return OK


def _agreed(question: str) -> bool:
    """Raises ConfigError when there is nobody to ask."""
    if not sys.stdin.isatty():
        raise ConfigError("delete: nobody is there to be asked; say --yes")
    print(f"{question} Its jobs will wait. [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
