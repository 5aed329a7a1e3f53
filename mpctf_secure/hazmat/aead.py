"""ChaCha20-Poly1305 (RFC 8439) for keys that encrypt exactly one message, so that the nonce may be zero."""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from mpctf_secure.errors import SecurityError

_NONCE = bytes(12)


def seal_once(key: bytes, message: bytes, associated: bytes) -> bytes:
    """Encrypt the only message that `key` will ever encrypt."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, message, associated)


def open_once(key: bytes, box: bytes, associated: bytes) -> bytes:
    """Decrypt; SecurityError if box, key or associated data are not the sealed ones."""
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, associated)
    except InvalidTag as error:
        raise SecurityError("box does not open") from error
