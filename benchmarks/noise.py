"""How fast exact integer noise is drawn, and what 20 million coordinates of it cost beside a round on a GPU.

Usage: python benchmarks/noise.py

The round: 500 rows of 512 tokens through a model of 7·10⁹ weights, 4 FLOPs a weight and token with LoRA (forward, and
backward for activations alone), at 40 % of an H100's 989·10¹² bfloat16 FLOPs a second. Noise, clipping and rounding
may take a third of that together. The peer is numpy's float Gaussian, which is neither secure nor exact.
"""

import os
import sys
import time
from collections.abc import Callable

import numpy as np
from secagg import machine

from mpctf_secure.parallel import ordered_map
from mpctf_secure.privacy.integers import Scheme, noised, to_integers

COORDINATES = 20_000_000
ROWS, TOKENS, WEIGHTS, FLOPS = 500, 512, 7e9, 0.4 * 989e12
MOST = ROWS * TOKENS * WEIGHTS * 4 / FLOPS / 3
PASSES = 3


def best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of some passes."""
    seconds = []
    for _ in range(PASSES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> int:
    """Measure and print; 1 if the noise of an adapter takes longer than it may."""
    print(machine())
    scheme = Scheme(summands=10, shares=5, noise_multiplier=1.9, indicator_noise=None, clip_norm=1.0)
    update = np.random.default_rng(0).standard_normal(COORDINATES, np.float32)
    few = to_integers(update[: 1 << 21], scheme)[0]
    alone = few.size / best(lambda: noised(few, 0, scheme, bytes(32)))
    peer = few.size / best(lambda: np.random.default_rng(0).standard_normal(few.size))
    print(f"one core: {alone / 1e6:.1f} million draws a second, numpy's floats {peer / 1e6:.1f}: × {alone / peer:.2f}")
    whole = best(lambda: noised(to_integers(update, scheme)[0], 0, scheme, bytes(32), ordered_map))
    print(
        f"{COORDINATES / 1e6:.0f} million coordinates on {os.cpu_count()} cores: {whole:.1f} s of {MOST:.1f} s, "
        f"a third of {ROWS} rows of {TOKENS} tokens at 7B on an H100"
    )
    return 0 if whole <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
