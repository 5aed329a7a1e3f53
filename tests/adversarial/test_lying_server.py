"""The honest participant against a server, or a peer, that lies. Each test also shows what the check stops."""

from dataclasses import replace

import numpy as np
import pytest
from simulator import Attempt, in_order, make_client, make_context, tuple_of, with_advert

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat import agreement
from mpctf_secure.hazmat.encoding import decode_sequence, enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.messages import Advert, Delivery, Release, ShareMessage, Signed

LOW_ORDER = bytes(32)
NOT_CANONICAL = (2**255 - 19 + 9).to_bytes(32, "little")  # the base point in a second encoding


BAD_KEYS = {
    "a low-order mask key": lambda good: replace(good, mask_key=LOW_ORDER),
    "a low-order share key": lambda good: replace(good, share_key=LOW_ORDER),
    "a key in a second encoding": lambda good: replace(good, mask_key=NOT_CANONICAL),
    "the same key for both purposes": lambda good: replace(good, share_key=good.mask_key),
}


@pytest.mark.parametrize("spoil", BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_bad_public_key_is_refused_by_the_server_and_blamed_on_one_that_passes_it_on(spoil) -> None:
    """An honest server checks what the clients check, so what reaches a client with a flaw is the server's doing."""
    attempt = Attempt(3)
    good = Advert(agreement.public_key(b"\x07" * 32), agreement.public_key(b"\x08" * 32))
    adverts = with_advert(attempt, 2, spoil(good))
    with pytest.raises(SecurityError) as caught:
        attempt.clients[0].share(adverts)
    assert caught.value.culprits == ("coordinator",)
    spoilt = next(m for m in decode_sequence(adverts, 100) if Signed.decode(m).sender == attempt.clients[2].me)
    with pytest.raises(SecurityError) as caught:
        attempt.server.accept_advert(spoilt)
    assert caught.value.culprits == (attempt.clients[2].me.hex(),)
    assert Attempt(3).clients[0].advertise()
    assert with_advert(Attempt(3), 2, good) != adverts


def test_second_advert_with_a_key_is_refused_and_the_others_go_on() -> None:
    attempt = Attempt(4)
    adverts = [client.advertise() for client in attempt.clients]
    copied = Signed.decode(adverts[0]).body
    twin = attempt.clients[3]
    for advert in adverts[:3]:
        attempt.server.accept_advert(advert)
    with pytest.raises(SecurityError, match="repeats somebody's public key") as caught:
        attempt.server.accept_advert(Signed.make("advert", attempt.context.digest(), twin.key, copied).encode())
    assert caught.value.culprits == (twin.me.hex(),)
    assert len(decode_sequence(attempt.server.close_adverts(), 100)) == 3


def test_cohort_of_one_is_no_cohort() -> None:
    """A coordinator that announced it would get one participant's input as the sum."""
    with pytest.raises(SecurityError, match="below the floor"):
        make_context([SigningKey(b"\1" * 32)])
    pair = make_context([SigningKey(bytes([i]) * 32) for i in (1, 2)])
    with pytest.raises(SecurityError, match="below the floor"):
        replace(pair, cohort=pair.cohort[:1], first_cohort=pair.cohort[:1])


def test_reflected_key_aborts() -> None:
    """A peer that repeats my key would share with the others the masks that I share with them."""
    attempt = Attempt(3)
    mine = Advert.decode(Signed.decode(Attempt(3).clients[0].advertise()).body)
    with pytest.raises(SecurityError, match="repeats a public key"):
        attempt.clients[0].share(with_advert(attempt, 2, mine))


def test_advert_substituted_by_the_server_aborts() -> None:
    attempt = Attempt(3)
    adverts = list(decode_sequence(attempt.advertise(), 100))
    forger = SigningKey(b"\x09" * 32)
    forged = Signed.make("advert", attempt.context.digest(), forger, Signed.decode(adverts[0]).body)
    victim = Signed.decode(adverts[0]).sender
    adverts[0] = replace(forged, sender=victim).encode()
    honest = next(c for c in attempt.clients if c.me != victim)
    with pytest.raises(SecurityError, match="signature is not valid"):
        honest.share(enc_sequence(adverts))


FIELDS = {
    "another run": {"run_id": "other"},
    "another round": {"round": 2},
    "another attempt": {"attempt": 2},
    "another state": {"state_hash": sha256(b"other state")},
    "another scale": {"round_parameters_hash": sha256(b"other ranges")},
    "another contract": {"contract_hash": sha256(b"other contract")},
    "another roster": {"roster_hash": sha256(b"other roster")},
    "another base model": {"base_model_hash": sha256(b"other base")},
    "another schema": {"schema_hash": sha256(b"other schema")},
    "another ring": {"ring_bits": 16},
    "another colluder bound, so another threshold": {"colluders": 2},
}


@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS.keys())
def test_participant_told_something_else_aborts_before_masked_input(changes) -> None:
    told_otherwise = Attempt(4, changes=changes)
    honest = Attempt(4)
    adverts = honest.advertise()
    told_otherwise.clients[0].advertise()
    with pytest.raises(SecurityError, match="another context"):
        told_otherwise.clients[0].share(adverts)


def test_split_view_of_adverts_is_blamed_on_the_coordinator() -> None:
    """Two U1 shown to two groups: dealers sign the U1 they saw, so the mismatch is seen before masking."""
    attempt = Attempt(5)
    adverts = decode_sequence(attempt.advertise(), 100)
    group = sorted(attempt.clients, key=lambda client: client.me)
    all_five = group[0].share(enc_sequence(adverts))
    only_four = [client.share(enc_sequence(adverts[1:])) for client in group[1:]]
    dealings = tuple(ShareMessage.decode(m).dealing for m in (all_five, *only_four))
    with pytest.raises(SecurityError) as caught:
        group[0].mask(Delivery(dealings, ()).encode(), attempt.lanes[0], attempt.scalars[0])
    assert caught.value.culprits == ("coordinator",)


def masked(n: int) -> Attempt:
    attempt = Attempt(n)
    attempt.upload(attempt.share(attempt.advertise()))
    return attempt


def test_split_view_of_survivors_never_opens() -> None:
    """4 participants, c = 1: the server shows {0,1,2} to 0 and 1, and {1,2,3} to 3; two tuples never reach t = 3."""
    attempt = masked(4)
    left, right = tuple_of(attempt, attempt.clients[:3]), tuple_of(attempt, attempt.clients[1:])
    signed = [attempt.clients[i].confirm(left) for i in (0, 1)] + [attempt.clients[3].confirm(right)]
    with pytest.raises(SecurityError, match="another survivor tuple"):
        attempt.clients[0].release(in_order(signed))
    with pytest.raises(SecurityError, match="fewer than the threshold"):
        attempt.clients[0].release(in_order(signed[:2]))
    with pytest.raises(SecurityError, match="not possible in state"):
        attempt.clients[1].confirm(right)


def test_split_view_opens_where_the_threshold_is_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attack with t = 2: both tuples open, and their difference is one participant's input."""
    monkeypatch.setattr("mpctf_secure.secagg.parameters.threshold", lambda n, c: 2)
    attempt = masked(4)
    left, right = tuple_of(attempt, attempt.clients[:3]), tuple_of(attempt, attempt.clients[1:])
    one = [attempt.clients[i].confirm(left) for i in (0, 1)]
    two = [attempt.clients[i].confirm(right) for i in (2, 3)]
    assert [attempt.clients[i].release(in_order(one)) for i in (0, 1)]
    assert [attempt.clients[i].release(in_order(two)) for i in (2, 3)]


def test_server_that_claims_a_dropout_but_holds_its_upload_cannot_unmask_it() -> None:
    """The mask key removes pairwise masks; the self mask stays, and its shares are never released as well."""
    attempt = masked(4)
    claim = tuple_of(attempt, attempt.clients[:3])
    signatures = in_order(attempt.clients[i].confirm(claim) for i in range(3))
    releases = [Release.decode(Signed.decode(attempt.clients[i].release(signatures)).body) for i in range(3)]
    assert all((len(r.self_masks), len(r.mask_keys)) == (3, 1) for r in releases)
    victim = attempt.clients[3]
    with pytest.raises(SecurityError, match="leaves me out"):
        victim.confirm(claim)
    pairs = [
        masks.pair_mask(victim._binding, victim.me, victim._secrets.mask_private, c.me, victim._adverts[c.me].mask_key)
        for c in attempt.clients[:3]
    ]
    layout = attempt.context.layout
    stripped = masks.unmask_chunk(iter([attempt.uploads[victim.me][0]]), pairs, layout, 0)
    assert not np.array_equal(np.frombuffer(stripped, "<u4"), attempt.lanes[3])
    pairs.append(masks.self_mask(victim._binding, victim.me, victim._secrets.self_mask))
    opened = masks.unmask_chunk(iter([attempt.uploads[victim.me][0]]), pairs, layout, 0)
    assert np.array_equal(np.frombuffer(opened, "<u4"), attempt.lanes[3]), "the self mask is what protects it"


def test_dealer_with_bad_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(3)
    adverts = attempt.advertise()
    bad, honest = attempt.clients[0], attempt.clients[1]
    with monkeypatch.context() as patch:
        patch.setattr("mpctf_secure.secagg.client.commitment", lambda *_: bytes(32))
        dealt = bad.share(adverts)
    attempt.server.accept_shares(dealt)
    for client in attempt.clients[1:]:
        attempt.server.accept_shares(client.share(adverts))
    deliveries = attempt.server.close_shares()
    with pytest.raises(SecurityError, match="commitment") as caught:
        honest.mask(deliveries[honest.me], attempt.lanes[1], attempt.scalars[1])
    assert caught.value.culprits == (bad.me.hex(),)
    monkeypatch.setattr("mpctf_secure.secagg.client.check_share", lambda *_: None)
    assert honest.mask(deliveries[honest.me], attempt.lanes[1], attempt.scalars[1])


def test_released_share_that_was_not_committed_names_its_sender() -> None:
    attempt = Attempt(4)
    signatures = attempt.confirm(attempt.upload(attempt.share(attempt.advertise())))
    liar = attempt.clients[0]
    honest = Release.decode(Signed.decode(liar.release(signatures)).body)
    lie = Release((b"\x00" * 33, *honest.self_masks[1:]), honest.mask_keys)
    with pytest.raises(SecurityError) as caught:
        attempt.server.accept_release(Signed.make("release", attempt.context.digest(), liar.key, lie.encode()).encode())
    assert caught.value.culprits == (liar.me.hex(),)
    for client in attempt.clients[1:]:
        attempt.server.accept_release(client.release(signatures))
    assert np.array_equal(attempt.opened(attempt.server.close_releases())[0], attempt.plain()[0])


def test_second_masked_vector_in_an_attempt_is_refused() -> None:
    """Two inputs under the same masks would give away their difference."""
    attempt = Attempt(3)
    deliveries = attempt.share(attempt.advertise())
    client = attempt.clients[0]
    client.mask(deliveries[client.me], attempt.lanes[0], attempt.scalars[0])
    with pytest.raises(SecurityError, match="not possible in state"):
        client.mask(deliveries[client.me], attempt.lanes[1], attempt.scalars[1])


def test_upload_that_differs_from_its_digest_never_enters_the_sum() -> None:
    attempt = Attempt(3)
    deliveries = attempt.share(attempt.advertise())
    client = attempt.clients[0]
    client.mask(deliveries[client.me], attempt.lanes[0], attempt.scalars[0])
    with pytest.raises(SecurityError) as caught:
        attempt.server.accept_upload(client.declare(sha256(b"what I sent")), sha256(b"what arrived"))
    assert caught.value.culprits == (client.me.hex(),)
    assert client.me not in attempt.server.received


def test_participant_outside_the_cohort_cannot_take_part() -> None:
    stranger = SigningKey(sha256(b"stranger"))
    context = make_context([SigningKey(sha256(bytes([i]))) for i in range(3)])
    with pytest.raises(SecurityError, match="not in the cohort"):
        make_client(context, stranger)
    advert = Signed.make("advert", context.digest(), stranger, Advert(b"\x09" + bytes(31), bytes(32)).encode())
    with pytest.raises(SecurityError, match="outside this stage"):
        Attempt(3, changes={}).server.__class__(context).accept_advert(advert.encode())


def test_no_secret_shows_in_a_repr() -> None:
    attempt = Attempt(3)
    attempt.run()
    client = attempt.clients[0]
    secret = client._secrets.self_mask
    shown = repr(client) + repr(client._secrets) + repr(client._shares) + repr(client.key)
    assert repr(secret) not in shown
    assert secret.hex() not in shown
