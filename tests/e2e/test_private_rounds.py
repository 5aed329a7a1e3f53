"""Runs with noise: what is published has the noise that is charged, and what comes before it is seen by nobody."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e.harness import Outcome, RealRun

from mpctf_secure.config.site import Budget, Policy
from mpctf_secure.coordinator import runtime
from mpctf_secure.errors import ParticipationError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.participant import contribution
from mpctf_secure.privacy.integers import INDICATOR, Scheme, to_integers, to_signed
from mpctf_secure.privacy.ledger import Charge, Ledger
from mpctf_secure.rounds.guarantee import RoundSizes, noise_of_round
from mpctf_secure.rounds.state import State
from mpctf_secure.rounds.terms import noise_scheme
from mpctf_secure.secagg.codec import decode_scalars

NOISE, ROUNDS, SITES, D = 0.5, 4, 4, 4000
STRATEGIES = ("server_fixed", "server_adaptive", "client_fixed", "client_adaptive")


@dataclass
class PrivateRun:
    """An outcome, and of each round the scheme and what was published."""

    outcome: Outcome
    schemes: dict[int, Scheme] = field(default_factory=dict)
    sums: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)
    unmasked: dict[int, np.ndarray] = field(default_factory=dict)
    """What the coordinator has once the masks are off."""

    def noise(self, number: int) -> tuple[np.ndarray, float]:
        """What was published less what the updates come to, in units, and the indicators' share of it."""
        scheme = self.schemes[number]
        total, indicators = self.sums[number]
        survivors = self.outcome.coordinator.ledger.rounds[number - 1].survivors
        parts = [to_integers(self.outcome.inputs[name, number].update, scheme) for name in survivors]
        expected = sum(INDICATOR if fits else -INDICATOR for _, fits in parts)
        return total - np.sum([values for values, _ in parts], axis=0), indicators - expected


def run(
    folder: Path,
    strategy: str,
    patch: pytest.MonkeyPatch,
    *more: str,
    change: Callable[[str, int, Any], Any] | None = None,
    policy: Policy | None = None,
    **terms: object,
) -> PrivateRun:
    sums: dict[int, tuple[np.ndarray, int]] = {}
    schemes: dict[int, Scheme] = {}
    bare: dict[int, np.ndarray] = {}
    own_noise, open_sum = runtime.Coordinator._own_noise, runtime.open_sum

    def note_scheme(contract: Any, state: State, size: int) -> Scheme | None:
        schemes[state.round + 1] = noise_scheme(contract, state.clip_norm, size)
        return own_noise(contract, state, size)

    def note_sum(spool: Any, context: Any, survivors: Any, left: Any, path: Path, *others: Any) -> bytes:
        unmasked, _ = context.layout.join(list(spool.opened(survivors, left)))
        bare[context.round] = to_signed(unmasked)
        digest = open_sum(spool, context, survivors, left, path, *others)
        lanes, scalars = spool.load_sum(path)
        sums[context.round] = to_signed(lanes), decode_scalars(scalars)[0]
        return digest

    patch.setattr(runtime.Coordinator, "_own_noise", staticmethod(note_scheme))
    patch.setattr(runtime, "open_sum", note_sum)
    terms = {"strategy": strategy, "noise_multiplier": NOISE, "clip_norm": 0.5, **terms}
    made = RealRun(folder, [f"privacy={terms}", f"rounds={ROUNDS}", *more], patch, training=False)
    made.policies = {name: policy for name in made.config.participants.names if policy}
    if change:
        made.change = change
    return PrivateRun(made.run(), schemes, sums, bare)


@pytest.fixture(scope="module", params=STRATEGIES)
def private(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PrivateRun:
    with pytest.MonkeyPatch.context() as patch:
        return run(tmp_path_factory.mktemp("run"), request.param, patch)


def strategy_of(private: PrivateRun) -> str:
    return private.outcome.contract.privacy.strategy


def test_published_noise_has_the_variance_that_is_charged(private: PrivateRun) -> None:
    """Of participants all four add a share, of whom two suffice: c = 1 may collude and one may be lost."""
    central = strategy_of(private).startswith("server")
    ratios, indicators = [], []
    for number, scheme in private.schemes.items():
        noise, of_indicators = private.noise(number)
        sources = 1 if central else SITES
        ratios.append(noise.var() / (sources * scheme.variance))
        assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)
        assert scheme.shares == (1 if central else 2)
        assert scheme.shares * scheme.variance >= (scheme.noise_multiplier * scheme.units) ** 2 * (1 - 1e-9)
        if scheme.indicator_variance:
            indicators.append(of_indicators / np.sqrt(sources * scheme.indicator_variance))
        else:
            assert private.sums[number][1] == 0
    assert np.mean(ratios) == pytest.approx(1, abs=5 * np.sqrt(2 / (ROUNDS * D)))
    assert all(0 < abs(z) < 6 for z in indicators)
    assert len(indicators) == (ROUNDS if "adaptive" in strategy_of(private) else 0)


def test_no_round_has_the_noise_of_another(private: PrivateRun) -> None:
    noises = [private.noise(number)[0] for number in private.schemes]
    for index, one in enumerate(noises):
        for other in noises[index + 1 :]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(D)


def test_clip_norm_adapts_only_where_it_should(private: PrivateRun) -> None:
    norms = [scheme.clip_norm for scheme in private.schemes.values()]
    assert (len(set(norms)) > 1) == ("adaptive" in strategy_of(private))


def test_coordinator_hears_neither_counts_nor_losses_nor_progress(private: PrivateRun) -> None:
    outcome = private.outcome
    for record in outcome.coordinator.ledger.rounds:
        shown = record.to_dict()
        assert (shown["rows"], shown["mean_loss"], shown["clipped"]) == (None, None, None)
    assert all(given.scalars.size == 1 for given in outcome.inputs.values())
    told = [label for label in ("progress", "resources") if label.encode() in b"".join(outcome.recorder.received)]
    assert ("progress" in told) == strategy_of(private).startswith("server")
    assert "resources" not in told or strategy_of(private).startswith("server")


def test_under_client_strategies_nothing_without_noise_comes_to_the_coordinator(private: PrivateRun) -> None:
    """Neither an upload nor anything that can be made of all of them by taking masks away is bare."""
    bare = {
        (name, number): to_integers(given.update, private.schemes[number])
        for (name, number), given in private.outcome.inputs.items()
    }
    for (name, number), given in private.outcome.inputs.items():
        values, _ = bare[name, number]
        same = np.count_nonzero(to_signed(given.lanes) == values)
        assert (same == D) == strategy_of(private).startswith("server")
    for number, unmasked in private.unmasked.items():
        total = np.sum([values for (_, r), (values, _) in bare.items() if r == number], axis=0)
        same = np.count_nonzero(unmasked == total)
        assert same == D if strategy_of(private).startswith("server") else same < 5


def test_equal_sums_of_two_rounds_are_not_seen_to_be_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when all updates are nothing; else the noise would say so."""

    def nothing(name: str, number: int, given: Any) -> Any:
        return replace(given, update=np.zeros_like(given.update))

    private = run(tmp_path, "server_adaptive", monkeypatch, "rounds=2", change=nothing)
    assert np.array_equal(private.unmasked[1], private.unmasked[2])
    assert np.count_nonzero(private.sums[1][0] == private.sums[2][0]) < 5
    assert private.sums[1][1] != private.sums[2][1]


@pytest.mark.parametrize("scalar", [2**62, -(2**62)])
def test_false_indicator_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scalar: int) -> None:
    original = contribution.indicate
    monkeypatch.setattr(contribution, "indicate", lambda fits, scheme: scalar // 101 or original(fits, scheme))
    private = run(tmp_path, "server_adaptive", monkeypatch, "rounds=2")
    assert private.outcome.state.round == 2


def lost(name: str, number: int, given: Any) -> Any:
    """Site 1 dies in the second round before it sends anything."""
    if (name, number) == ("site-1", 2):
        raise RuntimeError("gone")
    return given


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_noise_suffices_when_as_many_are_lost_as_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four are left, of whom one may collude: their two shares have what is charged."""
    terms = ("rounds=2", "timeouts.stage=2")
    private = run(tmp_path, "client_fixed", monkeypatch, *terms, change=lost, dropouts=1)
    assert private.outcome.coordinator.ledger.rounds[1].survivors == ["site-2", "site-3", "site-4"]
    scheme = private.schemes[2]
    noise, _ = private.noise(2)
    assert noise.var() / (3 * scheme.variance) == pytest.approx(1, abs=5 * np.sqrt(2 / D))
    assert 2 * scheme.variance >= (NOISE * scheme.units) ** 2
    sizes = [RoundSizes(len(one.cohort), len(one.survivors)) for one in private.outcome.coordinator.ledger.rounds]
    assert sizes == [(4, 4), (4, 3)]
    agreed = private.outcome.contract
    of_four, of_three = (noise_of_round(agreed, agreed.privacy, size) for size in sizes)
    assert of_three == NOISE < of_four


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_round_that_loses_more_is_void_and_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = ("rounds=2", "timeouts.stage=2")
    private = run(tmp_path, "client_fixed", monkeypatch, *terms, change=lost, dropouts=0)
    assert set(private.sums) == {1}
    assert private.outcome.coordinator.ledger.rounds[1].void
    assert private.outcome.state.voids == 1


def budgeted(folder: Path, patch: pytest.MonkeyPatch, epsilon: float) -> RealRun:
    """Four sites, the first of which has a budget."""
    terms = {"strategy": "client_fixed", "noise_multiplier": 4.0, "dropouts": 1}
    made = RealRun(folder, [f"privacy={terms}", "rounds=2", "timeouts.stage=2"], patch, training=False)
    made.policies["site-1"] = Policy(budget=Budget(epsilon=epsilon, delta=1e-3, unit="participant"))
    return made


def charges(made: RealRun) -> dict[str, list[Charge]]:
    return {name: Ledger(made.site(name, "127.0.0.1:1").keys).charges() for name in made.config.participants.names}


def test_every_round_is_charged_at_every_site_for_what_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = budgeted(tmp_path, monkeypatch, epsilon=8.0)
    outcome = made.run()
    for name, charged in charges(made).items():
        assert [charge.round for charge in charged] == [1, 2]
        for charge in charged:
            given = outcome.inputs[name, charge.round]
            assert charge.content == sha256(given.lanes.tobytes() + given.scalars.tobytes()).hex()
            assert (charge.noise_multiplier, charge.against) == (4.0, "coordinator")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_site_whose_budget_the_run_exceeds_takes_no_part_and_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = budgeted(tmp_path, monkeypatch, epsilon=0.7)  # one round costs 0.59, two 0.88
    with pytest.raises(ParticipationError, match=r"site-1 \(refuses: it stops\)") as caught:
        made.run()
    assert "epsilon" not in caught.value.message
    assert not any(charges(made).values())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_round_is_not_sent_that_does_not_fit_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run has charged the same rows meanwhile."""
    made = budgeted(tmp_path, monkeypatch, epsilon=2.0)

    def charge_elsewhere(name: str, number: int, given: Any) -> Any:
        if (name, number) == ("site-1", 2):
            book = Ledger(made.site(name, "127.0.0.1:1").keys)
            for other in range(20):
                book.charge(book.charges()[0].model_copy(update={"run": "another", "round": other}), None)
        return given

    made.change = charge_elsewhere
    first, second = made.run().coordinator.ledger.rounds
    assert (len(first.survivors), second.survivors) == (4, ["site-2", "site-3", "site-4"])
    assert [charge.run for charge in charges(made)["site-1"]] == ["real-run"] + ["another"] * 20
    assert len(charges(made)["site-2"]) == 2


CLEAR = ("secagg.secure=false", "rounds=2")


@pytest.mark.parametrize("strategy", ["server_fixed", "server_adaptive"])
def test_without_masks_the_coordinator_clips_each_update_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """As the paper's server does; what is published is the same as with masks, but for the noise."""
    private = run(tmp_path, strategy, monkeypatch, *CLEAR, policy=Policy(allow_clear=True), clip_norm=0.1)
    received = b"".join(private.outcome.recorder.received)
    for given in private.outcome.inputs.values():
        assert np.linalg.norm(given.update) > 0.3  # far above the clip norm
        assert given.update.tobytes() in received
        assert not given.scalars.any()
    for number, scheme in private.schemes.items():
        noise, of_indicators = private.noise(number)
        assert noise.var() / scheme.variance == pytest.approx(1, abs=5 * np.sqrt(2 / D))
        if scheme.indicator_variance:
            assert 0 < abs(of_indicators) < 6 * np.sqrt(scheme.indicator_variance)


def test_masked_updates_are_nowhere_in_the_clear(private: PrivateRun) -> None:
    received = b"".join(private.outcome.recorder.received)
    assert not any(given.update[:8].tobytes() in received for given in private.outcome.inputs.values())


@pytest.mark.parametrize("strategy", ["client_fixed", "none"])
def test_site_may_clip_its_own_updates_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    terms = f"privacy={{strategy: {strategy}, clip_norm: 0.5{', noise_multiplier: 1.0' * (strategy != 'none')}}}"
    made = RealRun(tmp_path, [terms, "rounds=2"], monkeypatch, training=False)
    made.policies["site-1"] = Policy(own_clip_norm=0.125)
    for (name, _), given in made.run().inputs.items():
        norm = np.linalg.norm(given.update.astype(np.float64))
        # The others' are clipped to the contract's norm here, or together with noise.
        assert norm == pytest.approx(0.125, rel=1e-6) if name == "site-1" else norm > 0.499
