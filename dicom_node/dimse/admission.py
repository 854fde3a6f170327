"""Who may associate (README "Peers"; PS3.8 9.3.4). Pure: titles and addresses in, a verdict out."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from dicom_node.config import NodeConfig, PeerSettings
from dicom_node.errors import ConfigError

__all__ = ["Admission", "Rejection"]

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """An A-ASSOCIATE-RJ: result, source and reason as in PS3.8 table 9-21; `reason` is the word for the counter."""

    result: int
    source: int
    diagnostic: int
    reason: str


WRONG_CALLED = Rejection(result=1, source=1, diagnostic=7, reason="called_ae")
WRONG_CALLING = Rejection(result=1, source=1, diagnostic=3, reason="calling_ae")
WRONG_ADDRESS = Rejection(result=1, source=1, diagnostic=3, reason="address")
WRONG_CERTIFICATE = Rejection(result=1, source=1, diagnostic=3, reason="certificate")
WRONG_APPLICATION_CONTEXT = Rejection(result=1, source=1, diagnostic=2, reason="protocol")
TOO_MANY = Rejection(result=2, source=3, diagnostic=2, reason="limit")


class Admission:
    """The policy of one configuration. Raises ConfigError for a peer's host that is no address and no network."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._peers: dict[str, tuple[PeerSettings, Sequence[_Network]]] = {
            peer.ae_title: (peer, [_network(name, host) for host in peer.hosts]) for name, peer in config.peers.items()
        }

    def judge(
        self,
        *,
        calling: str,
        called: str,
        address: str,
        application_context: str,
        established: int,
        certificate: str = "",
    ) -> Rejection | None:
        """None when the association may be had; `established` is the number of those there are now.

        `certificate`: SHA-256 of the one the peer has shown and that was verified, '' for none.
        """
        if application_context != APPLICATION_CONTEXT:
            return WRONG_APPLICATION_CONTEXT
        if called not in self._config.ae_titles and not self._config.any_called_ae_title:
            return WRONG_CALLED
        if not calling or not (calling.isascii() and calling.isprintable()):  # PS3.5 table 6.2-1: AE
            return WRONG_CALLING
        if self._peers:
            peer = self._peers.get(calling)
            if peer is None:
                return WRONG_CALLING
            if peer[1] and not _within(address, peer[1]):
                return WRONG_ADDRESS
            if peer[0].certificates and certificate not in peer[0].certificates:
                return WRONG_CERTIFICATE
        return TOO_MANY if established >= self._config.max_associations else None

    def idle_timeout_s(self, calling: str) -> float:
        """How long an association of that peer may be silent."""
        peer = self._peers.get(calling)
        own = peer[0].idle_timeout_s if peer is not None else None
        return own if own is not None else self._config.association_idle_timeout_s


def _network(name: str, host: str) -> _Network:
    try:
        return ipaddress.ip_network(host, strict=False)
    except ValueError:
        raise ConfigError(
            f"peers.{name}.hosts: {host!r} is no address and no network; write e.g. '10.1.2.3' or '10.1.2.0/24'"
        ) from None


def _within(address: str, networks: Sequence[_Network]) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in network for network in networks)
