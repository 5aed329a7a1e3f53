"""Ed25519 (RFC 8032) by libsodium, which refuses small-order keys that other verifiers accept."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey as _SigningKey
from nacl.signing import VerifyKey

from mpctf_secure.errors import SecurityError

KEY_BYTES = 32
SIGNATURE_BYTES = 64


class SigningKey:
    """An identity's private key; neither repr nor str shows it."""

    def __init__(self, seed: bytes) -> None:
        self._key = _SigningKey(seed)
        self.public = bytes(self._key.verify_key)

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public.hex()})"

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of `message`."""
        return self._key.sign(message).signature

    def for_certificates(self) -> Ed25519PrivateKey:
        """The same key for pyca's X.509 builder; what it signs starts with a DER tag, which no message of ours does."""
        return Ed25519PrivateKey.from_private_bytes(bytes(self._key))


def check_public_key(public: bytes) -> None:
    """Refuse bytes that are no point of the prime-order group: under a small-order key anybody can sign."""
    if len(public) != KEY_BYTES or not crypto_core_ed25519_is_valid_point(public):
        raise SecurityError("Ed25519 public key is not a canonical point of the prime-order group")


def verify(public: bytes, message: bytes, signature: bytes) -> None:
    """Return None for a valid signature; SecurityError otherwise."""
    try:
        VerifyKey(public).verify(message, signature)
    except (BadSignatureError, ValueError, TypeError) as error:
        raise SecurityError("signature is not valid") from error
