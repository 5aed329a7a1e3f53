"""Authenticated encryption: ChaCha20-Poly1305 (RFC 8439) for one message, AES-256-GCM (NIST SP 800-38D) for files."""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from mpctf_secure.errors import SecurityError

KEY_BYTES = 32
_ZERO_NONCE = bytes(12)
NONCE_BYTES = 12


def seal_once(key: bytes, message: bytes, associated: bytes) -> bytes:
    """Encrypt the only message that `key` will ever encrypt, under the zero nonce."""
    return ChaCha20Poly1305(key).encrypt(_ZERO_NONCE, message, associated)


def open_once(key: bytes, box: bytes, associated: bytes) -> bytes:
    """Decrypt; SecurityError if box, key or associated data are not the sealed ones."""
    try:
        return ChaCha20Poly1305(key).decrypt(_ZERO_NONCE, box, associated)
    except InvalidTag as error:
        raise SecurityError("box does not open") from error


def seal(key: bytes, nonce: bytes, message: bytes | memoryview, associated: bytes) -> bytes:
    """Encrypt one of at most 2³² messages under `key`: ciphertext ‖ tag.

    The nonce must be random and not a count, which would start again where a crash tears the last record off a file.
    """
    return AESGCM(key).encrypt(nonce, message, associated)


def open_sealed(key: bytes, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """What `seal` was given; SecurityError for anything that it did not make."""
    try:
        return AESGCM(key).decrypt(nonce, sealed, associated)
    except (InvalidTag, ValueError) as error:
        raise SecurityError("sealed record does not open") from error
