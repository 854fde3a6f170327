"""Addresses of those who call."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

__all__ = ["whose"]


@lru_cache(maxsize=1024)
def whose(address: str) -> str:
    """What all addresses have in common that one machine may come from: IPv4 the address, IPv6 its /64 (RFC 6177).

    What is counted or bounded for each address is so for each of these: else one machine were as many as it likes.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.IPv6Network((parsed, 64), strict=False))
