"""A run's rounds in this site's privacy ledger: the whole run must fit, and each round is charged before it leaves."""

from mpctf_secure.config.privacy import NoPrivacy
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import UsageError
from mpctf_secure.privacy.ledger import Charge, Ledger, check_budget, check_rows
from mpctf_secure.rounds.contract import Contract


class Charging:
    """`rows` of the data set that has this hash take part in a run; nothing is charged where a run adds no noise."""

    def __init__(self, site: SiteConfig, contract: Contract, fingerprint: bytes, *, accept_change: bool) -> None:
        self._site, self._contract, self._accept_change = site, contract, accept_change
        self._fingerprint = fingerprint.hex()
        self._ledger = Ledger(site.keys)

    def check_run(self, rows: int) -> None:
        """BudgetSpentError where not all of its rounds that are left fit into the budget, void ones among them."""
        if isinstance(self._contract.privacy, NoPrivacy):
            return
        known, budget = self._ledger.charges(), self._site.policy.budget
        check_rows(known, self._site.data_set, self._fingerprint, accept_change=self._accept_change)
        if budget is None:
            return
        if budget.delta >= 1 / rows:
            raise UsageError(
                f"policy.budget.delta: {budget.delta:g} is not below one over {rows} rows",
                hint="else to publish a whole row would be allowed",
            )
        done = sum(charge.contract == self._contract.hash.hex() for charge in known)
        left = [self._charge(round, bytes(32)) for round in range(done, self._contract.rounds)]
        check_budget([*known, *left], self._site.data_set, budget)

    def charge(self, number: int, content: bytes) -> None:
        """On disk when this returns; `content` is the hash of what leaves."""
        if not isinstance(self._contract.privacy, NoPrivacy):
            charge = self._charge(number, content)
            self._ledger.charge(charge, self._site.policy.budget, accept_change=self._accept_change)

    def _charge(self, number: int, content: bytes) -> Charge:
        privacy = self._contract.privacy
        if isinstance(privacy, NoPrivacy):
            raise ValueError("a run without noise")
        return Charge(
            data_set=self._site.data_set,
            fingerprint=self._fingerprint,
            run=self._contract.run_id,
            contract=self._contract.hash.hex(),
            round=number,
            content=content.hex(),
            against="coordinator" if privacy.holds_against_coordinator else "participants",
            noise_multiplier=privacy.noise_multiplier,
        )
