"""A run's rounds in this site's privacy ledger: the whole run must fit, and each round is charged before it leaves.

Rounds without noise too: whoever sets a budget later must know of them.
"""

import math
from typing import NamedTuple

from mpctf_secure.config.privacy import NoNoise
from mpctf_secure.config.site import Policy, SiteConfig
from mpctf_secure.config.training import Training
from mpctf_secure.errors import UsageError
from mpctf_secure.participant.policy import UnsuitableError
from mpctf_secure.privacy.accountant import Cost, Release, check_delta, cost_of_integers, noise_for
from mpctf_secure.privacy.ledger import Charge, Ledger, check_budget, check_rows
from mpctf_secure.privacy.records import sampling_rate
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.terms import own_volume


def record_noise(contract: Proposal, policy: Policy, training: Training, rows: int) -> Release | None:
    """What this site's records need in each round, if the run has `record_dpsgd`; `training` is what it trains with.

    UnsuitableError where δ is too large for so many rows, or no noise is enough.
    """
    dpsgd = contract.privacy.record_dpsgd
    if dpsgd is None:
        return None
    steps = math.ceil(own_volume(contract.data, rows) * training.local_epochs / training.batch_size)
    rate, delta = sampling_rate(training.batch_size, rows), dpsgd.delta
    name, epsilon = "privacy.record_dpsgd.epsilon", dpsgd.epsilon
    if policy.record_epsilon and policy.record_epsilon < epsilon:
        name, epsilon = "policy.record_epsilon", policy.record_epsilon

    def price(noise: float) -> Cost:
        """Of the whole run."""
        return cost_of_integers([Release(noise, rate, contract.rounds * steps)], delta)

    try:
        check_delta("privacy.record_dpsgd.delta", delta, rows)
        return Release(noise_for(name, epsilon, price), rate, steps)
    except UsageError as error:
        raise UnsuitableError(error.message, hint=error.hint) from error


class Rows(NamedTuple):
    """A site's data file: its hash, and how many rows it has, held out or not."""

    fingerprint: str
    number: int


class Charging:
    """Of one run on these rows, with the noise on records that this site has accepted it with."""

    def __init__(
        self,
        site: SiteConfig,
        contract: Contract,
        rows: Rows,
        dpsgd: Release | None,
        *,
        accept_change: bool,
    ) -> None:
        self._site, self._contract, self._rows, self._dpsgd = site, contract, rows, dpsgd
        self._noised = dpsgd is not None or not isinstance(contract.privacy, NoNoise)
        self._accept_change = accept_change
        self._contract_hash = contract.hash.hex()
        self._ledger = Ledger(site.keys)

    def check_run(self) -> None:
        """BudgetSpentError where not all of its rounds that are left fit into the budget, void ones among them."""
        known = self._ledger.charges()  # read even without noise: an edited one is found before the first round
        budget = self._site.policy.budget
        if not self._noised:
            return
        check_rows(known, self._site.data_set, self._rows.fingerprint, accept_change=self._accept_change)
        if budget is None:
            return
        check_delta("policy.budget.delta", budget.delta, self._rows.number)
        done = len({charge.round for charge in known if charge.contract == self._contract_hash})
        rest = [self._charge(done + 1, bytes(32))] * (self._contract.rounds - done)
        check_budget([*known, *rest], self._site.data_set, budget)

    def charge(self, number: int, content: bytes) -> tuple[int, str]:
        """On disk when this returns; `content` is the hash of what leaves. As `Ledger.charge`."""
        return self._ledger.charge(
            self._charge(number, content),
            self._site.policy.budget,
            accept_change=self._accept_change or not self._noised,
        )

    def _charge(self, number: int, content: bytes) -> Charge:
        privacy = self._contract.privacy
        return Charge(
            data_set=self._site.data_set,
            fingerprint=self._rows.fingerprint,
            rows=self._rows.number,
            run=self._contract.run_id,
            contract=self._contract_hash,
            round=number,
            content=content.hex(),
            against=privacy.against,
            noise_multiplier=None if isinstance(privacy, NoNoise) else privacy.noise_multiplier,
            dpsgd=self._dpsgd,
            colluders=self._contract.colluders if privacy.holds_against_coordinator else 0,
        )
