import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import certificate
from mpctf_secure.ids import IdentityKey

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
BANK, CLINIC = SigningKey(b"\1" * 32), SigningKey(b"\2" * 32)
BANK_ID, CLINIC_ID = IdentityKey(BANK.public), IdentityKey(CLINIC.public)
ROLES = {BANK_ID: "participant", CLINIC_ID: "coordinator"}


def test_authority_is_a_function_of_the_identity_and_vouches_for_it_alone() -> None:
    der = certificate.authority(BANK, NOW)
    assert der == certificate.authority(SigningKey(b"\1" * 32), NOW)
    certificate.check_authority(der, BANK_ID, NOW)
    with pytest.raises(SecurityError, match="not an authority of the identity"):
        certificate.check_authority(der, CLINIC_ID, NOW)


def builder(name: str, subject_key: SigningKey) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(ed25519.Ed25519PublicKey.from_public_bytes(subject_key.public))
        .serial_number(1)
        .not_valid_before(NOW - certificate.CLOCK_SKEW)
        .not_valid_after(certificate._NO_END)
    )


USAGE = certificate._usage(certificates=True)
FORGED = {
    "a longer path": lambda: (
        builder(BANK_ID.hex(), BANK)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(USAGE, critical=True)
        .sign(BANK.for_certificates(), None)
    ),
    "the name of another authority": lambda: (
        builder(CLINIC_ID.hex(), BANK)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(USAGE, critical=True)
        .sign(BANK.for_certificates(), None)
    ),
    "another's signature": lambda: (
        builder(BANK_ID.hex(), BANK)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(USAGE, critical=True)
        .sign(CLINIC.for_certificates(), None)
    ),
    "another life": lambda: x509.load_der_x509_certificate(certificate.authority(BANK, NOW + HOUR)),
    "no extensions": lambda: builder(BANK_ID.hex(), BANK).sign(BANK.for_certificates(), None),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_authority_of_any_other_kind_is_refused(forge) -> None:
    with pytest.raises(SecurityError):
        certificate.check_authority(forge().public_bytes(serialization.Encoding.DER), BANK_ID, NOW)


def test_issuer_of_a_tls_key_is_found_by_its_signature() -> None:
    own = certificate.issue(BANK, "bank-b", "participant", NOW)
    assert certificate.issuer(own.certificate, ROLES, NOW) == BANK_ID
    assert own.renew_at == NOW + certificate.LIFE / 2
    assert b"PRIVATE" not in repr(own).encode()
    assert certificate.from_pem(certificate.to_pem(own.certificate)) == own.certificate


def issued(life: datetime.timedelta) -> bytes:
    return certificate.issue(BANK, "bank-b", "participant", NOW, life).certificate


def stranger() -> bytes:
    return certificate.issue(SigningKey(b"\3" * 32), "bank-b", "participant", NOW).certificate


def forged_issuer() -> bytes:
    """A stranger writes the bank's name as issuer."""
    key = SigningKey(b"\3" * 32)
    der = certificate.issue(key, "bank-b", "participant", NOW).certificate
    real = x509.load_der_x509_certificate(der)
    made = x509.CertificateBuilder(
        x509.load_der_x509_certificate(certificate.authority(BANK, NOW)).subject,
        real.subject, real.public_key(), 5, NOW, NOW + HOUR, list(real.extensions),
    ).sign(key.for_certificates(), None)  # fmt: skip
    return made.public_bytes(serialization.Encoding.DER)


REFUSED = {
    "a stranger's, though with a member's name in it": (stranger, NOW, "nobody in the roster"),
    "one that names a member as issuer": (forged_issuer, NOW, "signature is not valid"),
    "an expired one": (lambda: issued(certificate.LIFE), NOW + 25 * HOUR, "valid from"),
    "one of tomorrow": (lambda: issued(certificate.LIFE), NOW - HOUR, "valid from"),
    "one for a year": (
        lambda: issued(8760 * HOUR), NOW, "valid from"),
    "a participant's that would serve": (
        lambda: certificate.issue(BANK, "bank-b", "coordinator", NOW).certificate, NOW, "another role"),
    "an authority itself": (lambda: certificate.authority(BANK, NOW), NOW, "valid from"),
    "no certificate": (lambda: b"", NOW, "cannot be parsed"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "now", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_tls_certificate_is_refused(make, now: datetime.datetime, why: str) -> None:
    with pytest.raises(SecurityError, match=why):
        certificate.issuer(make(), ROLES, now)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    for take in (lambda: certificate.issuer(data, ROLES, NOW), lambda: certificate.from_pem(data)):
        with pytest.raises(SecurityError):
            take()
