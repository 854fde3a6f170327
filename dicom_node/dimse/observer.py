"""What the wire tells whoever counts: the contract between the DIMSE server and the metrics. Knows neither."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SilentObserver", "WireObserver"]


class WireObserver(Protocol):
    """Called from many threads; must be quick and raise nothing. No UID, name or free text is ever passed."""

    def association_ended(self, calling_ae_title: str, result: str) -> None:
        """An association that was established ended; `result`: released or aborted."""
        ...

    def association_rejected(self, reason: str) -> None:
        """`reason`: called_ae, calling_ae, address, certificate, tls, user, rate, protocol or limit."""
        ...

    def context_refused(self, kind: str) -> None:
        """`kind`: abstract_syntax, transfer_syntax, role or policy."""
        ...

    def request_answered(self, service: str, status: int, seconds: float) -> None:
        """`service`: echo, store, find, get, move, commit or commit_report; the final status."""
        ...


class SilentObserver:
    """Counts nothing."""

    def association_ended(self, calling_ae_title: str, result: str) -> None:
        """Nothing."""

    def association_rejected(self, reason: str) -> None:
        """Nothing."""

    def context_refused(self, kind: str) -> None:
        """Nothing."""

    def request_answered(self, service: str, status: int, seconds: float) -> None:
        """Nothing."""
