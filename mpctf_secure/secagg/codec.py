"""Floats ↔ ring lanes: fixed-point with one public step per tensor and room for n summands.

q = round(clamp(w·u, ±R) / step) with step = R / max|q| and max|q| = ⌊(2^(b−1) − 1)/n⌋, so that n honest values never
wrap. Rounding is stochastic, hence unbiased: E[q·step] = w·u inside the range. Its bits come from the keystream of a
seed: slab k, 2¹⁸ coordinates, uses chunk k, so slabs can be encoded by any thread in any order.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.hazmat.prg import CHUNK_BYTES, Run, keystream
from mpctf_secure.secagg.chunks import LANE_TYPES, SCALAR_BITS, Lanes

Floats = npt.NDArray[np.float32]

LOSS_SCALE = 2**20
PROJECTION_SCALE = 2**40
SCALAR_NAMES = ("rows", "loss", "norm_clipped")
"""The scalar block holds these sums, then the loss on held-out rows where there are any, then projections if there are
any, then a clip counter for each tensor."""
SLAB = CHUNK_BYTES // 4  # a draw a coordinate, as wide as its lane, fits into a chunk
_WORK_TYPES = {16: np.float32, 32: np.float64}  # beside max|q| these hold 10 and 22 bits of fraction


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

    @property
    def steps(self) -> list[float]:
        """What one unit of a lane is worth in each tensor [T]."""
        return [bound / self.largest for bound in self.ranges]

    def slabs(self) -> list[list[tuple[int, slice]]]:
        """For each `SLAB` of the vector the tensors in it and their coordinates there."""
        slabs: list[list[tuple[int, slice]]] = [[] for _ in range(-(-self.dimension // SLAB))]
        start = 0
        for tensor, size in enumerate(self.sizes):
            end = start + size
            while start < end:
                number = start // SLAB
                stop = min(end, (number + 1) * SLAB)
                slabs[number].append((tensor, slice(start, stop)))
                start = stop
        return slabs

    def parts(self) -> Iterator[tuple[int, slice]]:
        """The same without the slabs' borders."""
        return itertools.chain.from_iterable(self.slabs())


def encode(update: Floats, weight: float, grid: Grid, seed: bytes, run: Run = map) -> tuple[Lanes, list[int]]:
    """Lanes [d] of weight·update and, per tensor, how many coordinates lay outside ±R and were clamped.

    UsageError names the tensor of a coordinate that is not a number.
    """
    if update.shape != (grid.dimension,):
        raise ValueError(f"update has shape {update.shape} instead of ({grid.dimension},)")
    lanes: Lanes = np.empty(update.size, LANE_TYPES[grid.bits])
    factors = [weight / step for step in grid.steps]
    slabs = grid.slabs()
    work_type = _WORK_TYPES[grid.bits]
    spare: list[npt.NDArray[np.floating[Any]]] = []  # one a thread: fresh pages would cost more than the arithmetic

    def encode_slab(number: int) -> list[tuple[int, int]]:
        """Fill the lanes of one slab; for each of its parts (tensor, coordinates that were clipped)."""
        scratch = spare.pop() if spare else np.empty((2, SLAB), work_type)
        parts = slabs[number]
        first = parts[0][1].start
        scaled, other = scratch[:, : parts[-1][1].stop - first]
        inside = [(tensor, slice(where.start - first, where.stop - first)) for tensor, where in parts]
        for (tensor, where), (_, here) in zip(parts, inside, strict=True):
            np.multiply(update[where], factors[tensor], out=scaled[here], dtype=work_type)
        clipped = _clamp(scaled, grid.largest, inside, other)
        draws = keystream(seed, number, scaled.size * lanes.itemsize).view(lanes.dtype)
        scaled += np.multiply(draws, 2.0**-grid.bits, out=other, dtype=work_type)
        np.floor(scaled, out=scaled)
        # max|q| plus a draw just below 1 may round up to the next float, which is beyond the headroom.
        np.minimum(scaled, grid.largest, out=scaled)
        # A negative float has no unsigned value: it is written as the signed integer that it is.
        np.copyto(lanes[first : first + scaled.size].view(f"<i{lanes.itemsize}"), scaled, casting="unsafe")
        spare.append(scratch)
        return clipped

    clipped = [0] * len(grid.sizes)
    for counts in run(encode_slab, range(len(slabs))):
        for tensor, count in counts:
            clipped[tensor] += count
    return lanes, clipped


def _clamp(
    scaled: npt.NDArray[np.floating[Any]],
    largest: int,
    parts: Sequence[tuple[int, slice]],
    scratch: npt.NDArray[np.floating[Any]],
) -> list[tuple[int, int]]:
    """Clamp `scaled` [s] in place to ±max|q|; (tensor, how many were outside) for each part."""
    magnitudes = np.abs(scaled, out=scratch)
    most = magnitudes.max()
    if most <= largest:
        return []
    for tensor, where in parts:
        if not np.isfinite(magnitudes[where]).all():
            raise UsageError(f"update holds NaN or Inf in tensor {tensor}", hint="lower the learning rate")
    np.clip(scaled, -largest, largest, out=scaled)
    return [(tensor, int(np.count_nonzero(magnitudes[where] > largest))) for tensor, where in parts]


def decode_mean(total: Lanes, divisor: int, weight_cap: int, grid: Grid, run: Run = map) -> Floats:
    """mean [d] = ((step · Σq) · w_max) / Σ min(n_k, w_max), float64 in this order, then float32.

    Elementwise arithmetic only, so that every participant gets the same bits on any processor.
    """
    if divisor <= 0:
        raise SecurityError(f"sum of weights is {divisor}, so there is no mean")
    signed: npt.NDArray[np.signedinteger[Any]] = total.view(np.dtype(f"<i{total.itemsize}"))
    mean, steps = np.empty(total.size, np.float32), grid.steps

    def decode_slab(slab: list[tuple[int, slice]]) -> None:
        for tensor, where in slab:
            mean[where] = ((signed[where].astype(np.float64) * steps[tensor]) * weight_cap) / divisor

    for _ in run(decode_slab, grid.slabs()):
        pass
    return mean


def scalar_limit(summands: int) -> int:
    """The largest magnitude of a scalar of which so many can be added up."""
    return (2**63 - 1) // summands


def saturated(value: float, summands: int) -> int:
    """A scalar that only informs, rounded; one that is too large ends no run but is the limit, as NaN is."""
    limit = scalar_limit(summands)
    if abs(value) < limit:
        return round(value)
    return -limit if value < 0 else limit


def encode_scalars(values: Sequence[int], summands: int) -> Lanes:
    """int64 values as uint64 lanes; UsageError where n of them could overflow."""
    limit = scalar_limit(summands)
    for index, value in enumerate(values):
        if abs(value) > limit:
            raise UsageError(f"scalar {index} is outside ±{limit}", hint="lower training.learning_rate")
    return np.array(values, np.int64).view(LANE_TYPES[SCALAR_BITS])


def decode_scalars(total: Lanes) -> list[int]:
    """The sums of the scalar block as Python integers."""
    return [int(value) for value in total.view(np.dtype("<i8"))]
