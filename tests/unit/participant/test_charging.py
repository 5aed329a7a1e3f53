"""What a run costs a site, before it agrees and round by round."""

from dataclasses import replace
from pathlib import Path

import pytest
from samples import make_contract

from mpctf_secure.config.privacy import ClientFixed, NoNoise, RecordDpSgd, ServerFixed
from mpctf_secure.config.site import Budget, Policy, SiteConfig
from mpctf_secure.config.strategies import FixedSize, MaxVolume, Percentage
from mpctf_secure.config.training import Training
from mpctf_secure.errors import BudgetSpentError, UsageError
from mpctf_secure.participant.charging import Charging, Rows, record_noise
from mpctf_secure.participant.policy import UnsuitableError
from mpctf_secure.privacy import accountant
from mpctf_secure.privacy.accountant import Release, cost_of_integers
from mpctf_secure.privacy.ledger import Ledger, spent

DPSGD = NoNoise(record_dpsgd=RecordDpSgd(epsilon=8))
TERMS = Training(batch_size=20, local_epochs=2)
ROWS = 200


def contract(privacy: object = DPSGD, **changes: object):
    return make_contract(**{"rounds": 3, "void_rounds": 1, "privacy": privacy, "data": FixedSize(size=50), **changes})


def epsilon_of(noise: Release, rounds: int) -> float:
    return cost_of_integers([noise] * rounds, 1e-5).epsilon


def test_noise_is_what_rows_and_steps_of_the_whole_run_need() -> None:
    noise = record_noise(contract(), Policy(), TERMS, ROWS)
    assert (noise.sampling_rate, noise.steps) == (0.1, 5)  # two epochs of fifty rows in batches of twenty
    assert 7.9 < epsilon_of(noise, 3) <= 8
    assert epsilon_of(replace(noise, noise_multiplier=0.99 * noise.noise_multiplier), 3) > 8
    assert record_noise(contract(data=Percentage(share=0.5)), Policy(), TERMS, ROWS).steps == 10


def test_volume_that_depends_on_others_has_no_noise(tmp_path: Path) -> None:
    """A proposal that slipped through: it must not be taken for one without DP-SGD."""
    with pytest.raises(ValueError, match="depends on other participants"):
        record_noise(contract(data=MaxVolume()), Policy(), TERMS, ROWS)


def test_site_may_be_stricter_but_not_laxer() -> None:
    usual, stricter, laxer = (
        record_noise(contract(), Policy(record_epsilon=epsilon), TERMS, ROWS) for epsilon in (None, 2.0, 20.0)
    )
    assert laxer == usual
    assert epsilon_of(stricter, 3) <= 2
    assert epsilon_of(usual, 3) > 7.9


def test_run_without_it_has_no_noise_on_records() -> None:
    assert record_noise(contract(NoNoise()), Policy(), TERMS, ROWS) is None


def test_delta_with_which_a_row_may_be_published_is_refused() -> None:
    large = NoNoise(record_dpsgd=RecordDpSgd(epsilon=8, delta=0.005))
    record_noise(contract(large), Policy(), TERMS, 199)
    with pytest.raises(UnsuitableError, match=r"privacy\.record_dpsgd\.delta: 0.005 is outside \(0, 1/200\)"):
        record_noise(contract(large), Policy(), TERMS, 200)


@pytest.mark.parametrize(("own", "name"), [(None, "privacy.record_dpsgd.epsilon"), (0.02, "policy.record_epsilon")])
def test_run_of_which_no_noise_is_enough_is_refused_by_whose_target_it_is(
    monkeypatch: pytest.MonkeyPatch, own: float | None, name: str
) -> None:
    monkeypatch.setattr(accountant, "_MOST_LOG_NOISE", 0.0)
    far = NoNoise(record_dpsgd=RecordDpSgd(epsilon=0.03))
    with pytest.raises(UnsuitableError, match=f"{name}: no noise reaches"):
        record_noise(contract(far), Policy(record_epsilon=own), TERMS, ROWS)


def site(folder: Path, **policy: object) -> SiteConfig:
    folder.mkdir(exist_ok=True)
    return SiteConfig(coordinator="127.0.0.1:1", model=folder, data=folder, keys=folder, policy=Policy(**policy))


def charging(where: SiteConfig, agreed=None, dpsgd: Release | None = None, rows: int = ROWS) -> Charging:
    return Charging(where, agreed or contract(), Rows("00" * 32, rows), dpsgd, accept_change=False)


def test_rounds_are_charged_with_both_kinds_of_noise(tmp_path: Path) -> None:
    both = contract(ClientFixed(noise_multiplier=4.0, record_dpsgd=RecordDpSgd(epsilon=8)))
    noise = record_noise(both, Policy(), TERMS, ROWS)
    charging(site(tmp_path), both, noise).charge(1, bytes(32))
    [charge] = Ledger(tmp_path).charges()
    assert (charge.dpsgd, charge.noise_multiplier, charge.against) == (noise, 4.0, "coordinator")


@pytest.mark.parametrize(("epsilon", "fits"), [(8.0, True), (7.0, False)])
def test_whole_run_must_fit_a_budget_of_rows(tmp_path: Path, epsilon: float, fits: bool) -> None:
    noise = record_noise(contract(), Policy(), TERMS, ROWS)
    book = charging(site(tmp_path, budget=Budget(epsilon=epsilon, delta=1e-5, unit="record")), dpsgd=noise)
    if not fits:
        with pytest.raises(BudgetSpentError, match=r"epsilon of a record would be 7\.9"):
            book.check_run()
        return
    book.check_run()
    for number in (1, 2):
        book.charge(number, bytes(32))
    book.check_run()  # after a crash: two rounds are spent, one is left
    book.charge(3, bytes(32))
    with pytest.raises(BudgetSpentError):
        book.charge(4, bytes(32))


def test_budget_whose_delta_lets_a_row_be_published_is_refused(tmp_path: Path) -> None:
    budget = Budget(epsilon=8, delta=0.01, unit="record")
    with pytest.raises(UsageError, match=r"policy\.budget\.delta"):
        charging(site(tmp_path, budget=budget), contract(ClientFixed(noise_multiplier=9.0))).check_run()


PROTECTED = {
    "noise on updates protects a row half as well": (ClientFixed(noise_multiplier=4.0), False, "record", 2.0),
    "and all rows together as it says": (ClientFixed(noise_multiplier=4.0), False, "participant", 4.0),
    "the coordinator's noise protects nothing from it": (ServerFixed(noise_multiplier=4.0), False, "record", None),
    "noise on records protects no participant": (NoNoise(), True, "participant", None),
    "and is what counts where there is both": (ClientFixed(noise_multiplier=4.0), True, "record", 1.0),
    "even where the coordinator knows the other": (ServerFixed(noise_multiplier=4.0), True, "record", 1.0),
    "without any noise nothing is protected": (NoNoise(), False, "record", None),
}


@pytest.mark.parametrize(("privacy", "records", "unit", "noise"), PROTECTED.values(), ids=PROTECTED.keys())
def test_what_a_round_costs_depends_on_what_is_protected(
    tmp_path: Path, privacy: object, records: bool, unit: str, noise: float | None
) -> None:
    own = Release(1.0, 1.0, 1) if records else None
    charging(site(tmp_path), contract(privacy), own).charge(1, bytes(32))
    found = spent(Ledger(tmp_path).charges(), "data", unit, "coordinator", 1e-5)
    if noise is None:
        assert found.epsilon == float("inf")
    else:
        one = Release(noise, 1.0, 1)
        assert found == cost_of_integers([one], 1e-5)


def test_rows_that_changed_are_refused_under_noise_on_records_too(tmp_path: Path) -> None:
    noise = Release(1.0, 0.1, 5)
    charging(site(tmp_path), dpsgd=noise).charge(1, bytes(32))
    changed = Charging(site(tmp_path), contract(), Rows("01" * 32, ROWS), noise, accept_change=False)
    with pytest.raises(UsageError, match="the file has changed"):
        changed.check_run()
    with pytest.raises(UsageError, match="the file has changed"):
        changed.charge(2, bytes(32))
