"""What each peer may do: the settings, resolved and checked. Pure: no socket, no association."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from pydicom._uid_dict import UID_dictionary

from dicom_node.config import NodeConfig, PeerSettings
from dicom_node.dimse.contexts import STORAGE_SOP_CLASSES
from dicom_node.dimse.rates import Moment, Rates, moments
from dicom_node.errors import ConfigError

__all__ = ["EVERYDAY_SERVICES", "Policies", "Policy"]

EVERYDAY_SERVICES = frozenset({"echo", "store", "find", "get", "move"})
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What one peer may do. `number` is its place among the peers, -1 where there are none.

    `move_destinations` are AE titles. None stands for no bound.
    """

    number: int = -1
    name: str = ""
    services: frozenset[str] = EVERYDAY_SERVICES
    sop_classes: frozenset[str] | None = None
    move_destinations: frozenset[str] | None = None
    max_associations: int | None = None
    idle_timeout_s: float = 60.0
    certificates: frozenset[str] = frozenset()
    identity: Literal["off", "optional", "required"] = "off"
    users: frozenset[str] = field(default=frozenset(), repr=False)
    rates: Rates | None = None

    @property
    def is_open(self) -> bool:
        """Whether no request has to be looked at: nothing is forbidden, nothing counted."""
        everything = self.services >= EVERYDAY_SERVICES
        bounds = (self.sop_classes, self.move_destinations, self.rates)
        return everything and all(bound is None for bound in bounds)


class Policies:
    """The policies of one configuration. Raises ConfigError for hosts and SOP classes that cannot be understood.

    `paid`: see `serving.Neighbours.paid`.
    """

    def __init__(self, config: NodeConfig, paid: Callable[[int], Sequence[Moment]] = lambda number: moments()) -> None:
        mode = config.user_identity.mode if config.user_identity is not None else "off"
        self._everybody = Policy(idle_timeout_s=config.association_idle_timeout_s, identity=mode)
        self._peers: dict[str, list[tuple[Sequence[_Network], Policy]]] = {}
        for number, (name, peer) in enumerate(config.peers.items()):
            networks = [_network(name, host) for host in peer.hosts]
            known = self._peers.setdefault(peer.ae_title, [])
            for others, other in known:
                if both := sorted(set(map(str, networks)) & set(map(str, others))):
                    raise ConfigError(
                        f"peers.{name}.hosts: {both[0]} is given to {other.name!r} too, which has the same AE title; "
                        "name it once (of networks within each other the smaller one counts)"
                    )
            rates = Rates(peer.rate, paid=paid(number)) if peer.rate.is_set else None
            known.append((networks, _policy(config, number, name, peer, rates)))

    def of(self, calling: str, address: str) -> tuple[Policy | None, bool]:
        """The peer's, and whether its AE title is known at all. Without peers everybody has the same.

        AE titles are compared as they are, without the blanks around them (PS3.5 table 6.2-1). Of peers with one title
        that whose network is the smallest around the address counts.
        """
        if not self._peers:
            return self._everybody, True
        known = self._peers.get(calling)
        if known is None:
            return None, False
        if len(known) == 1 and not known[0][0]:
            return known[0][1], True
        here, best = _parsed(address), -1
        found: Policy | None = None
        for networks, policy in known:
            for network in networks:
                if here in network and network.prefixlen > best:
                    found, best = policy, network.prefixlen
        return found, True


@lru_cache(maxsize=1024)
def _parsed(address: str) -> _Address:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _network(name: str, host: str) -> _Network:
    try:
        return ipaddress.ip_network(host, strict=False)
    except ValueError:
        raise ConfigError(
            f"peers.{name}.hosts: {host!r} is no address and no network; write e.g. '10.1.2.3' or '10.1.2.0/24'"
        ) from None


def _policy(config: NodeConfig, number: int, name: str, peer: PeerSettings, rates: Rates | None) -> Policy:
    services = EVERYDAY_SERVICES if peer.services is None else frozenset(peer.services)
    moves = peer.move_destinations
    mode = config.user_identity.mode if config.user_identity is not None else "off"
    own_idle = peer.idle_timeout_s
    return Policy(
        number=number,
        name=name,
        services=services,
        sop_classes=frozenset(_sop_class(config, name, one) for one in peer.sop_classes) or None,
        move_destinations=None if moves is None else frozenset(config.destinations[one].ae_title for one in moves),
        max_associations=peer.max_associations,
        idle_timeout_s=config.association_idle_timeout_s if own_idle is None else own_idle,
        certificates=frozenset(peer.certificates),
        identity=peer.user_identity or mode,
        users=frozenset(peer.users),
        rates=rates,
    )


@lru_cache(maxsize=1)
def _uids() -> Mapping[str, str]:
    """UIDs of the storage SOP classes by keyword."""
    return {UID_dictionary[uid][4]: uid for uid in STORAGE_SOP_CLASSES if uid in UID_dictionary}


def _sop_class(config: NodeConfig, peer: str, given: str) -> str:
    uid = _uids().get(given, given)
    if uid in STORAGE_SOP_CLASSES or uid in config.extra_sop_classes:
        return uid
    if config.unknown_sop_classes and uid not in UID_dictionary and uid.replace(".", "").isdigit():
        return uid
    raise ConfigError(
        f"peers.{peer}.sop_classes: {given!r} is no storage SOP class that the node takes; write its UID or keyword, "
        "e.g. CTImageStorage, and list UIDs the Standard does not know under extra_sop_classes too"
    )
