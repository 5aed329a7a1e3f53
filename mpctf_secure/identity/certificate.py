"""TLS certificates: each member's identity key is an authority for its own short-lived TLS keys and for nothing else.

So a renewal touches no file and no roster: peers trust what an identity in the roster has issued. gRPC takes no Ed25519
leaves, hence P-256. An authority's name is its key, so no two of them are confused.
"""

import datetime
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpctf_secure.errors import EnvironmentUnfitError, SecurityError, blaming
from mpctf_secure.hazmat import signature
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey

Role = Literal["coordinator", "participant"]

LIFE = datetime.timedelta(hours=24)
CLOCK_SKEW = datetime.timedelta(minutes=10)
# Rosters end instead. RFC 5280, 4.1.2.5.
_NO_BEGINNING = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NO_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
_PURPOSE = {"coordinator": ExtendedKeyUsageOID.SERVER_AUTH, "participant": ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True)
class TlsKey:
    """A private TLS key and its certificate (both PEM), and when the next one is due. Lives in memory only."""

    private: bytes = field(repr=False)
    certificate: bytes
    renew_at: datetime.datetime


@functools.cache
def trust_anchor(identity: IdentityKey) -> bytes:
    """The identity key as a certificate (PEM) that peers put among their trusted ones; a function of the key.

    Of a trust anchor only name and key count (RFC 5280, 6.1.1 d), so anybody makes it who knows the key, and its
    signature is nobody's. No peer ever parses a certificate of another's making before TLS does.
    """
    name = _authority_name(identity)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(ed25519.Ed25519PublicKey.from_public_bytes(identity))
        .serial_number(1)
        .not_valid_before(_NO_BEGINNING)
        .not_valid_after(_NO_END)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(certificates=True), critical=True)
        .sign(ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)), None)
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


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
    return TlsKey(private, certificate.public_bytes(serialization.Encoding.PEM), now + life / 2)


def issuer(certificate: bytes, identities: Mapping[IdentityKey, Role], now: datetime.datetime) -> IdentityKey:
    """Which of the identities issued this TLS certificate (PEM); SecurityError for none, or for another role.

    EnvironmentUnfitError for one that is good at another time: a clock is wrong, here or there, and may be set right.
    The handshake checked as much, but maybe hours ago: a connection outlives certificates and rosters.
    """
    leaf = _parse(certificate)
    identity = next((key for key in identities if _authority_name(key) == leaf.issuer), None)
    if identity is None:
        raise SecurityError(
            "TLS certificate was issued by nobody in the roster",
            hint="an enrolled organisation may have been revoked, or has rotated its keys: enroll show",
        )
    with blaming(identity.hex(), "TLS certificate"):
        signature.verify(identity, leaf.signed, leaf.signature)
        life = f"valid from {leaf.starts:%Y-%m-%d %H:%M} to {leaf.ends:%Y-%m-%d %H:%M} UTC"
        if leaf.ends - leaf.starts > LIFE + CLOCK_SKEW:
            raise SecurityError(f"{life}, longer than a TLS certificate may be")
        if leaf.purposes != [_PURPOSE[identities[identity]]]:
            raise SecurityError("for another role than its owner's")
    if not leaf.starts <= now <= leaf.ends:
        raise EnvironmentUnfitError(
            f"TLS certificate {life}, here it is {now:%Y-%m-%d %H:%M}", hint="set the clock right"
        )
    return identity


class _Leaf(NamedTuple):
    issuer: x509.Name
    signed: bytes
    signature: bytes
    starts: datetime.datetime
    ends: datetime.datetime
    purposes: list[x509.ObjectIdentifier]


def _parse(pem: bytes) -> _Leaf:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        return _Leaf(
            certificate.issuer,
            certificate.tbs_certificate_bytes,
            certificate.signature,
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value),
        )
    except Exception as error:
        raise SecurityError("TLS certificate cannot be parsed, or says no purpose") from error


def _authority_name(identity: bytes) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.hex())])


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
