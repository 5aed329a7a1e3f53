"""How a round ends: the one function that makes the next state from a published sum, and the one for a void round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress, islice

import numpy as np

from mpctf_secure.aggregation import bias, server
from mpctf_secure.aggregation.lora import Vector, pick, put
from mpctf_secure.config.privacy import Adaptive
from mpctf_secure.errors import COORDINATOR, ParticipationError, SecurityError
from mpctf_secure.hazmat.prg import Run
from mpctf_secure.ids import IdentityKey
from mpctf_secure.privacy.integers import Scheme, check_sum, next_clip_norm, to_mean, to_signed
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.state import State, Survey
from mpctf_secure.rounds.terms import grid, is_survey, measures, moving_tensors, noise_scheme, projections, weight_cap
from mpctf_secure.secagg.chunks import Lanes
from mpctf_secure.secagg.codec import LOSS_SCALE, PROJECTION_SCALE, SCALAR_NAMES, Grid, decode_mean, decode_scalars
from mpctf_secure.secagg.parameters import Context

MOST_CLIPPED = 0.01
_HEADROOM = 8.0
_SMALLEST_RANGE = 2.0**-20


@dataclass(frozen=True)
class Sum:
    """A published sum: lanes [d], scalars, the cohort its grid was made for, and whose inputs it holds."""

    lanes: Lanes
    scalars: Lanes
    first_cohort: tuple[IdentityKey, ...]
    survivors: tuple[IdentityKey, ...]


def sum_of(context: Context, survivors: tuple[IdentityKey, ...], chunks: Sequence[bytes]) -> Sum:
    """The sum in its chunks, the scalar block last; the caller has checked their sizes."""
    return Sum(*context.layout.join(chunks), context.first_cohort, survivors)


@dataclass(frozen=True)
class RoundSummary:
    """The published scalars of a round that trained, in plain units; under `record_dpsgd` neither rows nor loss."""

    rows: int | None
    mean_loss: float | None
    norm_clipped: int
    coordinates_clipped: float  # share of all
    loss_before: float | None = None
    """Of the adapter that the round began with: the mean of the sites' losses on their held-out rows."""
    projections: tuple[float, ...] = ()
    """Of the mean product of the factors, where both are averaged."""


@dataclass(frozen=True)
class Aggregate:
    """What the sum of a round that trained says of the tensors that moved: mean update [d], next ranges [T] and C.

    With noise there is no summary, which would have none.
    """

    summary: RoundSummary | None
    mean: Vector
    ranges: tuple[float, ...]
    clip_norm: float


def read_sum(contract: Contract, state: State, total: Sum, run: Run = map) -> Aggregate | Survey:
    """What was published after `state`; SecurityError where it cannot be an honest sum.

    A forged sum inside the bounds stays undetected: secure aggregation proves nothing about the sum itself.
    """
    if is_survey(contract, state):
        return _checked_survey(total)
    if scheme := noise_scheme(contract, state.clip_norm, len(total.first_cohort)):
        return _read_noised(contract, state, total, scheme)
    lattice, cap = grid(contract, state, len(total.first_cohort)), weight_cap(contract, state)
    rows, summary = _summary(contract, state, total)
    most_rows = len(total.survivors) * cap
    if not len(total.survivors) <= rows <= most_rows:
        raise SecurityError(f"published sum counts {rows} rows of {most_rows}", culprits=[COORDINATOR])
    mean = decode_mean(total.lanes, rows, cap, lattice, run)
    _check_norm(contract, lattice, mean, most_rows / rows)
    ranges = _next_ranges(contract, lattice, summary, mean, rows / most_rows)
    return Aggregate(summary, mean, ranges, state.clip_norm)


def _read_noised(contract: Contract, state: State, total: Sum, scheme: Scheme) -> Aggregate:
    values, survivors, privacy = to_signed(total.lanes), len(total.survivors), contract.privacy
    check_sum(values, survivors, scheme, central=not privacy.holds_against_coordinator)
    (indicators,) = decode_scalars(total.scalars)
    clip_norm = state.clip_norm
    if isinstance(privacy, Adaptive):
        clip_norm = next_clip_norm(clip_norm, indicators, survivors, privacy)
    elif indicators:
        raise SecurityError("published sum has an indicator that nobody asked for", culprits=[COORDINATOR])
    ranges = tuple(compress(state.ranges, moving_tensors(contract, state)))
    return Aggregate(None, to_mean(values, survivors, scheme), ranges, clip_norm)


def next_state(contract: Contract, state: State, said: Aggregate | Survey) -> State:
    """Apply the aggregation strategy to what a sum has said."""
    if isinstance(said, Survey):
        return replace(state, round=state.round + 1, survey=said)
    which, ranges = moving_tensors(contract, state), iter(said.ranges)
    adapter, *moments = _step(contract, state, which, said.mean)
    if not all(np.isfinite(vector).all() for vector in (adapter, *moments)):
        raise SecurityError("published sum leads to a model that is no number", culprits=[COORDINATOR])
    return replace(
        state,
        round=state.round + 1,
        adapter=adapter,
        moments=tuple(moments),
        clip_norm=said.clip_norm,
        ranges=tuple(next(ranges) if moves else width for width, moves in zip(state.ranges, which, strict=True)),
    )


def bias_of_means(contract: Contract, state: State, said: Aggregate) -> float | None:
    """How far averaging both factors has led from averaging their products, as a share of the round's movement.

    An estimate, by a fifth or so up or down; None where only one factor moves, which has no bias.
    """
    if said.summary is None or not said.summary.projections:
        return None
    before, after = (
        bias.project(vector, contract.tensors, contract.seed) for vector in (state.adapter, state.adapter + said.mean)
    )
    return bias.share(said.summary.projections, after, before)


def _summary(contract: Contract, state: State, total: Sum) -> tuple[int, RoundSummary]:
    """How many rows the sum counts, and what it says."""
    others = iter(decode_scalars(total.scalars))
    rows, loss, norm_clipped = islice(others, len(SCALAR_NAMES))
    measured = list(islice(others, measures(contract)))
    projected = list(islice(others, projections(contract)))
    counted = max(rows, 1)
    scale = weight_cap(contract, state) / (PROJECTION_SCALE * counted)
    hidden = contract.privacy.record_dpsgd is not None
    return rows, RoundSummary(
        rows=None if hidden else rows,
        mean_loss=None if hidden else loss / LOSS_SCALE / counted,
        norm_clipped=norm_clipped,
        coordinates_clipped=sum(others) / (len(total.survivors) * total.lanes.size),
        loss_before=measured[0] / LOSS_SCALE / len(total.survivors) if measured else None,
        projections=tuple(value * scale for value in projected),
    )


def _checked_survey(total: Sum) -> Survey:
    survey = Survey(*decode_scalars(total.scalars))
    if min(survey) < len(total.survivors):
        raise SecurityError(f"published sum counts {survey.rows} rows", culprits=[COORDINATOR])
    return survey


def _step(contract: Contract, state: State, which: Sequence[bool], mean: Vector) -> list[Vector]:
    """The vectors after the server's step on the coordinates that travelled."""
    schema = contract.tensors
    parts = tuple(pick(vector, schema, which) for vector in state.vectors)
    stepped = server.step(contract.aggregation, parts, mean)
    return [put(vector, schema, which, part) for vector, part in zip(state.vectors, stepped, strict=True)]


def void_state(contract: Contract, state: State, convicted: IdentityKey | None) -> State:
    """The next state after a round that could not be finished; ParticipationError for one more than the contract bears.

    The model and its ranges stay; the round number goes on, so the next round takes the next slice of data. A convicted
    dealer enters the state: a coordinator that shows the proof to some only gets two states, and no quorum for either.
    """
    if state.voids == contract.void_rounds:
        raise ParticipationError(f"round {state.round + 1} is void, and the contract bears {state.voids} void rounds")
    out = {*state.convicted, *([convicted] if convicted else [])}
    return replace(state, round=state.round + 1, voids=state.voids + 1, convicted=tuple(sorted(out)))


def _next_ranges(
    contract: Contract, lattice: Grid, summary: RoundSummary, mean: Vector, mean_weight: float
) -> tuple[float, ...]:
    """For each tensor that moved 2^e just above 8 times the largest weighted mean, between 2⁻²⁰·C and C.

    C again for all where too much was clipped, or where a tensor did not move and so gives no scale.
    """
    clip_norm = contract.privacy.clip_norm
    largest = [top * mean_weight for top in _largest(lattice, mean)]
    if summary.coordinates_clipped > MOST_CLIPPED or min(largest) == 0:
        return (clip_norm,) * len(largest)
    powers = (float(np.ldexp(1.0, int(np.frexp(_HEADROOM * top)[1]))) for top in largest)
    return tuple(min(max(power, _SMALLEST_RANGE * clip_norm), clip_norm) for power in powers)


def _largest(lattice: Grid, mean: Vector) -> list[float]:
    """max|mean| of each tensor [T]. A maximum, unlike a sum or a norm, has the same bits everywhere."""
    largest = [0.0] * len(lattice.sizes)
    for tensor, where in lattice.parts():
        largest[tensor] = max(largest[tensor], float(np.abs(mean[where]).max()))
    return largest


def _check_norm(contract: Contract, lattice: Grid, mean: Vector, dilution: float) -> None:
    """‖mean‖ ≤ C and the most that stochastic rounding can add: one step a coordinate and participant, and not above C
    again, for false row counts make it as large as one likes.
    """
    norm = math.sqrt(sum(float(np.square(mean[where], dtype=np.float64).sum()) for _, where in lattice.parts()))
    steps = zip(lattice.sizes, lattice.steps, strict=True)
    rounding = dilution * math.sqrt(sum(size * step**2 for size, step in steps))
    clip_norm = contract.privacy.clip_norm
    if not norm <= (clip_norm + min(rounding, clip_norm)) * (1 + 1e-6):
        raise SecurityError(f"published mean has norm {norm:.3g}, above the clip norm", culprits=[COORDINATOR])
