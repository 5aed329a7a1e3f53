import pytest
from samples import make_contract

from mpctf_secure.cli.privacy_page import render
from mpctf_secure.config.privacy import ClientFixed, NoNoise, RecordDpSgd, ServerFixed
from mpctf_secure.rounds.guarantee import RoundSizes, describe


def page(privacy: object) -> str:
    contract = make_contract(privacy=privacy)
    return render(
        {
            "run_id": "joint-1",
            "participants": list(contract.participants),
            "rounds": [{"void": ""}, {"void": "too few"}],
            "exit": {"reason": "done"},
            "contract_hash": "ab" * 32,
            "versions": {"opacus": "1.6.0"},
            "privacy": describe(contract, [RoundSizes(3, 3)] * 2),
        }
    )


STRATEGIES = {
    "none": (NoNoise(), ["No differential privacy: updates"], ["## Each record"]),
    "noise of the participants": (
        ClientFixed(noise_multiplier=1.5),
        ["| noise multiplier, at least | 1.5 |", "a share by every participant", "| releases | 2 |", "Not covered:"],
        ["## Each record"],
    ),
    "noise on records beside the coordinator's": (
        ServerFixed(noise_multiplier=9.0, record_dpsgd=RecordDpSgd(epsilon=3)),
        ["by the coordinator", "## Each record", "| epsilon, at most | 3 |", "how many records a site has"],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("privacy", "said", "unsaid"), STRATEGIES.values(), ids=STRATEGIES.keys())
def test_page_says_what_is_promised_whom(privacy: object, said: list[str], unsaid: list[str]) -> None:
    text = page(privacy)
    assert text.startswith("# Privacy of run joint-1\n\n")
    assert "2 rounds, of which 1 have a sum" in text
    assert "opacus 1.6.0" in text
    for phrase in said:
        assert phrase in text
    for phrase in unsaid:
        assert phrase not in text


def test_meaningless_guarantee_is_called_so() -> None:
    assert "NO MEANINGFUL GUARANTEE" in page(ClientFixed(noise_multiplier=0.01))
