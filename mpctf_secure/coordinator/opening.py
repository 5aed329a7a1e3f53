"""From the masks that are left to the sum that is published."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.ids import IdentityKey
from mpctf_secure.parallel import ordered_map
from mpctf_secure.privacy.integers import Scheme, indicate, noised, to_integers, to_signed
from mpctf_secure.privacy.noise import Integers
from mpctf_secure.secagg.codec import decode_scalars, encode_scalars, saturated
from mpctf_secure.secagg.masks import Mask
from mpctf_secure.secagg.parameters import MAX_COHORT, Context


def open_sum(
    spool: Spool,
    context: Context,
    survivors: Sequence[IdentityKey],
    left: Sequence[Mask],
    path: Path,
    scheme: Scheme | None,
    secret: bytes,
) -> bytes:
    """Write the sum to `path`, with noise by `scheme` where there is one; returns the digest of what is there.

    Noise comes first, before anybody looks at the sum: whatever depended on the bare one would tell of it. It follows
    from secret, attempt and sum, so that a restart computes the same and two rounds never do: equal sums would show
    that they are. The bare sum is on no disk.
    """
    chunks = spool.opened(survivors, left)
    if scheme is None:
        return spool.write_sum(path, chunks)
    if context.secure:
        lanes, scalars = context.layout.join(list(chunks))
        total, (indicators,) = to_signed(lanes), decode_scalars(scalars)
    else:
        total, indicators = _clipped_here(spool, context, survivors, scheme)
    seed = hkdf(secret, enc("mpctf-secure/sum-noise/v1", context.digest()))
    noisy, indicators = noised(total, indicators, scheme, seed, ordered_map)
    block = encode_scalars([saturated(indicators, MAX_COHORT)], MAX_COHORT)
    return spool.write_sum(
        path, (context.layout.cut(n, noisy, block).tobytes() for n in range(len(context.layout.sizes)))
    )


def _clipped_here(
    spool: Spool, context: Context, survivors: Sequence[IdentityKey], scheme: Scheme
) -> tuple[Integers, int]:
    """Sum and indicators of updates that came as floats in the clear, each clipped here (the MPCTF paper's server)."""
    total, indicators = np.zeros(context.layout.dimension, np.int64), 0
    for owner in survivors:
        lanes, _ = spool.upload(owner)
        values, fits = to_integers(lanes.view(np.float32), scheme)
        total += values
        indicators += indicate(fits, scheme)
    return total, indicators
