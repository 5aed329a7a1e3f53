"""HKDF-SHA256 (RFC 5869) with an empty salt and SHA-256."""

import hashlib

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

HASH_BYTES = 32


def hkdf(secret: bytes, info: bytes, length: int = 32) -> bytes:
    """`length` bytes for one purpose; `info` must be a canonical encoding that starts with a label."""
    return HKDF(hashes.SHA256(), length, salt=None, info=info).derive(secret)


def sha256(data: bytes) -> bytes:
    """SHA-256 of `data`, 32 bytes."""
    return hashlib.sha256(data).digest()
