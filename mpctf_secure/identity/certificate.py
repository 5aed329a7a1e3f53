"""TLS certificates: each member's identity key is an authority for its own short-lived TLS keys and for nothing else.

So a renewal touches no file and no roster: peers trust what an identity in the roster has issued. gRPC takes no Ed25519
leaves, hence P-256. An authority's name is its key, so no two of them are confused.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpctf_secure.errors import SecurityError, blaming
from mpctf_secure.hazmat import signature
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey

Role = Literal["coordinator", "participant"]

LIFE = datetime.timedelta(hours=24)
CLOCK_SKEW = datetime.timedelta(minutes=10)
_NO_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # RFC 5280, 4.1.2.5: rosters expire instead
_PURPOSE = {"coordinator": ExtendedKeyUsageOID.SERVER_AUTH, "participant": ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True)
class TlsKey:
    """A private TLS key (PEM), its certificate (DER), and when the next one is due. Lives in memory only."""

    private: bytes = field(repr=False)
    certificate: bytes
    renew_at: datetime.datetime


def authority(identity: SigningKey, created: datetime.datetime) -> bytes:
    """The identity's own certificate (DER), which peers use as a trust anchor; a function of its arguments."""
    name = _authority_name(identity.public)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(ed25519.Ed25519PublicKey.from_public_bytes(identity.public))
        .serial_number(1)
        .not_valid_before(created - CLOCK_SKEW)
        .not_valid_after(_NO_END)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .sign(identity.for_certificates(), None)
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def check_authority(der: bytes, identity: IdentityKey, created: datetime.datetime) -> None:
    """Refuse a certificate that is not `authority` of these: it could vouch for more, or under another name."""
    certificate = _parse(der)
    found = (
        [(extension.value, extension.critical) for extension in certificate.extensions],
        {certificate.subject, certificate.issuer},
        _raw_key(certificate),
        certificate.serial_number,
        (certificate.not_valid_before_utc, certificate.not_valid_after_utc),
    )
    expected = (
        [(x509.BasicConstraints(ca=True, path_length=0), True), (_usage(certificates=True), True)],
        {_authority_name(identity)},
        identity,
        1,
        (created - CLOCK_SKEW, _NO_END),
    )
    if found != expected:
        raise SecurityError("certificate is not an authority of the identity key")
    signature.verify(identity, certificate.tbs_certificate_bytes, certificate.signature)


def issue(
    identity: SigningKey, name: str, role: Role, now: datetime.datetime, life: datetime.timedelta = LIFE
) -> TlsKey:
    """A fresh P-256 key for TLS, certified for `name` and for one end of the channel; renewed at half its life.

    Without the critical KeyUsage and CA:FALSE its owner could mint certificates; the purpose stops a participant from
    serving as the coordinator.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(_authority_name(identity.public))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_PURPOSE[role]]), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(identity.for_certificates(), None)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return TlsKey(private, certificate.public_bytes(serialization.Encoding.DER), now + life / 2)


def issuer(der: bytes, identities: Mapping[IdentityKey, Role], now: datetime.datetime) -> IdentityKey:
    """Which of the identities issued this TLS certificate; SecurityError for none, or out of its life or its role.

    The handshake checked as much, but maybe hours ago: a connection outlives certificates and rosters.
    """
    certificate = _parse(der)
    identity = next((key for key in identities if _authority_name(key) == certificate.issuer), None)
    if identity is None:
        raise SecurityError(
            "TLS certificate was issued by nobody in the roster",
            hint="an enrolled organisation may have been revoked, or has rotated its keys: enroll show",
        )
    with blaming(identity.hex(), "TLS certificate"):
        signature.verify(identity, certificate.tbs_certificate_bytes, certificate.signature)
        starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not starts <= now <= ends or ends - starts > LIFE + CLOCK_SKEW:
            raise SecurityError(f"valid from {starts:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC")
        if _purposes(certificate) != [_PURPOSE[identities[identity]]]:
            raise SecurityError("for another role than its owner's")
    return identity


def to_pem(der: bytes) -> bytes:
    """DER as PEM."""
    return _parse(der).public_bytes(serialization.Encoding.PEM)


def from_pem(pem: bytes) -> bytes:
    """PEM as DER; SecurityError if it does not parse."""
    try:
        return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    except ValueError as error:
        raise SecurityError("certificate cannot be parsed") from error


def _parse(der: bytes) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        _ = certificate.extensions  # parsed when first asked for
    except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise SecurityError("certificate cannot be parsed") from error
    return certificate


def _authority_name(identity: bytes) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.hex())])


def _raw_key(certificate: x509.Certificate) -> bytes:
    key = certificate.public_key()
    return key.public_bytes_raw() if isinstance(key, ed25519.Ed25519PublicKey) else b""


def _purposes(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
