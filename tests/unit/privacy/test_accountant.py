import math

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant

from mpctf_secure.errors import UsageError
from mpctf_secure.privacy import accountant, gaussian
from mpctf_secure.privacy.accountant import Release, cost, noise_for

KNOWN = {
    "one release": ([Release(1.0)], 1e-5, 4.377178),
    "ten": ([Release(1.0)] * 10, 1e-5, 17.856587),
    "ten in one entry": ([Release(1.0, steps=10)], 1e-5, 17.856587),
    "ten with more noise": ([Release(4.0)] * 10, 1e-5, 3.341409),
    "the paper's noise": ([Release(1e-4)] * 10, 1e-5, 5.00135e8),
    "ten times as much": ([Release(1e-3)] * 10, 1e-5, 5.01349e6),
    "ten shares of noise where eight are charged": ([Release(4.397 * (10 / 8) ** 0.5)] * 10, 1e-5, 2.644),
    "eight of ten shares": ([Release(4.397 * 0.8**0.5)] * 10, 1e-5, 3.407),
    "five of ten": ([Release(4.397 * 0.5**0.5)] * 10, 1e-5, 4.464),
}
"""As published, or by dp-accounting."""
SAMPLED = {
    "MNIST": (Release(1.1, 256 / 60000, 3525), 1e-5, 1.13543, 1.14547),
    "1 in 100": (Release(1.0, 0.01, 1000), 1e-5, 1.82824, 1.83837),
    "few steps": (Release(1.0, 0.2, 15), 1e-5, 5.85855, 5.86898),
    "a smaller delta": (Release(1.5, 0.05, 300), 1e-6, 3.29374, 3.30391),
}


@pytest.mark.parametrize(("releases", "delta", "epsilon"), KNOWN.values(), ids=KNOWN.keys())
def test_noise_on_everything_costs_what_the_closed_form_says(
    releases: list[Release], delta: float, epsilon: float
) -> None:
    found = cost(releases, delta)
    assert found.epsilon == pytest.approx(epsilon, rel=2e-4 if epsilon in {2.644, 3.407, 4.464} else 3e-6)
    assert found.accountant == "closed form"
    if epsilon < 1e3:  # where its grid reaches
        oracle = pld.PLDAccountant()
        for one in releases:
            oracle.compose(dp_accounting.GaussianDpEvent(one.noise_multiplier), one.steps)
        assert oracle.get_epsilon(delta) == pytest.approx(found.epsilon, rel=1e-3)


@pytest.mark.parametrize(("release", "delta", "exact", "bound"), SAMPLED.values(), ids=SAMPLED.keys())
def test_noise_on_samples_costs_no_less_than_it_does_and_little_more(
    release: Release, delta: float, exact: float, bound: float
) -> None:
    found = cost([release], delta)
    assert exact <= found.epsilon == pytest.approx(bound, abs=2e-5)
    assert found.accountant == "PRV"
    oracle = pld.PLDAccountant()
    sampled = dp_accounting.PoissonSampledDpEvent(
        release.sampling_rate, dp_accounting.GaussianDpEvent(release.noise_multiplier)
    )
    oracle.compose(dp_accounting.SelfComposedDpEvent(sampled, release.steps))
    assert oracle.get_epsilon(delta) == pytest.approx(exact, rel=1e-4)
    assert found.epsilon >= oracle.get_epsilon(delta) * (1 - 1e-4)


RENYI = {
    "one release": (Release(1.0), 1e-5, 4.72851),
    "ten": (Release(1.0, steps=10), 1e-5, 19.05360),
    "ten with more noise": (Release(4.0, steps=10), 1e-5, 3.61710),
    "the paper's noise": (Release(1e-4, steps=10), 1e-5, 5.50000e8),
    **{name: (release, delta, bound) for (name, (release, delta, _, _)), bound in zip(
        SAMPLED.items(), (1.28270, 2.10137, 6.69796, 3.58231), strict=True)},
}  # fmt: skip


@pytest.mark.parametrize(("release", "delta", "epsilon"), RENYI.values(), ids=RENYI.keys())
def test_where_one_accountant_fails_the_other_holds(
    monkeypatch: pytest.MonkeyPatch, release: Release, delta: float, epsilon: float
) -> None:
    def fail(*_: object, **__: object) -> float:
        raise RuntimeError("discrete mean differs from continuous mean")

    monkeypatch.setattr(PRVAccountant, "get_epsilon", fail)
    found = accountant._of_samples([release], delta)
    assert found.epsilon == pytest.approx(epsilon, rel=3e-6)
    assert found.accountant == "RDP"


def test_more_steps_than_the_tight_one_has_memory_for_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator names the rounds, and sites pay for the arithmetic."""
    monkeypatch.delattr(PRVAccountant, "get_epsilon")
    assert cost([Release(100.0, 0.01, 10**8)], 1e-5).accountant == "RDP"


def test_noise_that_hides_nearly_all_costs_nothing_and_never_less() -> None:
    """Renyi DP's bound is negative there."""
    assert cost([Release(50.0, 0.1, 2)], 1e-2).epsilon == 0


def test_where_privacy_is_lost_the_accountant_that_fails_there_is_not_asked() -> None:
    found = cost([Release(0.1, 0.5, 100)], 1e-5)
    assert found.accountant == "RDP"
    assert found.is_meaningless


@given(st.floats(1e-3, 1e3), st.floats(1e-12, 0.1))
def test_epsilon_is_the_smallest_that_delta_allows(mu: float, delta: float) -> None:
    found = gaussian.epsilon(mu, delta)
    assert gaussian.log_delta(mu, found) <= math.log(delta)
    if found > 1e-6:
        assert gaussian.log_delta(mu, found * (1 - 1e-6)) > math.log(delta) - 1e-6


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(UsageError, match=r"delta: .* is outside"):
        cost([Release(1.0)], delta)


@pytest.mark.parametrize(("target", "noise"), [(1.0, 11.80), (3.0, 4.397), (8.0, 1.898), (10.0, 1.581)])
def test_noise_for_a_target(target: float, noise: float) -> None:
    found = noise_for("epsilon", target, lambda z: cost([Release(z, steps=10)], 1e-5))
    assert found == pytest.approx(noise, rel=1.1e-3)
    assert float(f"{found:.4g}") == pytest.approx(found, rel=1e-12)  # so that what is printed does
    assert cost([Release(found, steps=10)], 1e-5).epsilon <= target


def test_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(UsageError, match="--epsilon: no noise reaches 1e-09"):
        noise_for("--epsilon", 1e-9, lambda z: cost([Release(z, steps=10**6)], 1e-300))
