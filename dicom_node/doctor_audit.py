"""What `dicom-node doctor` looks at of the audit trail. Part of the composition root."""

from __future__ import annotations

from collections.abc import Iterator

from dicom_node.audit.chain import file_names
from dicom_node.audit.verify import read_anchor, verify
from dicom_node.config import NodeConfig, is_loopback
from dicom_node.doctor import Finding, State
from dicom_node.trails import anchor_path, collector, trail_folder

__all__ = ["audit_trail", "collector_of"]


def audit_trail(config: NodeConfig) -> Iterator[Finding]:
    """Whether one is kept, and is what was written. Raises OSError."""
    if config.audit is None:
        if not is_loopback(config.host):
            yield Finding(
                what="audit trail",
                state=State.NOTE,
                text="none is kept",
                remedy="set `audit:` (README, Keep an audit trail)",
            )
        return
    folder, anchor = trail_folder(config), read_anchor(anchor_path(config))
    if not folder.is_dir() and anchor is None:
        yield Finding(what="audit trail", state=State.OK, text=f"{folder} is made at the first start")
        return
    names = file_names(folder) if folder.is_dir() else []
    size = sum((folder / name).stat().st_size for name in names)
    if len(names) > 4:
        yield Finding(
            what="audit trail",
            state=State.OK,
            text=f"{len(names)} files, {size >> 20} MiB; `dicom-node audit verify` reads all of them",
        )
        return
    report = verify(folder, [anchor] if anchor is not None else [])
    for fault in report.faults:
        yield Finding(
            what="audit trail",
            state=State.WRONG,
            text=str(fault),
            remedy="copy the folder as it is, then ask who could write there",
        )
    if not report.faults:
        yield Finding(
            what="audit trail", state=State.OK, text=f"{report.lines} lines in {report.files} files, none changed"
        )


def collector_of(config: NodeConfig, name: str) -> Iterator[Finding]:
    """Whether it takes a connection. Raises OSError, ConfigError."""
    assert config.audit is not None
    one = config.audit.collectors[name]
    connection = collector(config, config.audit, name)()
    try:
        connection.check()
    finally:
        connection.close()
    says = "takes connections" if one.protocol == "tls" else "UDP: nobody says whether it listens"
    yield Finding(what=f"audit collector {name}", state=State.OK, text=f"{one.host}:{one.effective_port()} {says}")
