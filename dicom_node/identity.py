"""UIDs that follow from what they name: the same thing has the same one anywhere, another thing another (PS3.5 B.2)."""

from __future__ import annotations

import hashlib

__all__ = ["IMPLEMENTATION_CLASS_UID", "IMPLEMENTATION_VERSION_NAME", "device_uid", "digest_uid"]

# 2.25 + a UUID made once for this project (PS3.5 B.2): names the implementation, not an installation.
IMPLEMENTATION_CLASS_UID = "2.25.154550770937338420444280497375213116566"
IMPLEMENTATION_VERSION_NAME = "DICOM_NODE_0_1"


def digest_uid(digest: bytes) -> str:
    """2.25 and a UUID as one decimal number; the UUID is a version 8 (custom) one over a digest of 16 bytes or more."""
    number = int.from_bytes(digest[:16], "big")
    number = number & ~(0xF << 76) | 0x8 << 76  # version
    number = number & ~(0x3 << 62) | 0x2 << 62  # variant of RFC 9562
    return f"2.25.{number}"


def device_uid(*identity: str) -> str:
    """(0018,1002) of an algorithm that is told apart by the texts of `identity`."""
    digest = hashlib.sha256("\n".join(identity).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"
