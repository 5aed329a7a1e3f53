"""Each refusal of PROTOCOL.md section 8: the attack is refused, and succeeds once the check is switched off.

An attack raises SecurityError where it is refused; what it returns says whether it succeeded.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from simulator import Attempt, in_order, tuple_of, with_advert

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat import agreement, shamir
from mpctf_secure.hazmat.encoding import decode_sequence, enc, enc_sequence
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.secagg import masks, verification
from mpctf_secure.secagg.messages import Advert, Delivery, Release, ShareMessage, Signed, Survivors
from mpctf_secure.secagg.server import Server
from mpctf_secure.secagg.transitions import SERVER

Switch = Callable[[pytest.MonkeyPatch], None]
ATTACKER_KEYS = b"\x51" * 32, b"\x52" * 32


def off(*targets: str) -> Switch:
    """Replace checks, which return nothing, by nothing."""

    def switch(patch: pytest.MonkeyPatch) -> None:
        for target in targets:
            patch.setattr(f"mpctf_secure.{target}", lambda *_: None)

    return switch


def substitute_a_key() -> bool:
    """The server puts its own mask key in the place of a peer's, and so knows the mask between the two."""
    attempt = Attempt(3)
    adverts = list(decode_sequence(attempt.advertise(), 100))
    forged = Advert(*map(agreement.public_key, ATTACKER_KEYS)).encode()
    adverts[1] = replace(Signed.decode(adverts[1]), body=forged).encode()
    victim = min(attempt.clients, key=lambda client: client.me)
    victim.share(enc_sequence(adverts))
    peer, mine = sorted(victim._adverts)[1], victim._adverts[victim.me].mask_key
    known = masks.pair_mask(victim._binding, peer, ATTACKER_KEYS[0], victim.me, mine)
    used = masks.pair_mask(
        victim._binding, victim.me, victim._secrets.mask_private, peer, victim._adverts[peer].mask_key
    )
    return known.vector_seed == used.vector_seed


def use_a_low_order_key() -> bool:
    """With a point of low order the shared secret is zero, and everybody knows the mask."""
    attempt = Attempt(3)
    victim, liar = attempt.clients[0], attempt.clients[2]
    victim.share(with_advert(attempt, 2, Advert(bytes(32), agreement.public_key(b"\x08" * 32))))
    mask = masks.pair_mask(victim._binding, victim.me, victim._secrets.mask_private, liar.me, bytes(32))
    return mask.vector_seed == hkdf(bytes(32), victim._binding + enc("pair-vector", *sorted((victim.me, liar.me))))


def no_low_order_checks(patch: pytest.MonkeyPatch) -> None:
    original = agreement.exchange
    off("secagg.verification._check_fresh_key")(patch)
    patch.setattr(agreement, "exchange", lambda a, b: original(a, b) if any(b) else bytes(32))


def repeat_a_key() -> bool:
    """A peer shows the victim's own keys as its own."""
    attempt = Attempt(3)
    mine = Advert.decode(Signed.decode(Attempt(3).clients[0].advertise()).body)
    return bool(attempt.clients[0].share(with_advert(attempt, 2, mine)))


def open_a_sum_of_one() -> bool:
    """The server announces a cohort and lets everybody but the victim drop."""
    attempt = Attempt(3, drops={1: "advertise", 2: "advertise"})
    with pytest.MonkeyPatch.context() as lying:
        lying.setattr(Server, "_close", lambda self, event, _: setattr(self, "state", SERVER[self.state, event]))
        return np.array_equal(attempt.run()[0], attempt.lanes[0])


def no_floors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mpctf_secure.secagg.parameters.threshold", lambda *_: 1)
    patch.setattr("mpctf_secure.secagg.parameters.floor", lambda *_: 1)
    patch.setattr("mpctf_secure.secagg.parameters.PAIR", 1)


def show_two_groups_of_advertisers() -> bool:
    """Dealers who saw different U1 are brought together."""
    attempt = Attempt(5)
    adverts = decode_sequence(attempt.advertise(), 100)
    first, *others = sorted(attempt.clients, key=lambda client: client.me)
    messages = [first.share(enc_sequence(adverts)), *(client.share(enc_sequence(adverts)) for client in others)]
    parts = [ShareMessage.decode(message) for message in messages]
    stale = Signed.decode(parts[1].dealing)
    body = enc(sha256(b"another U1")) + stale.body[36:]
    parts[1] = replace(parts[1], dealing=Signed.make("shares", stale.ctx, others[0].key, body).encode())
    boxes = [part.boxes[0] for part in parts[1:]]
    return bool(first.mask(Delivery(tuple(p.dealing for p in parts), tuple(boxes)).encode(), *attempt.input(first)))


def blind_to_adverts(patch: pytest.MonkeyPatch) -> None:
    original = verification.verify_dealings

    def verify(context, advertisers, adverts_hash, messages):
        found = {}
        for message in messages:
            seen = Signed.decode(message).body[4:36]
            found |= original(context, advertisers, seen, [message])
        return found

    patch.setattr("mpctf_secure.secagg.client.verify_dealings", verify)


def blame_a_dealer_for_my_box() -> bool:
    """The server exchanges a box, and an honest dealer is accused."""
    attempt = Attempt(3)
    deliveries = attempt.share(attempt.advertise())
    victim = attempt.clients[0]
    delivery = Delivery.decode(deliveries[victim.me])
    spoilt = replace(delivery, boxes=(bytes(90), *delivery.boxes[1:])).encode()
    dealer = min(client.me for client in attempt.clients[1:])
    try:
        victim.mask(spoilt, *attempt.input(victim))
    except SecurityError as error:
        if error.culprits != (dealer.hex(),):
            raise
        return True
    return False


def deal_a_share_unlike_its_commitment() -> bool:
    """A dealer makes the round fail later, when nobody can say who it was."""
    attempt = Attempt(3)
    adverts = attempt.advertise()
    bad, victim = attempt.clients[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpctf_secure.secagg.client.commitment", lambda *_: bytes(32))
        attempt.server.accept_shares(bad.share(adverts))
    for client in attempt.clients[1:]:
        attempt.server.accept_shares(client.share(adverts))
    return bool(victim.mask(attempt.server.close_shares()[victim.me], *attempt.input(victim)))


def mask_two_inputs_alike() -> bool:
    """Two inputs under the same masks: their difference is there to read."""
    attempt = Attempt(3)
    client = attempt.clients[0]
    delivery = attempt.share(attempt.advertise())[client.me]
    first = np.frombuffer(client.mask(delivery, attempt.lanes[0], attempt.scalars[0]).chunk(0), "<u4")
    second = np.frombuffer(client.mask(delivery, attempt.lanes[1], attempt.scalars[1]).chunk(0), "<u4")
    return np.array_equal(first - second, attempt.lanes[0] - attempt.lanes[1])


def sign_another_view() -> bool:
    """A tuple with another U2 gets a signature."""
    attempt = Attempt(4)
    claim = Survivors.decode(attempt.upload(attempt.share(attempt.advertise())))
    other = replace(claim, dealers=claim.dealers[:3], survivors=claim.survivors[:3], digests=claim.digests[:3])
    signer = next(client for client in attempt.clients if client.me in other.survivors)
    return bool(signer.confirm(other.encode()))


def sign_without_being_counted() -> bool:
    """The server holds an upload, says that its owner dropped, and the owner helps."""
    attempt = Attempt(4)
    attempt.upload(attempt.share(attempt.advertise()))
    return bool(attempt.clients[3].confirm(tuple_of(attempt, attempt.clients[:3])))


def sign_for_another_upload() -> bool:
    """The server replaces an upload and its owner signs for it."""
    attempt = Attempt(3)
    claim = Survivors.decode(attempt.upload(attempt.share(attempt.advertise())))
    return all(client.confirm(replace(claim, digests=(bytes(32),) * 3).encode()) for client in attempt.clients)


def open_two_survivor_sets(sign_twice: bool) -> bool:
    """{0, 1, 2} and {0, 1, 2, 3} are opened, and the difference is the input of 3."""
    attempt = Attempt(4)
    attempt.upload(attempt.share(attempt.advertise()))
    sums = []
    for group in (attempt.clients[:3], attempt.clients):
        claim = tuple_of(attempt, group)
        signers = attempt.clients[:3] if sign_twice else [attempt.clients[0 if len(group) == 3 else 3]]
        signatures = in_order(client.confirm(claim) for client in signers)
        releases = [Release.decode(Signed.decode(client.release(signatures)).body) for client in signers]
        sums.append((Survivors.decode(claim), signers, releases))
    if not sign_twice:
        return True
    opened = [attempt.open_from(claim, signers, releases) for claim, signers, releases in sums]
    return np.array_equal(opened[1] - opened[0], attempt.lanes[3])


def replay_an_advert() -> bool:
    """An advert of another round is taken for one of this."""
    attempt, other = Attempt(3), Attempt(3, changes={"round": 2})
    attempt.server.accept_advert(other.clients[0].advertise())
    return other.clients[0].me in attempt.server.received


def replay_a_release() -> bool:
    """A confirmation is replayed by the server as somebody else's."""
    attempt = Attempt(3)
    attempt.upload(attempt.share(attempt.advertise()))
    claim = tuple_of(attempt, attempt.clients)
    one = Signed.decode(attempt.clients[0].confirm(claim))
    attempt.clients[1].confirm(claim)
    copies = [replace(one, sender=client.me).encode() for client in attempt.clients]
    return bool(attempt.clients[1].release(in_order(copies)))


def spoil_an_upload() -> bool:
    """An upload that was changed on its way enters the sum."""
    attempt = Attempt(3)
    deliveries = attempt.share(attempt.advertise())
    for client, lanes, scalars in zip(attempt.clients, attempt.lanes, attempt.scalars, strict=True):
        chunks = list(client.mask(deliveries[client.me], lanes, scalars).chunks())
        attempt.server.accept_upload(client.declare(sha256(b"".join(chunks))), sha256(b"other"))
    return len(decode_sequence(enc_sequence(attempt.server.received), 100)) == 3


def frame_a_dealer_by_a_release() -> bool:
    """A survivor releases another share, and the honest dealer of it looks guilty."""
    attempt = Attempt(3)
    signatures = attempt.confirm(attempt.upload(attempt.share(attempt.advertise())))
    liar = attempt.clients[0]
    honest = Release.decode(Signed.decode(liar.release(signatures)).body)
    lie = Release((bytes(33), *honest.self_masks[1:]), honest.mask_keys).encode()
    attempt.server.accept_release(Signed.make("release", attempt.context.digest(), liar.key, lie).encode())
    for client in attempt.clients[1:]:
        attempt.server.accept_release(client.release(signatures))
    framed = attempt.server._survivor_tuple.survivors[0]
    try:
        attempt.server.close_releases()
    except SecurityError as error:
        return error.culprits == (framed.hex(),)
    return False


def deal_another_secret() -> bool:
    """A dealer's shares match its commitments and give another seed: the sum is spoilt and nobody notices."""
    attempt = Attempt(3)
    adverts = attempt.advertise()
    original = shamir.split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shamir, "split", lambda secret, *rest: original(b"\7" * 32, *rest))
        attempt.server.accept_shares(attempt.clients[0].share(adverts))
    for client in attempt.clients[1:]:
        attempt.server.accept_shares(client.share(adverts))
    survivors = attempt.upload(attempt.server.close_shares())
    opened = attempt.opened(attempt.release(attempt.confirm(survivors)))
    return not np.array_equal(opened[0], attempt.plain()[0])


def blind_recovery(patch: pytest.MonkeyPatch) -> None:
    def recover(context, kind, dealer, advert, dealing, shares):
        return shamir.combine({context.x_coordinate(member): share for member, share in shares.items()})

    patch.setattr("mpctf_secure.secagg.server.recover", recover)


class Case(NamedTuple):
    attack: Callable[[], bool]
    switch: Switch


CASES = {
    "substituted key": Case(substitute_a_key, off("secagg.messages.Signed.verify")),
    "key of low order": Case(use_a_low_order_key, no_low_order_checks),
    "repeated key": Case(repeat_a_key, off("secagg.verification._check_fresh_key")),
    "sum of one": Case(open_a_sum_of_one, no_floors),
    "two U1": Case(show_two_groups_of_advertisers, blind_to_adverts),
    "box of the server's": Case(blame_a_dealer_for_my_box, off("secagg.client.Client._check_box")),
    "share unlike its commitment": Case(deal_a_share_unlike_its_commitment, off("secagg.client.check_share")),
    "second masked vector": Case(mask_two_inputs_alike, off("secagg.client.Client._advance")),
    "another view": Case(sign_another_view, off("secagg.client.Client._check_view")),
    "left out of the tuple": Case(sign_without_being_counted, off("secagg.client.Client._check_counted")),
    "another upload in the tuple": Case(sign_for_another_upload, off("secagg.client.Client._check_counted")),
    "second tuple": Case(lambda: open_two_survivor_sets(True), off("secagg.client.Client._advance")),
    "too few signatures": Case(lambda: open_two_survivor_sets(False), off("secagg.client.Client._check_signatures")),
    "replayed advert": Case(replay_an_advert, off("secagg.messages.Signed.verify")),
    "replayed confirmation": Case(replay_a_release, off("secagg.messages.Signed.verify")),
    "spoilt upload": Case(spoil_an_upload, off("secagg.server._check_digest")),
    "spoilt release": Case(frame_a_dealer_by_a_release, off("secagg.server.check_share")),
    "dealer's other secret": Case(deal_another_secret, blind_recovery),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attack_is_refused_and_succeeds_without_the_check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SecurityError):
        case.attack()
    case.switch(monkeypatch)
    assert case.attack()
