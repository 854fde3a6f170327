"""JSON Web Tokens of users (RFC 7519), verified as RFC 8725 says: the configuration, never the token, chooses how."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from dicom_node.config import JwtSettings
from dicom_node.errors import ConfigError
from dicom_node.private_files import stamp

__all__ = ["Tokens"]

MAX_TOKEN_BYTES = 16 * 1024
MAX_KEY_BYTES = 1024 * 1024
MAX_NAME = 256
_WHERE = "user_identity.jwt.key"
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")


class Tokens:
    """Verifies tokens of one issuer. Raises ConfigError for keys that cannot be used with the configured algorithms."""

    def __init__(self, settings: JwtSettings) -> None:
        self._settings = settings
        self._guard = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._keys: Mapping[str, Any] = {}
        self.look()

    def look(self) -> None:
        """Take keys in if their file changed. Raises ConfigError; those that were known go on to hold."""
        with self._guard:
            path = self._settings.key
            try:
                seen = stamp(path)
                if seen == self._seen:
                    return
                self._seen = seen  # whatever comes of it: what is wrong is told once
                with path.open("rb") as file:
                    content = file.read(MAX_KEY_BYTES)
            except OSError as exc:
                raise ConfigError(f"{_WHERE}: {path} cannot be read: {exc.strerror}; name a PEM or JWKS file") from None
            self._keys = _keys(path, content, self._settings.algorithms)

    def user(self, token: bytes) -> tuple[str, str]:
        """The user's name and '', or '' and why it is not taken: words of ours, nothing of the token."""
        if len(token) > MAX_TOKEN_BYTES:
            return "", "the token is too long"
        settings = self._settings
        try:
            text = token.rstrip(b"\0 \r\n").decode("ascii")
            header = jwt.get_unverified_header(text)
            key, fits = self._key(header.get("kid"))
            allowed = [one for one in settings.algorithms if one in fits]
            claims = jwt.decode(
                text,
                key,
                algorithms=allowed,
                audience=settings.audience,
                issuer=settings.issuer,
                leeway=settings.leeway_s,
                options={"require": ["exp", "iss", "aud", settings.user_claim]},
            )
        except UnicodeDecodeError:
            return "", "the token is no ASCII text"
        except jwt.PyJWTError as exc:
            return "", _WORDS.get(type(exc).__name__, "the token cannot be verified")
        except (RecursionError, ValueError, TypeError, OverflowError, AttributeError):  # what PyJWT does not foresee
            return "", "the token cannot be verified"
        name = claims.get(settings.user_claim)
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            return "", "the token names no user"
        return name, ""

    def _key(self, kid: object) -> tuple[Any, tuple[str, ...]]:
        """The key of that id, and the algorithms it is for. A single key is for tokens of any id."""
        found = next(iter(self._keys.values())) if len(self._keys) == 1 else self._keys.get(str(kid))
        if found is None:
            raise jwt.InvalidKeyError
        return found, _algorithms(found)


_WORDS = {
    "ExpiredSignatureError": "the token has expired",
    "ImmatureSignatureError": "the token is not valid yet",
    "InvalidAudienceError": "the token is for another audience",
    "InvalidIssuerError": "the token is of another issuer",
    "InvalidAlgorithmError": "the token is signed by an algorithm that is not taken",
    "InvalidSignatureError": "the signature of the token is wrong",
    "MissingRequiredClaimError": "the token lacks exp, iss, aud or the user's claim",
    "InvalidKeyError": "the token names a key that is not known",
}


def _algorithms(key: Any) -> tuple[str, ...]:
    """Those that this public key is for; () for a key that is none, or too weak."""
    if isinstance(key, rsa.RSAPublicKey):
        return _RSA if key.key_size >= 2048 else ()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return (_CURVES[key.curve.name],) if key.curve.name in _CURVES else ()
    return ("EdDSA",) if isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey) else ()


def _keys(path: Path, content: bytes, algorithms: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        if path.suffix == ".json":
            found = {
                str(one.get("kid", number)): _public(one)
                for number, one in enumerate(json.loads(content)["keys"])
                if one.get("use", "sig") == "sig"
            }
        else:
            found = {"": load_pem_public_key(content)}
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError):
        raise ConfigError(
            f"{_WHERE}: {path} holds no public keys; name a PEM file (BEGIN PUBLIC KEY) or a key set that ends in .json"
        ) from None
    usable = {kid: key for kid, key in found.items() if set(_algorithms(key)) & set(algorithms)}
    if not usable:
        raise ConfigError(
            f"{_WHERE}: {path} holds no key for {', '.join(algorithms)}; expected RSA from 2048 bits for RS and PS, "
            "the curve of its name for ES, Ed25519 or Ed448 for EdDSA"
        )
    return usable


def _public(key: Mapping[str, Any]) -> Any:
    """The key of a JWKS entry (RFC 7517); None for a secret one, with which anybody who verifies could sign."""
    if key.get("kty") not in ("RSA", "EC", "OKP") or "d" in key:
        return None
    return jwt.PyJWK.from_dict(dict(key)).key
