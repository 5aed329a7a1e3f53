"""Sums as the coordinator publishes them, without masks, and what follows from them."""

from collections.abc import Sequence

import numpy as np

from mpctf_secure.aggregation.bias import project
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.outcome import Sum, next_state, read_sum
from mpctf_secure.rounds.state import State
from mpctf_secure.rounds.terms import grid, projections, weight_cap
from mpctf_secure.secagg import codec

COHORT = tuple(IdentityKey(bytes([i]) * 32) for i in range(1, 5))


def total_of(
    agreed: Contract,
    state: State,
    parts: list[np.ndarray],
    rows: Sequence[int] | None = None,
    held_out: Sequence[float] | None = None,
) -> Sum:
    """The sum that as many members of COHORT as there are parts publish, each of so many rows, or of 10.

    `held_out` are the mean losses of each, where the contract holds out rows.
    """
    lattice, cap = grid(agreed, state, len(COHORT)), weight_cap(agreed, state)
    lanes, scalars = [], []
    for number, (update, count) in enumerate(zip(parts, rows or [10] * len(parts), strict=True)):
        encoded, clipped = codec.encode(update, count / cap, lattice, bytes([number]) * 32)
        lanes.append(encoded)
        projected = project(state.adapter + update, agreed.tensors, agreed.seed) if projections(agreed) else []
        shown = [round(count / cap * value * codec.PROJECTION_SCALE) for value in projected]
        measured = [round(held_out[number] * codec.LOSS_SCALE)] if held_out else []
        told = [count, count * codec.LOSS_SCALE, 0, *measured, *shown, *clipped]
        scalars.append(codec.encode_scalars(told, len(COHORT)))
    kinds = (lanes[0].dtype, scalars[0].dtype)
    sums = [np.sum(part, axis=0, dtype=kind) for part, kind in zip((lanes, scalars), kinds, strict=True)]
    return Sum(*sums, COHORT, COHORT[: len(parts)])


def after(agreed: Contract, state: State, total: Sum) -> State:
    """The state after this sum."""
    return next_state(agreed, state, read_sum(agreed, state, total))
