"""Which version of an installed model runs: enable, disable, remove. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from dicom_node.errors import PackageError
from dicom_node.models.library import Library, ModelState
from dicom_node.models.registry import embedded_ids, embedded_package, split_name

__all__ = ["disable_model", "enable_model", "remove_model"]


def enable_model(library: Library, model: str) -> str:
    """Let `ID` run, or make `ID@VERSION` what ID means from the next job on; the version that is enabled now.

    Raises PackageError: not installed, no version said where there are several, or its files are not the imported ones.
    """
    name, version = _named(model)
    with library.locked():
        known = library.state().of(name)
        if name in embedded_ids():
            only = embedded_package(name).manifest.version
            if version not in ("", only):
                raise PackageError(f"the embedded model {name!r} is version {only}, not {version!r}")
            library.decide(name, ModelState())
            return only
        version = version or known.enabled or _lone_version(library, name)
        library.load(name, version).check_weights()
        library.decide(name, ModelState(enabled=version))
    return version


def disable_model(library: Library, model: str) -> None:
    """Keep every version of `ID` from running, from the next job on. Raises PackageError when there is none."""
    name, version = _named(model)
    if version:
        raise PackageError(f"{model!r}: a model is disabled as a whole; write 'dicom-node models disable {name}'")
    with library.locked():
        if name not in embedded_ids():
            _require_installed(library, name)
        library.decide(name, library.state().of(name).model_copy(update={"disabled": True}))


def remove_model(library: Library, model: str, *, engines: Mapping[str, str], force: bool = False) -> tuple[str, ...]:
    """Delete `ID@VERSION`, or every version of `ID`; the versions that are gone.

    `engines`: what each configured local engine names as its model. Raises PackageError, having removed nothing, when
    one of them means a version that would go, or it is the enabled one and not disabled (but with `force`); and, for a
    version a job is running on, when the job does not end soon.
    """
    name, version = _named(model)
    if name in embedded_ids():
        raise PackageError(f"{name!r} ships with the node; 'dicom-node models disable {name}' keeps it from running")
    with library.locked(), ExitStack() as reserved:
        installed = _require_installed(library, name)
        if version not in ("", *installed):
            raise PackageError(f"{model} is not installed (installed versions of {name}: {', '.join(installed)})")
        going = (version,) if version else installed
        known = library.state().of(name)
        for one in going:
            _require_unused(name, one, known, engines, force)
            reserved.enter_context(library.reserved(name, one))
        if set(going) == set(installed):
            library.decide(name, ModelState())
        elif known.enabled in going:
            library.decide(name, ModelState(disabled=known.disabled))
        for one in going:
            library.remove(name, one)
    return going


def _require_unused(name: str, version: str, known: ModelState, engines: Mapping[str, str], force: bool) -> None:
    for engine, model in engines.items():
        wanted, wanted_version = split_name(model)
        if wanted == name and (wanted_version or known.enabled) == version:
            raise PackageError(
                f"{name}@{version} is what engines.{engine}.model ({model!r}) means; "
                "change that, or enable another version, first"
            )
    if known.enabled == version and not known.disabled and not force:
        raise PackageError(
            f"{name}@{version} is enabled; 'dicom-node models disable {name}' or enable another version first, "
            "or say --force"
        )


def _named(model: str) -> tuple[str, str]:
    name, version = split_name(model)
    if not name:
        raise PackageError(f"{model!r} is no model; expected ID or ID@VERSION, see 'dicom-node models list'")
    return name, version


def _require_installed(library: Library, name: str) -> tuple[str, ...]:
    installed = library.versions(name)
    if not installed:
        known = ", ".join(library.ids()) or "none"
        raise PackageError(f"no model {name!r} is installed (installed: {known})")
    return installed


def _lone_version(library: Library, name: str) -> str:
    installed = _require_installed(library, name)
    if len(installed) > 1:
        raise PackageError(f"{name} has versions {', '.join(installed)}; write {name}@VERSION")
    return installed[0]
