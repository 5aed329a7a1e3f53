"""Checks that both ends make on signed messages. Each returns what it verified or raises and names the culprit."""

from collections.abc import Mapping, Sequence

from mpctf_secure.errors import COORDINATOR, SecurityError, blaming
from mpctf_secure.hazmat import agreement, shamir
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.messages import SELF_MASK, Advert, Dealing, Signed, commitment, self_mask_commitment
from mpctf_secure.secagg.parameters import Context


def verify_adverts(context: Context, messages: Sequence[bytes]) -> dict[IdentityKey, Advert]:
    """U1 with its keys: signed by distinct cohort members in ascending order, no key used twice or of low order."""
    ctx = context.digest()
    adverts: dict[IdentityKey, Advert] = {}
    seen: set[bytes] = set()
    for message in map(Signed.decode, messages):
        message.verify("advert", ctx)
        culprits = [message.sender.hex()]
        if message.sender not in context.cohort or message.sender <= max(adverts, default=b""):
            raise SecurityError("advert is out of order or of somebody outside the cohort", culprits=culprits)
        advert = Advert.decode(message.body)
        for public in (advert.mask_key, advert.share_key):
            _check_fresh_key(public, seen, message.sender)
        adverts[message.sender] = advert
    return adverts


def _check_fresh_key(public: bytes, seen: set[bytes], sender: IdentityKey) -> None:
    with blaming(sender.hex(), "advert"):
        agreement.check_public_key(public)
    # A reflected key would make somebody share a mask with itself, or give two pairs the same one.
    if public in seen:
        raise SecurityError("advert repeats a public key", culprits=[sender.hex()])
    seen.add(public)


def verify_dealings(
    context: Context, advertisers: Sequence[IdentityKey], adverts_hash: bytes, messages: Sequence[bytes]
) -> dict[IdentityKey, Dealing]:
    """U2 with its commitments: signed by distinct members of U1 in ascending order, all of which saw the same U1."""
    ctx = context.digest()
    dealings: dict[IdentityKey, Dealing] = {}
    for message in map(Signed.decode, messages):
        message.verify("shares", ctx)
        culprits = [message.sender.hex()]
        if message.sender not in advertisers or message.sender <= max(dealings, default=b""):
            raise SecurityError("shares are out of order or of somebody who did not advertise", culprits=culprits)
        dealing = Dealing.decode(message.body)
        if dealing.adverts_hash != adverts_hash:
            raise SecurityError("a dealer was shown other adverts", culprits=[COORDINATOR])
        sizes = [len(dealing.self_mask_shares), len(dealing.mask_key_shares), len(dealing.boxes) + 1]
        if sizes != [len(advertisers)] * 3:
            raise SecurityError("shares are not one for each advertiser", culprits=culprits)
        dealings[message.sender] = dealing
    return dealings


def check_share(
    ctx: bytes, dealer: IdentityKey, recipient: IdentityKey, kind: str, share: bytes, committed: bytes
) -> None:
    """Refuse a share that is no field element or not the one the dealer committed to."""
    shamir.check_share(share)
    if commitment(ctx, dealer, recipient, kind, share) != committed:
        raise SecurityError(f"{kind} share does not match the dealer's commitment")


def recover(
    context: Context,
    kind: str,
    dealer: IdentityKey,
    advert: Advert,
    dealing: Dealing,
    shares: Mapping[IdentityKey, bytes],
) -> bytes:
    """The dealer's secret from t shares that match its commitments; SecurityError if it is not the one it announced."""
    with blaming(dealer.hex(), "dealer"):
        secret = shamir.combine({context.x_coordinate(member): share for member, share in shares.items()})
    if kind == SELF_MASK:
        right = self_mask_commitment(context.digest(), dealer, secret) == dealing.self_mask
    else:
        right = agreement.public_key(secret) == advert.mask_key
    if not right:
        raise SecurityError(f"dealer's {kind} shares give another secret than it announced", culprits=[dealer.hex()])
    return secret
