"""Whether a package may run here: code of its own only when its digest is in the node's settings (trust `code`)."""

from __future__ import annotations

from collections.abc import Collection

from dicom_node.errors import PackageError
from dicom_node.models.package import ModelPackage
from dicom_node.models.source import PythonSource

__all__ = ["require_trusted"]


def require_trusted(package: ModelPackage, trusted_code: Collection[str]) -> None:
    """Raise PackageError when the package runs Python whose SHA-256 is not in `trusted_code`.

    The digest is the manifest's; the runtime process compares it with the bytes it runs.
    """
    source = package.manifest.source
    if not isinstance(source, PythonSource) or source.code.sha256 in trusted_code:
        return
    raise PackageError(
        f"trust: {package.manifest.id} {package.manifest.version} runs Python of its own ({source.code.path}), and "
        f"its sha256 is not in jobs.trusted_code; read that file, then add {source.code.sha256} to trust exactly "
        "it (and name the settings with --config)"
    )
