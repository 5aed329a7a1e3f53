"""Floats ↔ ring lanes: fixed-point with one public step per tensor and room for n summands.

q = round(clamp(w·u, ±R) / step) with step = R / max|q| and max|q| = ⌊(2^(b−1) − 1)/n⌋, so that n honest values never
wrap. Rounding is stochastic from the caller's generator, hence unbiased: E[q·step] = w·u inside the range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.secagg.masks import LANE_TYPES, SCALAR_BITS, Lanes

Floats = npt.NDArray[np.float32]
LOSS_SCALE = 2**20
SCALAR_NAMES = ("rows", "loss", "norm_clipped")
"""The scalar block holds these sums, then one clip counter for each tensor."""
_SLAB = 1 << 18  # coordinates worked on at once: bounds the float64 temporaries to a few MiB


@dataclass(frozen=True)
class Grid:
    """The public quantisation of one round: tensor sizes [T], ranges R [T], the ring, and how many may be summed."""

    sizes: tuple[int, ...]
    ranges: tuple[float, ...]
    bits: int
    summands: int

    @property
    def largest(self) -> int:
        """max|q| of one participant."""
        return ((1 << (self.bits - 1)) - 1) // self.summands

    @property
    def dimension(self) -> int:
        """Coordinates of the whole vector."""
        return sum(self.sizes)

    def slabs(self) -> Iterator[tuple[int, slice, float]]:
        """(tensor index, coordinates, range) in pieces of at most `_SLAB` coordinates."""
        start = 0
        for tensor, (size, bound) in enumerate(zip(self.sizes, self.ranges, strict=True)):
            for low in range(start, start + size, _SLAB):
                yield tensor, slice(low, min(low + _SLAB, start + size)), bound
            start += size


def encode(update: Floats, weight: float, grid: Grid, generator: Generator) -> tuple[Lanes, list[int]]:
    """Lanes [d] of weight·update and, per tensor, how many coordinates lay outside ±R and were clamped."""
    if update.shape != (grid.dimension,):
        raise ValueError(f"update has shape {update.shape} instead of ({grid.dimension},)")
    lanes: Lanes = np.empty(update.size, LANE_TYPES[grid.bits])
    clipped = [0] * len(grid.sizes)
    for tensor, where, bound in grid.slabs():
        values = update[where].astype(np.float64) * weight
        if not np.isfinite(values).all():
            raise UsageError(f"update holds NaN or Inf in tensor {tensor}", hint="lower the learning rate")
        clipped[tensor] += int((np.abs(values) > bound).sum())
        scaled = np.clip(values, -bound, bound) / (bound / grid.largest)
        uniform = generator.uint32(scaled.size) / 2.0**32
        # The clip below only catches bound/step landing one float above max|q|.
        whole = np.clip(np.floor(scaled + uniform), -grid.largest, grid.largest)
        lanes[where] = whole.astype(np.int64).astype(lanes.dtype)
    return lanes, clipped


def decode_mean(total: Lanes, divisor: int, weight_cap: int, grid: Grid) -> Floats:
    """mean [d] = ((step · Σq) · w_max) / Σ min(n_k, w_max), float64 in this order, then float32.

    Elementwise arithmetic only, so that every participant gets the same bits on any processor.
    """
    if divisor <= 0:
        raise SecurityError(f"sum of weights is {divisor}, so there is no mean")
    signed: npt.NDArray[np.signedinteger[Any]] = total.view(np.dtype(f"<i{total.itemsize}"))
    mean = np.empty(total.size, np.float32)
    for _, where, bound in grid.slabs():
        step = bound / grid.largest
        mean[where] = ((signed[where].astype(np.float64) * step) * weight_cap) / divisor
    return mean


def encode_scalars(values: Sequence[int], summands: int) -> Lanes:
    """int64 values as uint64 lanes; UsageError where n of them could overflow."""
    limit = (2**63 - 1) // summands
    for index, value in enumerate(values):
        if abs(value) > limit:
            raise UsageError(f"scalar {index} is outside ±{limit}")
    return np.array(values, np.int64).view(LANE_TYPES[SCALAR_BITS])


def decode_scalars(total: Lanes) -> list[int]:
    """The sums of the scalar block as Python integers."""
    return [int(value) for value in total.view(np.dtype("<i8"))]
