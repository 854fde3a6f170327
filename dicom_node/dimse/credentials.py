"""As which user the node comes to an AE that it calls: User Identity Negotiation as requestor (PS3.7 D.3.3.7.1)."""

from __future__ import annotations

import os

from dicom_node.config import is_loopback
from dicom_node.dimse.upper_layer.pdus import UserIdentity
from dicom_node.errors import ConfigError, DeliveryUnavailable
from dicom_node.model import Destination, UserCredentials
from dicom_node.private_files import read_private

__all__ = ["identity_of"]

MAX_SECRET_BYTES = 32 * 1024
NAME, NAME_AND_PASSCODE, JWT = 1, 2, 5


def identity_of(destination: Destination) -> UserIdentity | None:
    """What the A-ASSOCIATE-RQ is to carry. Secrets are read now, and kept nowhere.

    Raises DeliveryUnavailable, with the remedy and without the secret: a secret that is mended is found by the next
    try. No secret goes to another machine in clear unless that is allowed.
    """
    user = destination.user
    if user is None:
        return None
    try:
        kind, secret = _secret(user)
    except ConfigError as exc:
        raise DeliveryUnavailable(f"destination {destination.name}: {exc}") from exc
    if kind != NAME and destination.tls is None and not (user.allow_plain or is_loopback(destination.host)):
        raise DeliveryUnavailable(
            f"destination {destination.name}: user: the secret would go to another machine in clear; use TLS, "
            "or set allow_plain: true where the network itself is safe"
        )
    if kind == JWT:
        return UserIdentity(kind=JWT, primary=secret)
    return UserIdentity(kind=kind, primary=user.name.encode(), secondary=secret)


def _secret(user: UserCredentials) -> tuple[int, bytes]:
    """Which kind of identity, and its secret. Raises ConfigError."""
    if user.jwt_file:
        return JWT, _file("user.jwt_file", user.jwt_file)
    if user.passcode_file:
        return NAME_AND_PASSCODE, _file("user.passcode_file", user.passcode_file)
    if not user.passcode_env:
        return NAME, b""
    passcode = os.environ.get(user.passcode_env, "")
    if not passcode:
        raise ConfigError(f"user.passcode_env: the variable {user.passcode_env} is not set; set it to the passcode")
    return NAME_AND_PASSCODE, passcode.encode()


def _file(where: str, path: str) -> bytes:
    content = read_private(where, path, MAX_SECRET_BYTES).rstrip(b"\r\n")
    if not content:
        raise ConfigError(f"{where}: {path} is empty; write the secret into it")
    return content
