"""From the masks that are left to the sum that is published."""

from collections.abc import Sequence
from pathlib import Path

from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.ids import IdentityKey
from mpctf_secure.parallel import ordered_map
from mpctf_secure.privacy.integers import Scheme, noised, to_signed
from mpctf_secure.secagg.codec import decode_scalars, encode_scalars
from mpctf_secure.secagg.masks import Mask
from mpctf_secure.secagg.parameters import MAX_COHORT


def open_sum(
    spool: Spool,
    survivors: Sequence[IdentityKey],
    left: Sequence[Mask],
    path: Path,
    scheme: Scheme | None,
    secret: bytes,
) -> bytes:
    """Write the sum to `path`, with noise by `scheme` where there is one; returns the digest of what is there.

    Noise comes first, before anybody looks at the sum: whatever depended on the bare one would tell of it. It follows
    from the secret and the sum, so that a restart computes the same. The bare sum is never under the name that is
    published.
    """
    if scheme is None:
        return spool.open_sum(survivors, left, path)
    exact = path.with_suffix(".exact")
    spool.open_sum(survivors, left, exact)
    lanes, scalars = spool.load_sum(exact)
    noisy, indicators = noised(to_signed(lanes), decode_scalars(scalars)[0], scheme, secret, ordered_map)
    digest = spool.write_sum(path, noisy, encode_scalars([indicators], MAX_COHORT))
    exact.unlink()
    return digest
