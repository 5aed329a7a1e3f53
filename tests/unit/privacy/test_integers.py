import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpctf_secure.config.privacy import ClientAdaptive
from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.parallel import ordered_map
from mpctf_secure.privacy import integers, noise
from mpctf_secure.privacy.integers import INDICATOR, Scheme, check_sum, indicate, joint_noise, noised, to_integers

SECRET = bytes(32)


def scheme(summands: int = 4, shares: int = 2, noise: float = 1.0, **changes: object) -> Scheme:
    terms = {"indicator_noise": None, "clip_norm": 1.0, **changes}
    return Scheme(summands=summands, shares=shares, noise_multiplier=noise, **terms)


def updates(size: int, scale: float, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


@settings(deadline=None)
@given(st.integers(1, 2000), st.floats(1e-9, 1e9), st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_integers_never_have_a_norm_above_k_and_are_the_clipped_update(
    size: int, scale: float, clip_norm: float, seed: int
) -> None:
    update = updates(size, scale, seed)
    plan = scheme(clip_norm=clip_norm)
    values, fits = to_integers(update, plan)
    assert int((values.astype(object) ** 2).sum()) <= plan.units**2
    norm = math.sqrt(float((update.astype(np.float64) ** 2).sum()))
    assert fits == (norm <= clip_norm)
    clipped = update.astype(np.float64) * min(1, clip_norm / norm)
    assert np.abs(values * clip_norm / plan.units - clipped).max() <= 2 * clip_norm / plan.units


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_update_that_is_no_number_counts_as_nothing_that_was_clipped(value: float) -> None:
    update = updates(100, 0.01)
    update[7] = value
    values, fits = to_integers(update, scheme())
    assert not values.any()
    assert not fits


VARIANCES = {
    "half of the noise each": (scheme(4, 2), 2**39),
    "a pair, of whom one knows its own": (scheme(2, 1), 2**40),
    "the paper's noise": (scheme(2, 1, 1e-4), 10996),
    "rounded up": (scheme(4, 3), 366503875926),
}


@pytest.mark.parametrize(("plan", "variance"), VARIANCES.values(), ids=VARIANCES.keys())
def test_shares_of_noise_have_z_k_together(plan: Scheme, variance: int) -> None:
    assert plan.units == 2**20
    assert plan.variance == variance
    assert plan.shares * plan.variance >= (plan.noise_multiplier * plan.units) ** 2 * (1 - 1e-12)
    plan.check()


@given(st.integers(2, 100), st.floats(1e-4, 1e3), st.data())
def test_updates_and_noise_fit_into_a_lane(summands: int, noise: float, data: st.DataObject) -> None:
    plan = scheme(summands, data.draw(st.integers(1, summands)), noise)
    assert summands * plan.units + 8 * math.sqrt(summands * plan.variance) < 2**31


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (scheme(noise=1e-6), "outside"),
        (scheme(noise=1e9), "too much for lanes"),
        (scheme(indicator_noise=1e-7), "noise_multiplier: a share of the indicators' noise"),
        (scheme(indicator_noise=1e4), "noise_multiplier: a share of the indicators' noise"),
    ],
)
def test_noise_of_which_nothing_is_proved_is_refused(plan: Scheme, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan.check()


def test_noise_of_both_releases_together_is_that_of_one() -> None:
    assert joint_noise(0.4, 1.0) == pytest.approx(0.408248, abs=1e-6)


def test_noise_in_a_sum_has_the_variance_that_is_charged() -> None:
    plan = scheme(5, 3, 2.0, indicator_noise=3.0)
    values, fits = to_integers(updates(200_000, 1e-3), plan)
    lanes, scalars = zip(
        *(noised(values, indicate(fits, plan), plan, bytes([n]) * 32, ordered_map) for n in range(3)), strict=True
    )
    total = integers.to_signed(sum(lanes[1:], lanes[0]).astype(np.uint32))
    noise = total - 3 * values
    assert noise.var() / (2.0 * plan.units) ** 2 == pytest.approx(1, abs=0.02)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(noise.size)
    assert abs(sum(scalars) - 3 * INDICATOR) < 5 * 3.0 * 2 * INDICATOR


def test_indicators_have_the_noise_that_is_charged() -> None:
    """A tenth of it would hide nobody's."""
    plan, nothing = scheme(shares=3, indicator_noise=0.8), np.zeros(0, np.int64)
    drawn = np.array([noised(nothing, 0, plan, number.to_bytes(32, "big"))[1] for number in range(4000)], np.float64)
    assert drawn.std() * math.sqrt(3) / (2 * INDICATOR * 0.8) == pytest.approx(1, abs=0.05)
    assert abs(drawn.mean()) < 5 * drawn.std() / math.sqrt(drawn.size)


def test_same_input_has_the_same_noise_and_any_other_input_another() -> None:
    plan = scheme(indicator_noise=1.0)
    values = to_integers(updates(1000, 1e-3), plan)[0]
    first = noised(values, INDICATOR, plan, SECRET)
    again = noised(values, INDICATOR, plan, SECRET, ordered_map)
    assert np.array_equal(first[0], again[0])
    assert first[1] == again[1]
    other = values.copy()
    other[0] += 1
    for changed in (
        noised(other, INDICATOR, plan, SECRET),
        noised(values, -INDICATOR, plan, SECRET),
        noised(values, INDICATOR, scheme(noise=2.0, indicator_noise=1.0), SECRET),
        noised(values, INDICATOR, plan, b"x" * 32),
    ):
        assert np.count_nonzero(changed[0] == first[0]) < 5


def test_no_two_slabs_have_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_SLAB", 100)
    lanes, _ = noised(np.zeros(300, np.int64), 0, scheme(), SECRET)
    parts = lanes.reshape(3, 100)
    assert np.count_nonzero(parts[0] == parts[1]) + np.count_nonzero(parts[1] == parts[2]) < 5


def test_honest_sums_pass_the_bound_and_larger_ones_do_not() -> None:
    for summands, shares in ((3, 1), (10, 5), (100, 34)):
        plan = scheme(summands, shares, 1.5)
        values, _ = to_integers(updates(5000, 1.0), plan)
        total = np.zeros(5000, np.uint32)
        for number in range(summands):
            total += noised(values, 0, plan, bytes([number]) * 32)[0]
        signed = integers.to_signed(total)
        check_sum(signed, summands, plan, central=False)
        with pytest.raises(SecurityError, match="above what clip norm and noise allow"):
            check_sum(signed + int(summands * plan.units), summands, plan, central=False)


@pytest.mark.parametrize("start", [0.1, 10.0])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_clip_norm_comes_to_the_target_quantile_from_either_side(start: float, target: float) -> None:
    """Norms are uniform in [0, 2]. Fed with the clipped share instead, C would run to 2 − 2γ, or away."""
    privacy = ClientAdaptive(noise_multiplier=1.0, clip_norm=start, target_quantile=target)
    clip_norm, norms = start, np.linspace(0, 2, 101)
    for _ in range(200):
        plan = scheme(indicator_noise=1.0, clip_norm=clip_norm)
        fits = (to_integers(np.array([norm], np.float32), plan)[1] for norm in norms)
        clip_norm = integers.next_clip_norm(clip_norm, sum(indicate(one, plan) for one in fits), norms.size, privacy)
    assert clip_norm == pytest.approx(2 * target, rel=0.05)


def test_clip_norm_stays_in_its_bounds_whatever_the_indicators_say() -> None:
    privacy = ClientAdaptive(noise_multiplier=1.0, largest_clip_norm=2.0)
    assert integers.next_clip_norm(1.9, -(2**60), 3, privacy) == 2.0
    assert integers.next_clip_norm(1e-6, 2**60, 3, privacy) == 1e-6
    once = integers.next_clip_norm(1.0, -(2**60), 3, privacy)
    assert once == pytest.approx(math.exp(0.2 * 0.5), rel=1e-15)
