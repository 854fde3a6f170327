"""The part of the configuration that says who users are, and what one association may ask of the node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dicom_node.settings import Seconds, Settings

__all__ = ["BoundSettings", "JwtSettings", "UserIdentitySettings"]

JwtAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class JwtSettings(Settings):
    """How JSON Web Tokens are verified (RFC 7519, RFC 8725)."""

    algorithms: Annotated[tuple[JwtAlgorithm, ...], Field(min_length=1)]
    """Signatures that are taken, whatever a token says of itself; only such with a public key."""
    issuer: Annotated[str, Field(min_length=1)]
    audience: Annotated[str, Field(min_length=1)]
    key: Path
    """The issuer's public key (PEM), or its key set (JWKS, a file that ends in .json). Taken in when it changes."""
    user_claim: Annotated[str, Field(min_length=1, max_length=64)] = "sub"
    """The claim that is the user's name."""
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 30.0
    """How far the issuer's clock may be off."""


class UserIdentitySettings(Settings):
    """Which user an association is for (User Identity Negotiation, PS3.7 D.3.3.7)."""

    mode: Literal["off", "optional", "required"] = "optional"
    """`optional`: who names a user must prove it, who names none is taken. Peers can have their own."""
    kinds: Annotated[tuple[Literal["username", "passcode", "jwt"], ...], Field(min_length=1)] = ("passcode",)
    """`username` proves nothing: only that the name is known."""
    users_file: Path | None = None
    """Names and hashed passcodes, as `dicom-node users hash` prints them; mode 0600 or 0640."""
    jwt: JwtSettings | None = None
    allow_plain: bool = False
    """Take passcodes and tokens from other machines without TLS too: whoever is on the way reads them."""
    attempts_per_minute: Annotated[float, Field(gt=0)] = 10.0
    """Passcodes that are checked, and tokens that may be wrong, from one address; more are rejected unseen."""
    remembered_s: Annotated[float, Field(ge=0, le=3600)] = 60.0
    """How long a passcode that was right is not checked again; a users file that changed ends it at once."""

    @model_validator(mode="after")
    def _can_verify(self) -> UserIdentitySettings:
        if {"username", "passcode"} & set(self.kinds) and self.users_file is None:
            raise ValueError(
                "users_file: names and passcodes cannot be checked without; name a file, or drop the kinds"
            )
        if ("jwt" in self.kinds) != (self.jwt is not None):
            raise ValueError(
                "kinds, jwt: tokens are verified only with both; list `jwt` under kinds and say how, or neither"
            )
        return self


class BoundSettings(Settings):
    """What one connection, one message, one header may take of the node (README, "Bounds")."""

    first_pdu_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    """The ARTIM timer (PS3.8 9.1.5): a whole A-ASSOCIATE-RQ must be there this long after TCP connected."""
    pdu_s: Seconds = 20.0
    """A PDU that has begun must be complete after this."""
    send_s: Seconds = 20.0
    """A peer that reads nothing for this long is gone."""
    silent_connections: Annotated[int, Field(ge=1, le=65536)] = 1024
    """Without an association, of each receiver; the oldest of the address that has most gives way to the next."""
    objects_per_association: Annotated[int, Field(ge=1)] = 1_000_000
    """C-STORE requests; the next ones are answered 0xA700, and taken on another association."""
