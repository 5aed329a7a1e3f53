from dataclasses import replace

import numpy as np
import pytest
from samples import make_contract as contract
from sums import COHORT, after, total_of

from mpctf_secure.aggregation.lora import flat_size, split_flat
from mpctf_secure.config.strategies import FedAdam, FedAvg, FixedSize, MaxVolume, MemoryAware, Percentage
from mpctf_secure.config.training import Training
from mpctf_secure.errors import SecurityError
from mpctf_secure.rounds.outcome import Aggregate, Sum, bias_of_means, read_sum
from mpctf_secure.rounds.state import State, Survey, initial_state
from mpctf_secure.rounds.terms import (
    grid,
    is_survey,
    moving_tensors,
    round_context,
    turn,
    volume,
    weight_cap,
)
from mpctf_secure.secagg import codec

SITES = [(100, 8), (300, 8), (100, 24), (500, 16)]
A, B = (True, False), (False, True)


def survey_of(sites: list[tuple[int, int]]) -> Sum:
    """What four sites with (rows, MiB) add up."""
    scalars = [codec.encode_scalars([rows, rows * memory], len(COHORT)) for rows, memory in sites]
    lanes = np.zeros(0, np.uint32)
    return Sum(lanes, np.sum(scalars, axis=0, dtype=scalars[0].dtype), COHORT, COHORT[: len(sites)])


def draws(size: int, scale: float = 0.01) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [(scale * generator.uniform(-1, 1, size)).astype(np.float32) for _ in COHORT]


VOLUMES = {
    "fixed_size": (FixedSize(size=40), 0, 40, 40),
    "percentage": (Percentage(share=0.1, weight_cap=30), 0, 10, 30),
    "max_volume, of more rows than there are": (MaxVolume(), 500, 167, 167),
}


@pytest.mark.parametrize(("data", "largest", "count", "cap"), VOLUMES.values(), ids=VOLUMES.keys())
def test_rows_of_a_round_and_the_most_that_weighs(data: object, largest: int, count: int, cap: int) -> None:
    agreed = contract(data=data, largest_size=largest)
    state = initial_state(agreed)
    assert not is_survey(agreed, state)
    assert (volume(agreed, state, 100, 1), weight_cap(agreed, state), turn(agreed, state)) == (count, cap, 1)


def test_memory_aware_first_adds_up_sizes_and_then_shares_them_out() -> None:
    agreed = contract(data=MemoryAware(), rounds=5)
    state = initial_state(agreed)
    context = round_context(agreed, state, COHORT)
    assert is_survey(agreed, state)
    assert (context.dimension, context.scalars, weight_cap(agreed, state)) == (0, 2, 0)
    total = survey_of(SITES)
    following = after(agreed, state, total)
    assert read_sum(agreed, state, total) == Survey(1000, 13600)
    assert (following.survey, following.round, turn(agreed, following)) == (Survey(1000, 13600), 1, 1)
    assert np.array_equal(following.adapter, state.adapter)
    assert weight_cap(agreed, following) == 250
    assert [volume(agreed, following, *site) for site in SITES] == [15, 44, 44, 147]


@pytest.mark.parametrize("sites", [[(0, 5)] * 3, [(-1, 5)] * 3, [(2, 5), (0, 5), (0, 5)], [(10, 0)] * 3])
def test_a_survey_that_counts_nothing_is_refused(sites: list[tuple[int, int]]) -> None:
    agreed = contract(data=MemoryAware(), rounds=2)
    with pytest.raises(SecurityError, match="rows") as caught:
        after(agreed, initial_state(agreed), survey_of(sites))
    assert caught.value.culprits == ("coordinator",)


def test_false_size_in_a_survey_does_not_take_the_others_their_weight() -> None:
    """Without a cap in the contract all honest lanes would be rounded to zero, and one site would own the model."""
    sites = [*SITES[:3], (2**60, 1)]
    agreed = contract(data=MemoryAware(weight_cap=200), rounds=5)
    state = after(agreed, initial_state(agreed), survey_of(sites))
    assert weight_cap(agreed, state) == 200
    uncapped = contract(data=MemoryAware(weight_cap=2**31 - 1), rounds=5)
    assert weight_cap(uncapped, after(uncapped, initial_state(uncapped), survey_of(sites))) == 2**31 - 1


def test_false_row_counts_do_not_move_the_model_further_than_twice_the_clip_norm() -> None:
    """The room for rounding grows with cap over rows, which a negative count makes as large as one likes."""
    agreed = contract(data=Percentage(weight_cap=2**31 - 1))
    state = initial_state(agreed)
    honest = total_of(agreed, state, draws(600, 0.9), [1000] * 4)
    scalars = honest.scalars.copy()
    scalars[0] = 4
    with pytest.raises(SecurityError, match="above the clip norm"):
        after(agreed, state, replace(honest, scalars=scalars))


def test_turn_after_a_void_round_moves_the_factor_that_was_due() -> None:
    """A has no gradient while B is zero."""
    agreed = contract(aggregation=FedAvg(lora="alternating"), data=MemoryAware(), rounds=6)
    surveyed = after(agreed, replace(initial_state(agreed), round=1, voids=1), survey_of(SITES))
    assert turn(agreed, surveyed) == 2
    assert moving_tensors(agreed, surveyed) == B
    assert moving_tensors(agreed, replace(surveyed, round=3, voids=2)) == B
    assert moving_tensors(agreed, replace(surveyed, round=4, voids=2)) == A


def test_a_survey_after_a_void_one_is_still_a_survey() -> None:
    agreed = contract(data=MemoryAware(), rounds=5)
    assert is_survey(agreed, replace(initial_state(agreed), round=1, voids=1))


def test_alternating_moves_one_factor_a_turn_and_each_is_narrow_once_its_scale_is_known() -> None:
    agreed = contract(aggregation=FedAvg(lora="alternating"), rounds=6)
    state, seen = initial_state(agreed), []
    for _ in range(4):
        which = moving_tensors(agreed, state)
        lattice = grid(agreed, state, 4)
        seen.append((which, lattice.bits, lattice.dimension))
        following = after(agreed, state, total_of(agreed, state, draws(lattice.dimension)))
        moved = following.adapter != state.adapter
        assert (bool(moved[:400].any()), bool(moved[400:].any())) == which
        state = following
    assert seen == [(B, 32, 200), (A, 32, 400), (B, 16, 200), (A, 16, 400)]


def test_freeze_a_never_moves_a_and_its_upload_is_the_smaller() -> None:
    agreed = contract(aggregation=FedAvg(lora="freeze_a"))
    state = initial_state(agreed)
    following = after(agreed, state, total_of(agreed, state, draws(200)))
    assert np.array_equal(following.adapter[:400], state.adapter[:400])
    assert round_context(agreed, following, COHORT).layout.size < round_context(contract(), state, COHORT).layout.size


def test_moments_are_part_of_the_state_and_of_its_bytes() -> None:
    agreed = contract(aggregation=FedAdam())
    state = initial_state(agreed)
    following = after(agreed, state, total_of(agreed, state, draws(600)))
    assert [vector.size for vector in following.vectors] == [600] * 3
    assert not any(np.array_equal(old, new) for old, new in zip(state.vectors, following.vectors, strict=True))
    again = State.from_bytes(following.to_bytes())
    assert again.hash(agreed) == following.hash(agreed)
    assert State.decode(following.header, b"".join(following.chunks())).hash(agreed) == following.hash(agreed)
    assert list(following.chunks(2)) == list(following.chunks())[2:]


def test_mean_is_weighted_by_rows_up_to_the_cap() -> None:
    agreed = contract(data=Percentage(weight_cap=40))
    state, updates, rows = initial_state(agreed), draws(600), [10, 20, 30, 40]
    following = after(agreed, state, total_of(agreed, state, updates, rows))
    assert np.allclose(following.adapter - state.adapter, np.average(updates, axis=0, weights=rows), atol=1e-7)


def test_small_weights_do_not_coarsen_the_narrow_ring() -> None:
    """The range follows what is encoded, weight times update: a cap far above all row counts costs no precision."""
    errors = {}
    for cap in (10, 1000):
        agreed = contract(data=Percentage(weight_cap=cap))
        state = after(agreed, initial_state(agreed), total_of(agreed, initial_state(agreed), draws(600)))
        assert grid(agreed, state, 4).bits == 16
        following = after(agreed, state, total_of(agreed, state, draws(600)))
        errors[cap] = np.abs(following.adapter - state.adapter - np.mean(draws(600), axis=0)).max()
    assert errors[1000] < 2.5 * errors[10]


MODULES = tuple(
    (f"m{number}.lora_{factor}.weight", shape)
    for number in range(6)
    for factor, shape in (("A", (4, 30)), ("B", (40, 4)))
)


def products(flat: np.ndarray) -> np.ndarray:
    parts = split_flat(flat, MODULES)
    return np.stack([parts[f"m{n}.lora_B.weight"] @ parts[f"m{n}.lora_A.weight"] for n in range(6)])


def test_bias_of_averaging_both_factors_is_estimated_from_the_sum_alone() -> None:
    agreed = contract(tensors=MODULES, data=FixedSize(size=10))
    state = initial_state(agreed)
    updates = draws(flat_size(MODULES), 0.05)
    total = total_of(agreed, state, updates)
    said = read_sum(agreed, state, total)
    assert isinstance(said, Aggregate)
    estimate = bias_of_means(agreed, state, said)
    locals_ = [products(state.adapter + update) for update in updates]
    means = products(state.adapter + np.mean(updates, axis=0))
    moved = np.mean(locals_, axis=0) - products(state.adapter)
    assert estimate == pytest.approx(np.linalg.norm(np.mean(locals_, axis=0) - means) / np.linalg.norm(moved), rel=0.6)
    assert estimate > 0.05


def test_loss_on_held_out_rows_is_the_mean_of_the_sites_means() -> None:
    agreed = contract(training=Training(validation=0.1))
    state = initial_state(agreed)
    updates = draws(flat_size(agreed.tensors))
    total = total_of(agreed, state, updates, held_out=[1.0, 3.0, 0.5, 7.5])
    assert total.scalars.size == round_context(agreed, state, COHORT).scalars
    said = read_sum(agreed, state, total)
    without = read_sum(contract(), state, total_of(contract(), state, updates))
    assert isinstance(said, Aggregate)
    assert isinstance(without, Aggregate)
    assert said.summary.loss_before == pytest.approx(3.0)
    assert replace(said.summary, loss_before=None) == without.summary


@pytest.mark.parametrize("lora", ["freeze_a", "alternating"])
def test_one_factor_at_a_time_adds_up_no_projections(lora: str) -> None:
    agreed = contract(aggregation=FedAvg(lora=lora))
    state = initial_state(agreed)
    total = total_of(agreed, state, draws(200))
    said = read_sum(agreed, state, total)
    assert isinstance(said, Aggregate)
    assert bias_of_means(agreed, state, said) is None


def test_sites_that_are_alike_have_no_bias() -> None:
    agreed = contract(tensors=MODULES, data=FixedSize(size=10))
    state = initial_state(agreed)
    total = total_of(agreed, state, draws(flat_size(MODULES))[:1] * 4)
    said = read_sum(agreed, state, total)
    assert isinstance(said, Aggregate)
    estimate = bias_of_means(agreed, state, said)
    assert estimate is not None
    assert estimate < 0.01
