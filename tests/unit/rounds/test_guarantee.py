import pytest
from samples import make_contract

from mpctf_secure.config.privacy import ClientAdaptive, ClientFixed, NoNoise, RecordDpSgd, ServerFixed
from mpctf_secure.rounds.guarantee import RoundSizes, describe, noise_of_round
from mpctf_secure.rounds.terms import noise_scheme

TEN = tuple("abcdefghij")
ONE = [RoundSizes(10, 10)]
CLAIM_3 = 4.397  # noise multiplier of ε = 3 in ten rounds at δ = 1e-5


def contract(privacy: object, **changes: object) -> object:
    return make_contract(**{"participants": TEN, "colluders": 3, "quorum": 7, "privacy": privacy, **changes})


def spent(privacy: object, survivors: int, **changes: object) -> float:
    return describe(contract(privacy, **changes), [RoundSizes(10, survivors)] * 10)["epsilon"]


def test_epsilon_of_the_fewest_survivors_is_the_claim_and_of_more_is_less() -> None:
    privacy = ClientFixed(noise_multiplier=CLAIM_3, dropouts=2)
    assert spent(privacy, 8) == pytest.approx(3.0, abs=2e-3)
    assert spent(privacy, 10) == pytest.approx(2.48, abs=0.01)  # 7 honest shares where 5 suffice
    assert spent(privacy, 0) == spent(privacy, 8)  # void: its sum may have been seen


def test_noise_without_over_provision_would_not_do() -> None:
    """Shares for ten survivors, of whom eight are left: with three who collude five of seven."""
    assert spent(ClientFixed(noise_multiplier=CLAIM_3 * (5 / 7) ** 0.5, dropouts=2), 8) == pytest.approx(
        3.635, abs=2e-3
    )


def test_coordinators_noise_is_the_same_whoever_is_lost() -> None:
    privacy = ServerFixed(noise_multiplier=CLAIM_3)
    assert spent(privacy, 7) == spent(privacy, 10) == pytest.approx(3.0, abs=2e-3)
    assert "trust the coordinator" in describe(contract(privacy), ONE)["against"]


def test_a_pair_counts_on_one_share_only() -> None:
    pair = contract(ClientFixed(noise_multiplier=CLAIM_3), participants=("a", "b"), colluders=0, quorum=2)
    assert noise_of_round(pair, pair.privacy, RoundSizes(2, 2)) == CLAIM_3


def test_adaptive_noise_is_charged_for_both_releases() -> None:
    assert spent(ClientAdaptive(noise_multiplier=CLAIM_3, dropouts=2), 8) == pytest.approx(3.0, abs=2e-3)


def test_adaptive_scheme_spends_on_both_releases_what_the_contract_says() -> None:
    for noise in (1e-4, CLAIM_3, 1e3):
        scheme = noise_scheme(contract(ClientAdaptive(noise_multiplier=noise)), 1.0, 10)
        joint = scheme.noise_multiplier**-2 + (2 * scheme.indicator_noise) ** -2
        assert joint == pytest.approx(noise**-2, rel=1e-12)
        assert scheme.noise_multiplier > noise


def test_words_say_what_the_numbers_are_about() -> None:
    private = describe(contract(ClientFixed(noise_multiplier=CLAIM_3)), [RoundSizes(10, 10)])
    assert "the coordinator and 3 of the other participants together" in private["statement"]
    assert private["adjacency"].startswith("zero-out")
    weak = describe(contract(ClientFixed(noise_multiplier=1e-3)), [RoundSizes(10, 10)])
    assert weak["statement"].startswith("NO MEANINGFUL GUARANTEE, only clipping and regularising noise: epsilon")
    assert describe(contract(NoNoise()), [RoundSizes(10, 10)])["statement"].startswith("no differential privacy")


@pytest.mark.parametrize("privacy", [NoNoise(), ServerFixed(noise_multiplier=1.0)])
def test_run_without_a_round_claims_nothing(privacy: NoNoise | ServerFixed) -> None:
    noised = privacy.model_copy(update={"record_dpsgd": RecordDpSgd(epsilon=8)})
    found = describe(contract(noised), [])
    assert found["statement"] == found["records"]["statement"] == "nothing was published"


def test_noise_of_each_sum_is_told() -> None:
    found = describe(
        contract(ClientFixed(noise_multiplier=CLAIM_3, dropouts=2)), [RoundSizes(10, 8), RoundSizes(10, 10)]
    )
    assert found["noise_multiplier_of_sums"] == pytest.approx([CLAIM_3, CLAIM_3 * (7 / 5) ** 0.5])


@pytest.mark.parametrize("privacy", [NoNoise(), ServerFixed(noise_multiplier=CLAIM_3)])
def test_guarantee_of_records_is_told_beside_that_of_contributions(privacy: NoNoise | ServerFixed) -> None:
    assert describe(contract(privacy), ONE)["records"] is None
    noised = privacy.model_copy(update={"record_dpsgd": RecordDpSgd(epsilon=8, delta=1e-6)})
    found = describe(contract(noised), ONE)
    assert "no differential privacy" not in found["statement"]
    assert (found["records"]["epsilon_at_most"], found["records"]["delta"]) == (8, 1e-6)
    assert found["records"]["statement"].startswith("epsilon 8 or less at delta 1e-06 for each record")
    assert any("how many records" in text for text in found["records"]["not_covered"])


def test_noise_on_records_that_means_nothing_is_called_so() -> None:
    noised = NoNoise(record_dpsgd=RecordDpSgd(epsilon=51))
    assert describe(contract(noised), ONE)["records"]["statement"].startswith("NO MEANINGFUL GUARANTEE")
