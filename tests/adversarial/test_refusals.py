"""What either end refuses besides the attacks of `test_checks_switched_off`: out of turn, out of form, replayed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulator import Attempt, make_client, tuple_of

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat import agreement, shamir
from mpctf_secure.hazmat.encoding import decode_sequence, enc, enc_sequence
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.chunks import Layout
from mpctf_secure.secagg.client import BadBoxError, Client
from mpctf_secure.secagg.messages import Advert, Dealing, Delivery, Release, ShareMessage, Signed, Survivors
from mpctf_secure.secagg.proof import BadDealerError, DealerProof


def resigned(message: bytes, key: SigningKey, body: bytes) -> bytes:
    """The same kind of message, by the same or another signer, with another body."""
    old = Signed.decode(message)
    return Signed.make(old.label, old.ctx, key, body).encode()


def refused(take: Callable[..., object], *message: object, why: str = "another context") -> None:
    with pytest.raises(SecurityError, match=why):
        take(*message)


def test_participant_that_is_left_out_or_replaced_aborts() -> None:
    """Nothing it could do then would end well; it says so before it deals or masks."""
    attempt = Attempt(4)
    adverts = attempt.advertise()
    victim = attempt.clients[0]
    without = [m for m in decode_sequence(adverts, 100) if Signed.decode(m).sender != victim.me]
    with pytest.raises(SecurityError, match="my own message is missing") as caught:
        victim.share(enc_sequence(without))
    assert caught.value.culprits == ("coordinator",)
    delivery = Delivery.decode(attempt.share(adverts)[victim.me])
    others = [m for m in delivery.dealings if Signed.decode(m).sender != victim.me]
    with pytest.raises(SecurityError, match="my own message is missing"):
        victim.mask(Delivery(tuple(others), delivery.boxes).encode(), *attempt.input(victim))
    with pytest.raises(SecurityError, match="one box for each dealer"):
        victim.mask(Delivery(delivery.dealings, delivery.boxes[1:]).encode(), *attempt.input(victim))


def test_events_out_of_turn_are_refused() -> None:
    attempt = Attempt(3)
    client = attempt.clients[0]
    with pytest.raises(SecurityError, match="no survivor tuple was confirmed"):
        client.release(b"")
    client.advertise()
    with pytest.raises(SecurityError, match="not possible in state"):
        client.advertise()
    with pytest.raises(SecurityError, match="came in stage"):
        attempt.server.accept_release(client._my_advert)
    with pytest.raises(SecurityError, match="no survivor tuple yet"):
        _ = attempt.server._survivor_tuple


def test_repeated_messages_change_nothing_in_any_stage() -> None:
    attempt = Attempt(3)
    original = attempt.sent
    server, accept = attempt.server, []

    def sent_twice(message: bytes) -> bytes:
        accept.append(message)
        return original(message)

    attempt.sent = sent_twice  # type: ignore[method-assign]
    adverts = attempt.advertise()
    shares = [client.share(adverts) for client in attempt.clients]
    for message in shares * 2:
        server.accept_shares(message)
    deliveries = server.close_shares()
    for client in attempt.clients:
        chunks = list(client.mask(deliveries[client.me], *attempt.input(client)).chunks())
        digest = sha256(b"".join(map(sha256, chunks)))
        attempt.uploads[client.me] = chunks
        declared = client.declare(digest)
        assert client.declare(digest) == declared
        server.accept_upload(declared, digest)
        server.accept_upload(declared, digest)
    survivors = server.close_uploads()
    confirmations = [client.confirm(survivors) for client in attempt.clients]
    for message in confirmations * 2:
        server.accept_consistency(message)
    signatures = server.close_consistency()
    for message in [client.release(signatures) for client in attempt.clients] * 2:
        server.accept_release(message)
    assert np.array_equal(attempt.opened(server.close_releases())[0], attempt.plain()[0])


def test_second_different_message_in_a_stage_is_refused_and_names_its_sender() -> None:
    attempt = Attempt(3)
    liar = attempt.clients[0]
    advert = liar.advertise()
    attempt.server.accept_advert(advert)
    keys = Advert(agreement.public_key(b"\1" * 32), agreement.public_key(b"\2" * 32))
    with pytest.raises(SecurityError, match="second, different") as caught:
        attempt.server.accept_advert(resigned(advert, liar.key, keys.encode()))
    assert caught.value.culprits == (liar.me.hex(),)


def spoil_dealing(**changes: object) -> Callable[[ShareMessage, SigningKey], ShareMessage]:
    def spoil(message: ShareMessage, key: SigningKey) -> ShareMessage:
        dealing = Dealing.decode(Signed.decode(message.dealing).body)
        return replace(message, dealing=resigned(message.dealing, key, replace(dealing, **changes).encode()))

    return spoil


WRONG_SHARES = {
    "boxes that the dealer did not sign": lambda m, _: replace(m, boxes=(bytes(90), *m.boxes[1:])),
    "too few commitments": spoil_dealing(self_mask_shares=(bytes(32),)),
    "too few boxes": spoil_dealing(boxes=()),
    "another U1": spoil_dealing(adverts_hash=bytes(32)),
}


@pytest.mark.parametrize("spoil", WRONG_SHARES.values(), ids=WRONG_SHARES.keys())
def test_wrong_shares_are_refused_by_the_server(spoil) -> None:
    attempt = Attempt(4)
    adverts = attempt.advertise()
    liar = attempt.clients[0]
    message = ShareMessage.decode(liar.share(adverts))
    with pytest.raises(SecurityError) as caught:
        attempt.server.accept_shares(spoil(message, liar.key).encode())
    assert caught.value.culprits in {(liar.me.hex(),), ("coordinator",)}
    assert attempt.server.received == set()


def test_lists_out_of_order_or_with_strangers_are_refused_by_participants() -> None:
    attempt = Attempt(4)
    adverts = decode_sequence(attempt.advertise(), 100)
    client = attempt.clients[0]
    for wrong in (adverts[::-1], [*adverts, adverts[-1]]):
        with pytest.raises(SecurityError, match="out of order"):
            client.share(enc_sequence(wrong))
    deliveries = attempt.share(enc_sequence(adverts))
    delivery = Delivery.decode(deliveries[client.me])
    for dealings in (delivery.dealings[::-1], (*delivery.dealings, delivery.dealings[-1])):
        with pytest.raises(SecurityError, match="out of order"):
            client.mask(Delivery(dealings, delivery.boxes).encode(), *attempt.input(client))


def test_tuples_and_releases_out_of_form_are_refused() -> None:
    attempt = Attempt(4, drops={3: "upload"})
    claim = Survivors.decode(attempt.upload(attempt.share(attempt.advertise())))
    for wrong in (
        replace(claim, survivors=claim.survivors[::-1]),
        replace(claim, digests=claim.digests[:-1]),
        replace(claim, dealers=claim.dealers[:1]),
    ):
        with pytest.raises(SecurityError):
            Survivors.decode(wrong.encode())
    liar = attempt.clients[0]
    confirmed = liar.confirm(claim.encode())
    other = replace(claim, digests=(bytes(32),) * 3).encode()
    with pytest.raises(SecurityError, match="another survivor tuple") as caught:
        attempt.server.accept_consistency(resigned(confirmed, liar.key, other))
    assert caught.value.culprits == (liar.me.hex(),)
    attempt.server.accept_consistency(confirmed)
    for client in attempt.clients[1:3]:
        attempt.server.accept_consistency(client.confirm(claim.encode()))
    signatures = attempt.server.close_consistency()
    released = liar.release(signatures)
    with pytest.raises(SecurityError, match="one share for each member") as caught:
        attempt.server.accept_release(resigned(released, liar.key, Release((), ()).encode()))
    assert caught.value.culprits == (liar.me.hex(),)


def test_share_of_a_bad_form_names_its_sender() -> None:
    """p itself, all ones: no field elements. A share for x = 0 would be the secret, so no member has that x."""
    attempt = Attempt(4)
    signatures = attempt.confirm(attempt.upload(attempt.share(attempt.advertise())))
    liar = attempt.clients[0]
    released = liar.release(signatures)
    honest = Release.decode(Signed.decode(released).body)
    for share in (shamir.PRIME.to_bytes(33, "big"), b"\xff" * 33):
        lie = Release((share, *honest.self_masks[1:]), honest.mask_keys).encode()
        with pytest.raises(SecurityError, match="field element") as caught:
            attempt.server.accept_release(resigned(released, liar.key, lie))
        assert caught.value.culprits == (liar.me.hex(),)
    assert min(attempt.context.x_coordinate(member) for member in attempt.context.cohort) == 1


ELSEWHERE = {
    "another run": {"run_id": "other"},
    "another round": {"round": 2},
    "another attempt": {"attempt": 2},
}


@pytest.mark.parametrize("changes", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_replayed_message_is_refused(changes: dict[str, object]) -> None:
    """Every message of an attempt, shown in another in which the same members take part."""
    old, new = Attempt(4, drops={3: "upload"}), Attempt(4, drops={3: "upload"}, changes=changes)
    server, client, peer = new.server, new.clients[0], old.clients[0]

    old_adverts, old_shares = old.advertise(), []
    refused(server.accept_advert, peer._my_advert)
    new_adverts = new.advertise()
    refused(client.share, old_adverts)
    for dealer in old.clients:
        old_shares.append(dealer.share(old_adverts))
        old.server.accept_shares(old_shares[-1])
    refused(server.accept_shares, old_shares[0])
    old_deliveries, new_deliveries = old.server.close_shares(), new.share(new_adverts)
    refused(client.mask, old_deliveries[client.me], *new.input(client), why="my own message is missing")
    old_claim, new_claim = old.upload(old_deliveries), new.upload(new_deliveries)
    refused(client.confirm, old_claim, why="other adverts")
    old_signatures = old.confirm(old_claim)
    refused(server.accept_consistency, decode_sequence(old_signatures, 100)[0])
    new_signatures = new.confirm(new_claim)
    refused(client.release, old_signatures)
    refused(server.accept_release, peer.release(old_signatures))
    assert client.release(new_signatures)


def test_message_of_one_peer_is_refused_as_another_s() -> None:
    attempt = Attempt(3)
    one, other = attempt.clients[:2]
    posing = replace(Signed.decode(one.advertise()), sender=other.me).encode()
    with pytest.raises(SecurityError, match="signature") as caught:
        attempt.server.accept_advert(posing)
    assert caught.value.culprits == (other.me.hex(),)


def bad_dealer_attempt(drops: dict[int, str], kind: str) -> tuple[Attempt, BadDealerError]:
    """Participant 0 deals shares of another secret of one kind, and the server finds out at the end."""
    attempt = Attempt(4, drops=drops)
    adverts = attempt.advertise()
    original, calls = shamir.split, []

    def split(secret: bytes, *rest: object) -> list[bytes]:
        calls.append(secret)
        return original(b"\7" * 32 if len(calls) == (1 if kind == "self-mask" else 2) else secret, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shamir, "split", split)
        dealt = attempt.clients[0].share(adverts)
    attempt.server.accept_shares(dealt)
    for client in attempt.clients[1:]:
        attempt.server.accept_shares(client.share(adverts))
    signatures = attempt.confirm(attempt.upload(attempt.server.close_shares()))
    with pytest.raises(BadDealerError) as caught:
        attempt.release(signatures)
    return attempt, caught.value


def bad_boxes_attempt(n: int, *, bad: int) -> tuple[Attempt, dict[IdentityKey, bytes]]:
    """The last participant seals garbage, which it signs, for the first `bad` others."""
    attempt = Attempt(n)
    adverts, dealer = attempt.advertise(), attempt.clients[-1]
    victims = {client.me for client in attempt.clients[:bad]}
    honest = dealer._seal
    dealer._seal = lambda to, pair: bytes(90) if to in victims else honest(to, pair)  # type: ignore[method-assign]
    for client in attempt.clients:
        attempt.server.accept_shares(client.share(adverts))
    return attempt, attempt.server.close_shares()


def test_bad_box_is_its_dealer_s_fault_and_never_the_server_s() -> None:
    attempt, deliveries = bad_boxes_attempt(4, bad=1)
    victim, *_, dealer = attempt.clients
    with pytest.raises(BadBoxError) as caught:
        victim.mask(deliveries[victim.me], *attempt.input(victim))
    assert caught.value.dealer == dealer.me
    assert caught.value.culprits == (dealer.me.hex(),)


def test_complaints_prove_a_dealer_s_fault_once_more_complain_than_may_collude() -> None:
    """Without the count one participant could have an honest dealer thrown out."""
    attempt, _ = bad_boxes_attempt(4, bad=2)
    server, dealer = attempt.server, attempt.clients[-1].me
    first, second, third = (client.complain(dealer) for client in attempt.clients[:3])
    assert [server.accept_complaint(message) for message in (first, first, second)] == [
        (dealer, False),
        (dealer, False),
        (dealer, True),
    ]
    refused(server.accept_complaint, attempt.clients[0].complain(attempt.clients[1].me), why="said before")
    refused(server.accept_complaint, attempt.clients[2].complain(IdentityKey(bytes(32))), why="said before")
    digest = sha256(b"")
    late = Signed.make("upload", attempt.context.digest(), attempt.clients[0].key, enc(digest)).encode()
    refused(lambda message: server.accept_upload(message, digest), late, why="upload after")
    upload = Signed.make("upload", attempt.context.digest(), attempt.clients[2].key, enc(digest)).encode()
    server.accept_upload(upload, digest)
    refused(server.accept_complaint, third, why="said before")


@given(st.binary(max_size=80))
def test_complaint_of_any_bytes_is_taken_or_refused(body: bytes) -> None:
    attempt, _ = bad_boxes_attempt(3, bad=1)
    sender = attempt.clients[0]
    message = Signed.make("complaint", attempt.context.digest(), sender.key, body).encode()
    with pytest.raises(SecurityError):
        attempt.server.accept_complaint(message)


DEALERS = {"self-mask": {3: "upload"}, "mask-key": {0: "upload"}}


@pytest.mark.parametrize("kind", DEALERS)
def test_bad_dealer_is_proved_and_an_honest_one_cannot_be(kind: str) -> None:
    attempt, error = bad_dealer_attempt(DEALERS[kind], kind)
    liar = attempt.clients[0]
    assert error.culprits == (liar.me.hex(),)
    assert error.proof.kind == kind
    told = DealerProof.decode(error.proof.encode())
    assert told == error.proof
    assert told.convict(attempt.context) == liar.me
    honest = next(m for m in attempt.server._signed_dealings if m != liar.me)
    shares = {
        c.me: c._shares[honest].self_mask for c in sorted(attempt.clients, key=lambda c: c.me) if c._shares.get(honest)
    }
    shares = dict(list(shares.items())[:3])
    framed = DealerProof.make(
        attempt.server._adverts_message, attempt.server._signed_dealings[honest], "self-mask", shares
    )
    with pytest.raises(SecurityError, match="did nothing wrong"):
        framed.convict(attempt.context)
    for spoilt in (
        replace(told, shares=(bytes(33), *told.shares[1:])),
        replace(told, holders=told.holders[:-1], shares=told.shares[:-1]),
        replace(told, holders=told.holders[::-1]),
        replace(told, dealing=attempt.server._signed_dealings[honest]),
        replace(told, adverts=enc_sequence(decode_sequence(told.adverts, 100)[:3])),
    ):
        with pytest.raises(SecurityError):
            spoilt.convict(attempt.context)
    with pytest.raises(SecurityError):
        told.convict(replace(attempt.context, round=9))
    with pytest.raises(SecurityError, match="no known kind"):
        DealerProof.decode(replace(told, kind="other").encode())


def test_shares_that_give_more_than_32_bytes_convict_their_dealer() -> None:
    """The commitments match, the polynomial runs through 2²⁵⁶ at zero: no secret of 32 bytes was ever there."""
    attempt = Attempt(3)
    adverts = attempt.advertise()
    original = shamir.split

    def split(secret: bytes, entropy: bytes, count: int) -> list[bytes]:
        honest = original(bytes(32), entropy, count)
        return [((int.from_bytes(share, "big") + 2**256) % shamir.PRIME).to_bytes(33, "big") for share in honest]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shamir, "split", split)
        attempt.server.accept_shares(attempt.clients[0].share(adverts))
    for client in attempt.clients[1:]:
        attempt.server.accept_shares(client.share(adverts))
    signatures = attempt.confirm(attempt.upload(attempt.server.close_shares()))
    with pytest.raises(BadDealerError, match="32-byte") as caught:
        attempt.release(signatures)
    assert caught.value.proof.convict(attempt.context) == attempt.clients[0].me


def test_keys_recovered_in_one_round_tell_nothing_of_another() -> None:
    """A dropout's mask key and b of one round open its upload there, and nothing in the next: both are drawn anew."""
    first, second = Attempt(4), Attempt(4, changes={"round": 2})
    for attempt in (first, second):
        attempt.upload(attempt.share(attempt.advertise()))
    known = first.clients[3]._secrets

    def opened(attempt: Attempt) -> np.ndarray:
        victim = attempt.clients[3]
        left = [
            masks.pair_mask(victim._binding, victim.me, known.mask_private, c.me, victim._adverts[c.me].mask_key)
            for c in attempt.clients[:3]
        ]
        left.append(masks.self_mask(victim._binding, victim.me, known.self_mask))
        chunk = masks.unmask_chunk(iter([attempt.uploads[victim.me][0]]), left, attempt.context.layout, 0)
        return np.frombuffer(chunk, "<u4")

    assert np.array_equal(opened(first), first.lanes[3])
    assert np.mean(opened(second) == second.lanes[3]) < 0.1


def test_sizes_that_only_the_caller_can_get_wrong_are_programming_errors() -> None:
    attempt = Attempt(3)
    client = attempt.clients[0]
    with pytest.raises(ValueError, match="entropy has"):
        Client(attempt.context, client.key, bytes(5))
    with pytest.raises(ValueError, match="announced size"):
        client.mask(b"", np.zeros(1, "<u4"), attempt.scalars[0])


def test_contexts_that_cannot_be_are_refused() -> None:
    context = Attempt(4).context
    stranger = IdentityKey(SigningKey(b"\x77" * 32).public)
    for wrong in (
        {"cohort": context.cohort[::-1], "first_cohort": context.cohort[::-1]},
        {"attempt": 2, "cohort": tuple(sorted((*context.cohort[:3], stranger)))},
        {"cohort": context.cohort[:3]},
    ):
        with pytest.raises(SecurityError):
            replace(context, **wrong)
    with pytest.raises(SecurityError, match="not in the cohort"):
        make_client(context, SigningKey(b"\x77" * 32))


def test_reprs_show_sizes_and_names_only() -> None:
    attempt = Attempt(3)
    attempt.run()
    client = attempt.clients[0]
    mask = masks.self_mask(b"", client.me, bytes(32))
    masked = masks.MaskedInput(Layout(32, 1, 1), np.array([0xABCDEF], "<u4"), np.zeros(1, "<u8"), (mask,))
    shown = repr((mask, masked, Release((b"\1" * 33,), ())))
    assert shown == "(Mask(…), MaskedInput(1 lanes), Release(…))"


def test_public_key_of_another_length_is_refused() -> None:
    with pytest.raises(SecurityError, match="31 bytes"):
        agreement.check_public_key(bytes(31))


def test_tuple_of_another_attempt_is_another_tuple() -> None:
    attempt = Attempt(4)
    attempt.upload(attempt.share(attempt.advertise()))
    assert tuple_of(attempt, attempt.clients[:3]) != tuple_of(attempt, attempt.clients)
