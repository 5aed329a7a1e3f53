"""Self-signed TLS certificates that can vouch for nobody else."""

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.kdf import sha256

LIFETIME = datetime.timedelta(days=30)
_CLOCK_SKEW = datetime.timedelta(minutes=10)


def make(name: str, now: datetime.datetime) -> tuple[bytes, bytes]:
    """(private key PEM, certificate DER) for `name`, P-256, valid from `now` for 30 days.

    gRPC refuses Ed25519 leaves. The critical KeyUsage without keyCertSign and CA:FALSE stop a member from minting a
    certificate for another member, although its own certificate is a trust anchor of its peers.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_digital_signature_only(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.DER)


def _digital_signature_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def spki_hash(der: bytes) -> bytes:
    """SHA-256 of the certificate's SubjectPublicKeyInfo: who the TLS peer is; SecurityError if it does not parse."""
    try:
        public = x509.load_der_x509_certificate(der).public_key()
        spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError) as error:
        raise SecurityError("certificate cannot be parsed") from error
    return sha256(spki)


def to_pem(der: bytes) -> bytes:
    """DER as PEM."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def from_pem(pem: bytes) -> bytes:
    """PEM as DER; SecurityError if it does not parse."""
    try:
        return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    except ValueError as error:
        raise SecurityError("certificate cannot be parsed") from error
