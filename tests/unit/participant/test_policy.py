import datetime
from pathlib import Path

import pytest

from mpctf_secure.config.privacy import ClientAdaptive, ClientFixed, NoNoise, RecordDpSgd, ServerFixed
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Budget, Compute, Policy
from mpctf_secure.config.strategies import FedAvg, FixedSize, MaxVolume, MemoryAware
from mpctf_secure.config.training import Training
from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.identity import ceremony
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import ParticipantName
from mpctf_secure.participant.policy import check_contract, check_packing, check_proposal, check_volume, told_size
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Facts, ModelHashes
from mpctf_secure.secagg.parameters import check_terms

NAMES = ("bank-b", "hospital-a", "insurer-d", "telecom-c")
FACTS = Facts(b"\2" * 32, ModelHashes(*[b"\1" * 32] * 3), (("t", (2, 3)),), size=100)


@pytest.fixture(scope="module")
def roster(tmp_path_factory: pytest.TempPathFactory) -> Roster:
    home: Path = tmp_path_factory.mktemp("homes")
    folders = {ParticipantName(name): home / name for name in (*NAMES, "coordinator")}
    return ceremony.hold(folders, ParticipantName("coordinator"), datetime.datetime.now(datetime.UTC), b"x")


def proposal(roster: Roster, **changes: object) -> Proposal:
    fields: dict[str, object] = {
        "run_id": "r", "roster_hash": roster.hash.hex(), "participants": NAMES, "quorum": 3, "colluders": 1,
        "allow_pair": False, "rounds": 2, "void_rounds": 1, "seed": 0, "base_model": "m", "lora": Lora(),
        "training": Training(), "data": FixedSize(), "aggregation": FedAvg(), "privacy": NoNoise(),
    }  # fmt: skip
    return Proposal(**{**fields, **changes})


REFUSED = {
    "another roster": {"roster_hash": "00" * 32},
    "a run without me": {"participants": NAMES[:2] + NAMES[3:]},
    "somebody who is not enrolled": {"participants": (*NAMES, "stranger")},
    "a participant twice": {"participants": (*NAMES, NAMES[0])},
    "the coordinator as participant": {"participants": (*NAMES, "coordinator")},
    "no colluders bound": {"colluders": 0},
    "colluders that leave no two honest members": {"colluders": 3},
    "a quorum at which two survivor sets could both open": {"quorum": 2},
    "a pair whose quorum is one": {"participants": ("bank-b", "insurer-d"), "colluders": 0, "quorum": 1},
    "a pair with colluders": {"participants": ("bank-b", "insurer-d"), "colluders": 1, "quorum": 2},
    "more void rounds than this site bears": {"void_rounds": 3},
    "a pair without this site's consent": {"participants": ("bank-b", "insurer-d"), "colluders": 0, "quorum": 2},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_proposal_below_a_floor_is_refused_and_the_coordinator_named(roster: Roster, changes) -> None:
    check_proposal(proposal(roster), Policy(), roster, "insurer-d")
    with pytest.raises(SecurityError) as caught:
        check_proposal(proposal(roster, **changes), Policy(), roster, "insurer-d")
    assert caught.value.culprits == ("coordinator",)


NOISE = ClientFixed(noise_multiplier=2.0)
BUDGET = Budget(epsilon=8, delta=1e-5, unit="participant")
OF_RECORDS = Budget(epsilon=8, delta=1e-5, unit="record")
DPSGD = NoNoise(record_dpsgd=RecordDpSgd(epsilon=8))
UNPRIVATE = {
    "noise on records only, and a budget of all rows together": (
        DPSGD, FixedSize(), Policy(budget=BUDGET), "adds no noise to a participant's update"),
    "no noise at all, and a budget of rows": (NoNoise(), FixedSize(), Policy(budget=OF_RECORDS), "unit record"),
    "the coordinator's noise, and a budget of rows against it": (
        ServerFixed(noise_multiplier=2.0), FixedSize(), Policy(budget=OF_RECORDS), "leaves the noise"),
    "no noise on records, on which the site insists": (
        NOISE, FixedSize(), Policy(record_epsilon=4), "policy.record_epsilon"),
    "sizes told beside noise on records": (DPSGD, MaxVolume(), Policy(), "max_volume tells sizes"),
    "no noise, and a budget": (NoNoise(), FixedSize(), Policy(budget=BUDGET), "adds no noise"),
    "the coordinator's noise, and a budget against it": (
        ServerFixed(noise_multiplier=2.0), FixedSize(), Policy(budget=BUDGET), "leaves the noise to the coordinator"),
    "a clip norm above this site's": (
        NOISE.model_copy(update={"clip_norm": 9.0}), FixedSize(), Policy(largest_clip_norm=8.0), "a clip norm of 9"),
    "one that may come to be above it": (
        ClientAdaptive(noise_multiplier=2.0), FixedSize(), Policy(largest_clip_norm=8.0), "a clip norm of 100"),
    "sizes told to all beside noise": (NOISE, MaxVolume(), Policy(), "max_volume tells sizes"),
    "sizes summed beside noise": (NOISE, MemoryAware(), Policy(), "memory_aware tells sizes"),
    "noise too little for a proof": (ClientFixed(noise_multiplier=2e-6), FixedSize(), Policy(), "outside"),
}  # fmt: skip


@pytest.mark.parametrize(("privacy", "data", "policy", "text"), UNPRIVATE.values(), ids=UNPRIVATE.keys())
def test_proposal_that_promises_less_than_it_seems_is_refused(
    roster: Roster, privacy: object, data: object, policy: Policy, text: str
) -> None:
    check_proposal(proposal(roster, privacy=NOISE), Policy(budget=BUDGET), roster, "insurer-d")
    with pytest.raises(SecurityError, match=text) as caught:
        check_proposal(proposal(roster, privacy=privacy, data=data), policy, roster, "insurer-d")
    assert caught.value.culprits == ("coordinator",)
    assert caught.value.hint


@pytest.mark.parametrize("privacy", [DPSGD, NOISE, NOISE.model_copy(update={"record_dpsgd": DPSGD.record_dpsgd})])
def test_rows_are_protected_by_noise_on_records_and_by_noise_on_updates(roster: Roster, privacy: object) -> None:
    check_proposal(proposal(roster, privacy=privacy), Policy(budget=OF_RECORDS), roster, "insurer-d")


def test_held_out_losses_beside_noise_on_records_are_refused(roster: Roster) -> None:
    with pytest.raises(SecurityError, match=r"training\.validation"):
        check_proposal(
            proposal(roster, privacy=DPSGD, training=Training(validation=0.1)), Policy(), roster, "insurer-d"
        )


def test_run_without_masks_is_refused_unless_this_site_allows_it(roster: Roster) -> None:
    clear = proposal(roster, secure=False)
    check_proposal(clear, Policy(allow_clear=True), roster, "insurer-d")
    with pytest.raises(SecurityError, match=r"secagg\.secure is false"):
        check_proposal(clear, Policy(), roster, "insurer-d")
    with pytest.raises(SecurityError, match="without masks"):
        check_proposal(proposal(roster, secure=False, privacy=NOISE), Policy(allow_clear=True), roster, "insurer-d")


def test_packed_rows_are_refused_where_each_needs_its_gradient(roster: Roster) -> None:
    check_packing(proposal(roster, privacy=NOISE), Compute(packing=True))
    check_packing(proposal(roster, privacy=DPSGD), Compute())
    with pytest.raises(UsageError, match=r"compute\.packing"):
        check_packing(proposal(roster, privacy=DPSGD), Compute(packing=True))


def test_pair_is_accepted_where_the_site_allows_it(roster: Roster) -> None:
    terms: dict[str, object] = {"participants": ("bank-b", "insurer-d"), "colluders": 0, "quorum": 2}
    pair = proposal(roster, **terms, allow_pair=True)
    check_proposal(pair, Policy(allow_pair=True), roster, "insurer-d")
    for weaker in ({"quorum": 1}, {"colluders": 1}, {"allow_pair": False}):
        with pytest.raises(SecurityError):
            check_proposal(
                proposal(roster, **{**terms, "allow_pair": True, **weaker}),
                Policy(allow_pair=True),
                roster,
                "insurer-d",
            )


def test_coordinator_cannot_choose_fewer_colluders_than_the_default() -> None:
    """Of ten, c = 1 would give t = 6: two survivor sets could both open with three real colluders."""
    check_terms(10, colluders=3, quorum=7, allow_pair=False)
    with pytest.raises(UsageError, match="colluders"):
        check_terms(10, colluders=1, quorum=6, allow_pair=False)


def sealed(terms: Proposal, **changes: object) -> Contract:
    fields = {
        **terms.model_dump(),
        "package": FACTS.package.hex(),
        "base_model_hash": FACTS.base_model.whole.hex(),
        "tensors": FACTS.tensors,
        "largest_size": FACTS.size,
    }
    return Contract(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 3},
        {"quorum": 4},
        {"base_model_hash": "00" * 32},
        {"package": "00" * 32},
        {"tensors": (("t", (2, 4)),)},
        {"largest_size": 99},
    ],
    ids=["other rounds", "other quorum", "another base model", "another version", "another schema", "a smaller size"],
)
def test_contract_that_differs_from_what_was_proposed_and_found_is_refused(roster: Roster, changes) -> None:
    terms = proposal(roster)
    check_contract(sealed(terms), terms, FACTS)
    with pytest.raises(SecurityError):
        check_contract(sealed(terms, **changes), terms, FACTS)


def test_round_that_goes_over_my_rows_too_often_is_refused(roster: Roster) -> None:
    """One site that claims 2^31 rows would have all others train on as many, again and again."""
    terms = proposal(roster, data=MaxVolume())
    check_volume(sealed(terms, largest_size=2000), Training(local_epochs=2), Policy(), 20)
    for largest, epochs, rows in ((2**31 - 1, 1, 500), (2000, 3, 20)):
        with pytest.raises(SecurityError, match="most_passes"):
            check_volume(sealed(terms, largest_size=largest), Training(local_epochs=epochs), Policy(), rows)
    with pytest.raises(SecurityError, match="101 times"):
        check_volume(sealed(proposal(roster)), Training(local_epochs=101), Policy(), 500)


def test_size_is_told_rounded_up_where_it_is_needed_and_only_if_the_site_allows_it(roster: Roster) -> None:
    assert told_size(MaxVolume(), Policy(), 101) == 200
    assert told_size(MaxVolume(), Policy(size_step=1), 101) == 101
    assert told_size(FixedSize(), Policy(), 101) == 0
    with pytest.raises(SecurityError, match="size_step"):
        check_proposal(proposal(roster, data=MaxVolume()), Policy(size_step=0), roster, "insurer-d")
    check_proposal(proposal(roster), Policy(size_step=0), roster, "insurer-d")
