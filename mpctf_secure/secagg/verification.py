"""Checks that both ends make on signed messages. Each returns what it verified or raises and names the culprit."""

from collections.abc import Sequence

from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat import agreement, shamir
from mpctf_secure.ids import IdentityKey
from mpctf_secure.secagg.messages import Advert, Dealing, Signed, commitment
from mpctf_secure.secagg.parameters import Context

COORDINATOR = "coordinator"


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
            _check_fresh_key(public, seen, culprits)
        adverts[message.sender] = advert
    return adverts


def _check_fresh_key(public: bytes, seen: set[bytes], culprits: Sequence[str]) -> None:
    try:
        agreement.check_public_key(public)
    except SecurityError as error:
        raise SecurityError(f"advert: {error.message}", culprits=culprits) from error
    # A reflected key would make somebody share a mask with itself, or give two pairs the same one.
    if public in seen:
        raise SecurityError("advert repeats a public key", culprits=culprits)
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


def check_shares(
    ctx: bytes,
    dealer: IdentityKey,
    recipient: IdentityKey,
    dealing: Dealing,
    index: int,
    self_mask_share: bytes | None,
    mask_key_share: bytes | None,
) -> None:
    """Refuse a share (None: not this kind) that is no field element or not the one the dealer committed to."""
    for kind, share, commitments in (
        ("self-mask", self_mask_share, dealing.self_mask_shares),
        ("mask-key", mask_key_share, dealing.mask_key_shares),
    ):
        if share is None:
            continue
        shamir.check_share(share)
        if commitment(ctx, dealer, recipient, kind, share) != commitments[index]:
            raise SecurityError(f"{kind} share does not match the dealer's commitment")
