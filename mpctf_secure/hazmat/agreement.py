"""X25519 (RFC 7748) that refuses what a lying peer may send."""

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from mpctf_secure.errors import SecurityError

KEY_BYTES = 32
_FIELD_PRIME = 2**255 - 19
_PROBE = b"\x40" * KEY_BYTES  # any scalar: a low-order point gives zero under all of them


def public_key(private: bytes) -> bytes:
    """The public key of 32 raw private bytes (clamped inside X25519, kept raw outside)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def exchange(private: bytes, public: bytes) -> bytes:
    """The shared secret; SecurityError if it is all zero (RFC 7748 section 6.1)."""
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise SecurityError("X25519 public key has low order") from error


def check_public_key(public: bytes) -> None:
    """Refuse wrong length, non-canonical encodings (one key, one encoding) and low-order points."""
    if len(public) != KEY_BYTES:
        raise SecurityError(f"X25519 public key has {len(public)} bytes instead of {KEY_BYTES}")
    if int.from_bytes(public, "little") >= _FIELD_PRIME:
        raise SecurityError("X25519 public key is not canonical")
    exchange(_PROBE, public)
