"""What a run promises a participant: in numbers, and in words what the numbers are about."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from mpctf_secure.config.privacy import USUAL_DELTA, ByParticipants, Noised, NoNoise, RecordDpSgd
from mpctf_secure.privacy.accountant import Cost, Release, cost_of_integers
from mpctf_secure.rounds.contract import Proposal
from mpctf_secure.rounds.terms import fewest_survivors, hidden_shares

_NOISE = "discrete Gaussian on integers (Canonne, Kamath and Steinke 2020) from AES-256-CTR"
_NOTHING = "nothing was published"
_NOT_COVERED = (
    "whether and when a participant answers, and sizes of messages",
    "settings that a participant chose by looking at its data",
    "what a participant does with the adapter, such as publish its accuracy on rows that it holds out",
    "comparisons (`--compare`), which are trained without noise",
)

_NOT_COVERED_OF_RECORDS = (
    "how many records a site has, and how long its training takes",
    "what several records of one person tell together, or the same record at several sites",
)


class RoundSizes(NamedTuple):
    """How many were in a round's cohort, and whose updates its sum holds: as many, or none where it is void."""

    cohort: int
    survivors: int


def noise_of_round(contract: Proposal, privacy: Noised, sizes: RoundSizes) -> float:
    """z of one round, for both things that it publishes: at least the contract's, more where fewer were lost.

    A void round counts as one with the fewest survivors: its sum may have been seen.
    """
    if not isinstance(privacy, ByParticipants) or not sizes.survivors:
        return privacy.noise_multiplier
    needed = hidden_shares(contract, fewest_survivors(contract, sizes.cohort))
    return privacy.noise_multiplier * math.sqrt(max(hidden_shares(contract, sizes.survivors) / needed, 1.0))


def describe(contract: Proposal, rounds: Iterable[RoundSizes]) -> dict[str, Any]:
    """The guarantees of a participant's whole contribution over these rounds, and of each record, for report.json."""
    published, dpsgd = list(rounds), contract.privacy.record_dpsgd
    return {**_of_contributions(contract, published), "records": dpsgd and _of_records(dpsgd, published)}


def _of_records(dpsgd: RecordDpSgd, rounds: Sequence[RoundSizes]) -> dict[str, Any]:
    text = (
        f"epsilon {dpsgd.epsilon:g} or less at delta {dpsgd.delta:g} for each record, against everybody else, in this "
        "run alone (DP-SGD; each site has added the noise and recorded it, the coordinator cannot check it)"
    )
    return {
        "unit": "a record: a row of a site's data",
        "adjacency": "zero-out: the record, or one that teaches nothing in its place",
        "against": "everybody who does not see the site's own machines",
        "epsilon_at_most": dpsgd.epsilon,
        "delta": dpsgd.delta,
        "noise": f"{_NOISE}, added by each site to the sum of its records' clipped gradients in each step",
        "clip_norm": dpsgd.clip_norm,
        "accountant": "each site's: closed form without sampling, else the smaller of Renyi DP and PRV (Opacus)",
        "not_covered": [*_NOT_COVERED, *_NOT_COVERED_OF_RECORDS],
        "statement": Cost(dpsgd.epsilon, "").qualified(text) if rounds else _NOTHING,
    }


def _of_contributions(contract: Proposal, rounds: Sequence[RoundSizes]) -> dict[str, Any]:
    privacy = contract.privacy
    if not rounds:
        return {"strategy": privacy.strategy, "epsilon": 0.0, "accountant": None, "statement": _NOTHING}
    if isinstance(privacy, NoNoise):
        masked = "under masks" if contract.secure else "in the clear"
        text = f"updates are clipped and summed {masked}, but no noise is added to them"
        if not privacy.record_dpsgd:
            text = f"no differential privacy: {text}"
        return {"strategy": privacy.strategy, "statement": text}
    releases = [Release(noise_of_round(contract, privacy, sizes)) for sizes in rounds]
    by = "a share by every participant" if privacy.holds_against_coordinator else "by the coordinator"
    found: dict[str, Any] = {
        "strategy": privacy.strategy,
        "unit": "a participant's whole contribution",
        "adjacency": "zero-out: the contribution or nothing in its place",
        "against": _against(contract),
        "releases": len(releases),
        "noise": f"{_NOISE}, {by}",
        "noise_multiplier": privacy.noise_multiplier,
        "noise_multiplier_of_sums": [release.noise_multiplier for release in releases],
        "clip_norm": privacy.highest_clip_norm,
        "delta": USUAL_DELTA,
        "not_covered": list(_NOT_COVERED),
    }
    return {**found, **_spent(releases, found["against"])}


def _spent(releases: Sequence[Release], against: str) -> dict[str, Any]:
    spent = cost_of_integers(releases, USUAL_DELTA)
    text = (
        f"epsilon {spent.epsilon:.4g} at delta {USUAL_DELTA:g} for a participant's whole contribution, against "
        f"{against} ({spent.accountant}, {len(releases)} releases)"
    )
    return {"epsilon": spent.epsilon, "accountant": spent.accountant, "statement": spent.qualified(text)}


def _against(contract: Proposal) -> str:
    if not contract.privacy.holds_against_coordinator:
        return "participants and outsiders, who trust the coordinator to add the noise"
    if not contract.colluders:
        return "the coordinator or the other participant"
    return f"the coordinator and {contract.colluders} of the other participants together"
