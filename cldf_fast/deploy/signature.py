"""Ed25519 signatures by `cryptography`, which is imported where a key is used.

Functions that read keys raise ConfigError for a file that holds none, BackendError where `cryptography` is absent.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cldf_fast.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def private_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file without a password."""
    return _load(path, private=True)


def public_key(path: Path) -> Ed25519PublicKey:
    """The public key in a PEM file."""
    return _load(path, private=False)


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's 32 bytes, 64 hexadecimal digits."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def fits(key: Ed25519PublicKey, signature: bytes, data: bytes) -> bool:
    """Whether the key's owner signed exactly these bytes."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _load(path: Path, *, private: bool) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise BackendError(
            "signatures need cryptography, which is not installed; pip install cldf_fast[deploy]"
        ) from None
    wanted = "an Ed25519 private key in PEM without a password" if private else "an Ed25519 public key in PEM"
    try:
        data = path.read_bytes()
        if private:
            key: object = serialization.load_pem_private_key(data, password=None)
        else:
            key = serialization.load_pem_public_key(data)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: expected {wanted} ({error})") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey):
        raise ConfigError(f"{path}: expected {wanted}, got a key of another kind")
    return key
