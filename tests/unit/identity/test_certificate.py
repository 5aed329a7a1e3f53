import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import certificate
from mpctf_secure.ids import IdentityKey

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)
BANK, CLINIC = SigningKey(b"\1" * 32), SigningKey(b"\2" * 32)
BANK_ID, CLINIC_ID = IdentityKey(BANK.public), IdentityKey(CLINIC.public)
ROLES = {BANK_ID: "participant", CLINIC_ID: "coordinator"}


def test_trust_anchor_is_the_same_everywhere() -> None:
    """Two versions of a library that encode it in two ways would part the members."""
    assert sha256(certificate.trust_anchor(BANK_ID)).hex() == (
        "b37f58365c2ef1aa09adb0a78c78584d2963a702987b8d39a8fd998df3c52cc4"
    )
    anchor = x509.load_pem_x509_certificate(certificate.trust_anchor(BANK_ID))
    constraints = anchor.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)


def test_issuer_of_a_tls_key_is_found_by_its_signature() -> None:
    own = certificate.issue(BANK, "bank-b", "participant", NOW)
    assert certificate.issuer(own.certificate, ROLES, NOW) == BANK_ID
    assert own.renew_at == NOW + certificate.LIFE / 2
    assert b"PRIVATE" not in repr(own).encode()


def issued(life: datetime.timedelta) -> bytes:
    return certificate.issue(BANK, "bank-b", "participant", NOW, life).certificate


def stranger() -> bytes:
    return certificate.issue(SigningKey(b"\3" * 32), "bank-b", "participant", NOW).certificate


def forged_issuer() -> bytes:
    """A stranger writes the bank's name as issuer."""
    key = SigningKey(b"\3" * 32)
    real = x509.load_pem_x509_certificate(certificate.issue(key, "bank-b", "participant", NOW).certificate)
    made = x509.CertificateBuilder(
        x509.load_pem_x509_certificate(certificate.trust_anchor(BANK_ID)).subject,
        real.subject, real.public_key(), 5, NOW, NOW + HOUR, list(real.extensions),
    ).sign(key.for_certificates(), None)  # fmt: skip
    return made.public_bytes(serialization.Encoding.PEM)


ISSUED = issued(certificate.LIFE)
REFUSED = {
    "a stranger's, though with a member's name in it": (stranger, NOW, "nobody in the roster"),
    "one that names a member as issuer": (forged_issuer, NOW, "signature is not valid"),
    "one for a year": (
        lambda: issued(8760 * HOUR), NOW, "longer than"),
    "a participant's that would serve": (
        lambda: certificate.issue(BANK, "bank-b", "coordinator", NOW).certificate, NOW, "another role"),
    "a trust anchor itself": (lambda: certificate.trust_anchor(BANK_ID), NOW, "says no purpose"),
    "DER where PEM is due": (
        lambda: ssl.PEM_cert_to_DER_cert(issued(certificate.LIFE).decode()), NOW, "cannot be parsed"),
    "no certificate": (lambda: b"", NOW, "cannot be parsed"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "now", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_tls_certificate_is_refused(make, now: datetime.datetime, why: str) -> None:
    with pytest.raises(SecurityError, match=why):
        certificate.issuer(make(), ROLES, now)


@pytest.mark.parametrize("now", [NOW + 25 * HOUR, NOW - HOUR])
def test_tls_certificate_of_another_time_is_a_matter_of_clocks_and_convicts_nobody(now: datetime.datetime) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"TLS certificate valid from .* here it is 20"):
        certificate.issuer(issued(certificate.LIFE), ROLES, now)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(SecurityError):
        certificate.issuer(data, ROLES, NOW)


@given(st.data())
def test_changed_certificate_is_refused_unless_the_change_says_nothing(data: st.DataObject) -> None:
    """Bytes around the signed part may change in ways that mean nothing; no others, and never a crash."""
    real = x509.load_pem_x509_certificate(ISSUED)
    der = bytearray(real.public_bytes(serialization.Encoding.DER))
    at = data.draw(st.integers(0, len(der) - 1))
    der[at] ^= data.draw(st.integers(1, 255))
    try:
        certificate.issuer(ssl.DER_cert_to_PEM_cert(bytes(der)).encode(), ROLES, NOW)
    except SecurityError:
        return
    assert x509.load_der_x509_certificate(bytes(der)).tbs_certificate_bytes == real.tbs_certificate_bytes
