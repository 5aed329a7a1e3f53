"""A run's rounds in this site's privacy ledger: the whole run must fit, and each round is charged before it leaves.

Rounds without noise too: whoever sets a budget later must know of them.
"""

from mpctf_secure.config.privacy import NoPrivacy
from mpctf_secure.config.site import Policy, SiteConfig
from mpctf_secure.config.strategies import FixedSize, Percentage
from mpctf_secure.config.training import Training
from mpctf_secure.privacy.accountant import Release, check_delta
from mpctf_secure.privacy.ledger import Charge, Ledger, check_budget, check_rows
from mpctf_secure.privacy.records import release_of_round
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.terms import own_volume


def record_noise(contract: Proposal, policy: Policy, training: Training, rows: int) -> Release | None:
    """What this site's records need in each round, if the run has `record_dpsgd`; `training` is what it trains with.

    UsageError where δ is too large for so many rows, or no noise is enough.
    """
    dpsgd, data = contract.privacy.record_dpsgd, contract.data
    if dpsgd is None or not isinstance(data, FixedSize | Percentage):
        return None
    check_delta("privacy.record_dpsgd.delta", dpsgd.delta, rows)
    return release_of_round(
        min(dpsgd.epsilon, policy.record_epsilon or dpsgd.epsilon),
        dpsgd.delta,
        records=rows,
        batch_size=training.batch_size,
        volume=own_volume(data, rows) * training.local_epochs,
        rounds=contract.rounds,
    )


class Charging:
    """Of one run, with the rows that have this hash, and the noise on records that this site has accepted it with."""

    def __init__(
        self,
        site: SiteConfig,
        contract: Contract,
        fingerprint: bytes,
        records: Release | None,
        *,
        accept_change: bool,
    ) -> None:
        self._site, self._contract, self._records = site, contract, records
        self._noised = records is not None or not isinstance(contract.privacy, NoPrivacy)
        self._accept_change = accept_change
        self._contract_hash = contract.hash.hex()
        self._fingerprint = fingerprint.hex()
        self._ledger = Ledger(site.keys)

    def check_run(self, rows: int) -> None:
        """BudgetSpentError where not all of its rounds that are left fit into the budget, void ones among them."""
        if not self._noised:
            return
        known, budget = self._ledger.charges(), self._site.policy.budget
        check_rows(known, self._site.data_set, self._fingerprint, accept_change=self._accept_change)
        if budget is None:
            return
        check_delta("policy.budget.delta", budget.delta, rows)
        done = len({charge.round for charge in known if charge.contract == self._contract_hash})
        rest = [self._charge(done + 1, bytes(32))] * (self._contract.rounds - done)
        check_budget([*known, *rest], self._site.data_set, budget)

    def charge(self, number: int, content: bytes) -> None:
        """On disk when this returns; `content` is the hash of what leaves."""
        self._ledger.charge(
            self._charge(number, content),
            self._site.policy.budget if self._noised else None,  # where there is one such a run was refused already
            accept_change=self._accept_change or not self._noised,
        )

    def _charge(self, number: int, content: bytes) -> Charge:
        privacy, against, noise = self._contract.privacy, "nobody", None
        if not isinstance(privacy, NoPrivacy):
            against, noise = "participants", privacy.noise_multiplier
        if privacy.holds_against_coordinator:
            against = "coordinator"
        return Charge(
            data_set=self._site.data_set,
            fingerprint=self._fingerprint,
            run=self._contract.run_id,
            contract=self._contract_hash,
            round=number,
            content=content.hex(),
            against=against,
            noise_multiplier=noise,
            records=self._records,
        )
