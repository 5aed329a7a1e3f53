"""The noise of real rounds, audited: right noise passes, half of it or a wrong sampler does not."""

from dataclasses import replace

import numpy as np
import pytest

from mpctf_secure.privacy import noise
from mpctf_secure.privacy.accountant import Release, cost, noise_for
from mpctf_secure.privacy.audit import lower_bound, lower_bound_of_one_run
from mpctf_secure.privacy.integers import INDICATOR, Scheme, joint_noise, noised, to_integers, to_signed

CLAIM, DELTA, RUNS, D = 3.0, 1e-5, 1000, 16
Z = noise_for("epsilon", CLAIM, lambda z: cost([Release(z)], DELTA))
RIGHT = Scheme(summands=3, shares=2, noise_multiplier=Z, indicator_noise=None, clip_norm=1.0)


def worlds(claimed: Scheme, used: Scheme, sources: int) -> tuple[np.ndarray, np.ndarray]:
    """The adversary's number in runs with and without one clipped update, which `sources` honest sites hide."""
    direction = np.random.default_rng(0).standard_normal(D).astype(np.float32)
    values = to_integers(100 * direction, claimed)[0]
    found = []
    for world in (values, np.zeros_like(values)):
        sums = []
        for run in range(RUNS):
            total = np.zeros(D, np.uint32)
            for source in range(sources):
                secret = np.array([run, source, int(world.any())], "<u8").tobytes() + bytes(8)
                total += noised(world if source == 0 else np.zeros_like(values), 0, used, secret)[0]
            sums.append(to_signed(total) @ values / np.linalg.norm(values))
        found.append(np.array(sums, np.float64))
    return found[0], found[1]


def test_right_noise_keeps_what_it_claims_and_the_audit_is_not_blind() -> None:
    bound = lower_bound(*worlds(RIGHT, RIGHT, RIGHT.shares), DELTA)
    assert 2.0 < bound <= CLAIM


def test_noise_two_times_too_small_is_caught() -> None:
    small = replace(RIGHT, noise_multiplier=Z / 2)
    assert lower_bound(*worlds(RIGHT, small, RIGHT.shares), DELTA) > CLAIM


def test_fewer_survivors_than_the_shares_are_for_are_caught() -> None:
    """One share where four would suffice is half of the noise."""
    assert lower_bound(*worlds(RIGHT, replace(RIGHT, shares=4), 1), DELTA) > CLAIM


def test_sampler_with_a_wrong_variance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = noise.discrete_gaussian
    monkeypatch.setattr(noise, "discrete_gaussian", lambda source, variance, count: right(source, variance // 4, count))
    assert lower_bound(*worlds(RIGHT, RIGHT, RIGHT.shares), DELTA) > CLAIM


def both_releases(used: float) -> float:
    """What update and indicator show together, with `used` times the indicators' noise; z is for the two."""
    sigma = 0.6 * Z  # not much above z/2, so that both cost about as much
    plan = replace(RIGHT, shares=1, noise_multiplier=joint_noise(Z, sigma), indicator_noise=sigma)
    seen = replace(plan, indicator_noise=used * sigma)
    values = np.full(D, plan.units // 4)
    noise = plan.noise_multiplier * plan.units, 2 * INDICATOR * sigma
    found = []
    for there in (1, 0):
        scores = []
        for run in range(RUNS):
            secret = np.array([run, there], "<u8").tobytes() + bytes(16)
            # Without it half an indicator is missing: they are centred.
            lanes, scalar = noised(there * values, there * INDICATOR, seen, secret)
            along = to_signed(lanes) @ values / np.linalg.norm(values)
            scores.append(along / noise[0] * (plan.units / noise[0]) + scalar / noise[1] * (INDICATOR / noise[1]))
        found.append(np.array(scores, np.float64))
    return lower_bound(*found, DELTA)


def test_noise_of_indicators_is_part_of_the_claim() -> None:
    assert 2.0 < both_releases(1.0) <= CLAIM < both_releases(0.5)


def test_audit_knows_how_little_few_runs_show() -> None:
    dice = np.random.default_rng(1)
    draws = [dice.standard_normal(4000) for _ in range(2)]
    mu = 1 / Z
    bounds = [lower_bound(draws[0][:n] + mu, draws[1][:n], DELTA) for n in (100, 400, 4000)]
    assert 0 <= bounds[0] < bounds[2] <= CLAIM
    assert bounds[2] > 2.3
    assert lower_bound(draws[0], draws[1], DELTA) == 0.0
    with pytest.raises(ValueError, match="99 runs"):
        lower_bound(draws[0][:99], draws[1], DELTA)
    assert cost([Release(Z)], DELTA).epsilon <= CLAIM


def one_run(scale: float) -> float:
    """Of 1000 canaries in directions of their own, under `scale` times the noise of ε = 3; seen at δ = 1e-5."""
    bounds = []
    for seed in range(20):
        dice = np.random.default_rng(seed)
        included = dice.random(1000) < 0.5
        scores = included + scale * Z * dice.standard_normal(1000)
        bounds.append(max(lower_bound_of_one_run(scores, included, guesses, DELTA) for guesses in (50, 100, 200)))
    return float(np.median(bounds))


def test_one_run_shows_part_of_what_a_right_mechanism_lets_slip_and_much_of_a_wrong_one() -> None:
    """Within what the literature has: about 1.2 of 3, and about 3.5 with a quarter of the noise."""
    assert 0.5 < one_run(1.0) < 2.0 < CLAIM < one_run(0.25) < 4.5


def test_guesses_by_chance_show_nothing() -> None:
    dice = np.random.default_rng(0)
    shown = [lower_bound_of_one_run(dice.standard_normal(1000), dice.random(1000) < 0.5, 100, DELTA) for _ in range(40)]
    assert sum(bound > 0 for bound in shown) <= 6  # one in twenty


def test_all_guesses_right_show_what_so_many_can() -> None:
    """Without δ: e^ε/(1 + e^ε) to the power of 100 is 0.05 at ε = 3.49."""
    included = np.arange(1000) >= 500
    assert lower_bound_of_one_run(np.arange(1000.0), included, 100, 0.0) == pytest.approx(3.49, abs=0.01)
