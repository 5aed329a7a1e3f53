"""Every decoder is total: any bytes give a message that encodes to the same bytes, or a SecurityError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulator import Attempt

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.rounds.messages import Announce, Facts, Position, Progress, Publication
from mpctf_secure.secagg.messages import Advert, Dealing, Delivery, Release, ShareMessage, SharePair, Signed, Survivors

KINDS = [
    Advert, Dealing, Delivery, Release, ShareMessage, SharePair, Signed, Survivors,
    Announce, Facts, Position, Progress, Publication,
]  # fmt: skip


def real_messages() -> list[bytes]:
    attempt = Attempt(4, drops={2: "upload"})
    attempt.run()
    signed = [m for m in attempt.transcript if m[:4] in (b"\0\0\0\6", b"\0\0\0\7", b"\0\0\0\x0b")]
    return signed + [Signed.decode(m).body for m in signed] + attempt.transcript[4:8]


REAL = real_messages()


@pytest.mark.parametrize("kind", KINDS)
@given(
    data=st.one_of(st.binary(max_size=200), st.sampled_from(REAL)), cut=st.integers(0, 300), flip=st.integers(0, 300)
)
def test_decoder_is_total(kind: type, data: bytes, cut: int, flip: int) -> None:
    spoiled = bytearray(data[: len(data) - cut] if cut < len(data) else data)
    if flip < len(spoiled):
        spoiled[flip] ^= 1 << (flip % 8)
    try:
        message = kind.decode(bytes(spoiled))
    except SecurityError:
        return
    assert message.encode() == bytes(spoiled)


def test_signature_is_for_one_label_one_context_and_one_sender() -> None:
    key, other = SigningKey(b"\1" * 32), SigningKey(b"\2" * 32)
    message = Signed.make("advert", bytes(32), key, b"body")
    message.verify("advert", bytes(32))
    forged = Signed("advert", bytes(32), other.public, b"body", message.signature)
    for bad, label, ctx in (
        (message, "release", bytes(32)),
        (message, "advert", b"\1" * 32),
        (forged, "advert", bytes(32)),
        (Signed("advert", bytes(32), key.public, b"body!", message.signature), "advert", bytes(32)),
    ):
        with pytest.raises(SecurityError) as caught:
            bad.verify(label, ctx)
        assert caught.value.culprits == (bad.sender.hex(),)
