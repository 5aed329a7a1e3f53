"""A white-box audit: what a mechanism that was run many times in two worlds promises at the most.

The worlds differ in one contribution. Whoever sees the noise's direction can tell them apart by one number, which is
normal in both, `mu` standard deviations apart (Nasr et al. 2023 call it the strongest adversary). From so many runs
follows a mu that it surely has, and so an ε that it surely does not keep below.
"""

import math

import numpy as np
import numpy.typing as npt

from mpctf_secure.privacy.gaussian import epsilon

Floats = npt.NDArray[np.float64]
_SIGMAS = 3.0  # 1 in 700 right mechanisms is suspected


def lower_bound(with_contribution: Floats, without: Floats, delta: float) -> float:
    """ε that the mechanism exceeds, from the adversary's number in runs of either world [n], [m]; 0 if it may hide all.

    ValueError for fewer than a hundred runs of a world.
    """
    runs = min(with_contribution.size, without.size)
    if runs < 100:
        raise ValueError(f"{runs} runs of a world show nothing")
    spread = math.sqrt((with_contribution.var(ddof=1) + without.var(ddof=1)) / 2)
    apart = abs(float(with_contribution.mean() - without.mean())) / spread
    # Of the difference of means, and of the spread, which has a relative error of 1/√(2·2n).
    error = math.sqrt(1 / with_contribution.size + 1 / without.size + apart**2 / (4 * runs))
    return epsilon(max(apart - _SIGMAS * error, 0.0), delta)
