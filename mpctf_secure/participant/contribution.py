"""What a site puts into a round: from a trained adapter to lanes and scalars."""

import math
from dataclasses import dataclass

import numpy as np

from mpctf_secure.aggregation.bias import project
from mpctf_secure.aggregation.lora import Vector, pick
from mpctf_secure.config.privacy import NoNoise
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.parallel import ordered_map
from mpctf_secure.participant.attempts import Input
from mpctf_secure.privacy.clipping import clip_to_norm
from mpctf_secure.privacy.integers import Scheme, indicate, noised, to_integers
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.state import State
from mpctf_secure.rounds.terms import grid, moving_tensors, noise_scheme, projections, weight_cap
from mpctf_secure.secagg import codec
from mpctf_secure.secagg.parameters import MAX_COHORT, Context
from mpctf_secure.training.launch.job import Trained


@dataclass(frozen=True)
class Contribution:
    """An update [d], its weight, and the scalars before the clip counters.

    Where noise is added neither clipped nor weighed, and without scalars.
    """

    update: Vector
    weight: float = 1.0
    scalars: tuple[int, ...] = ()


def of_sizes(sizes: tuple[int, ...]) -> Contribution:
    """To a round that only adds up sizes."""
    return Contribution(np.zeros(0, np.float32), scalars=sizes)


def of_training(contract: Contract, state: State, trained: Trained, own_clip_norm: float | None) -> Contribution:
    """Clipped to the site's own norm where that is smaller than the contract's.

    UsageError for an update that is not a number or cannot be summed: before this site is counted in a cohort.

    Not where noise is added: there it will count as nothing, as that it is none would be a bit that no noise hides.
    Under `record_dpsgd` the adapter is what training may tell: every site counts alike, and no loss is told.
    """
    moved = pick(trained.adapter - state.adapter, contract.tensors, moving_tensors(contract, state))
    if not isinstance(contract.privacy, NoNoise):
        if own_clip_norm is not None and np.isfinite(moved).all():
            moved, _ = clip_to_norm(moved, own_clip_norm)
        return Contribution(moved)
    update, norm_clipped = clip_to_norm(moved, min(contract.privacy.clip_norm, own_clip_norm or math.inf))
    cap = weight_cap(contract, state)
    counted, loss = cap, 0
    if not contract.privacy.record_dpsgd:
        counted = min(trained.rows, cap)
        loss = round(trained.loss * counted * codec.LOSS_SCALE)
    told = (counted, loss, int(norm_clipped), *_measured(trained))
    scalars = (*told, *projected(contract, state.adapter, update, counted / cap))
    codec.encode_scalars(scalars, MAX_COHORT)
    return Contribution(update, counted / cap, scalars)


def _measured(trained: Trained) -> list[int]:
    """How well the adapter that the round began with does on this site's held-out rows."""
    if trained.held_out is None:
        return []
    return [codec.saturated(trained.held_out.loss_before * codec.LOSS_SCALE, MAX_COHORT)]


def projected(contract: Contract, adapter: Vector, update: Vector, weight: float) -> list[int]:
    """The weighted projections of the product of the factors after an update; none where only one factor moves."""
    if not projections(contract):
        return []
    values = project(adapter + update, contract.tensors, contract.seed)
    return [codec.saturated(weight * value * codec.PROJECTION_SCALE, MAX_COHORT) for value in values]


def encode(
    contract: Contract,
    state: State,
    contribution: Contribution,
    context: Context,
    run_secret: bytes,
    round_secret: bytes,
) -> Input:
    """Weigh and quantise the update, or add noise; without masks the coordinator clips it, and gets its floats.

    Rounding bits come from the run's secret and the update itself, noise from the round's secret.
    """
    members = len(context.first_cohort)
    scheme = noise_scheme(contract, state.clip_norm, members)
    if scheme and not contract.secure:
        return contribution.update.view(np.uint32), codec.encode_scalars([0], MAX_COHORT)
    if scheme:
        return _encode_integers(
            contribution.update, scheme, round_secret, own=contract.privacy.holds_against_coordinator
        )
    info = enc("mpctf-secure/rounding/v1", context.round, sha256(contribution.update.tobytes()), members)
    lanes, clipped = codec.encode(
        contribution.update, contribution.weight, grid(contract, state, members), hkdf(run_secret, info), ordered_map
    )
    return lanes, codec.encode_scalars([*contribution.scalars, *clipped], members)


def _encode_integers(update: Vector, scheme: Scheme, secret: bytes, *, own: bool) -> Input:
    """With this site's own share of the noise, or for the coordinator to add it."""
    values, fits = to_integers(update, scheme)
    lanes, indicator = values.astype(np.uint32), indicate(fits, scheme)
    if own:
        lanes, indicator = noised(values, indicator, scheme, secret, ordered_map)
    return lanes, codec.encode_scalars([indicator], MAX_COHORT)
