"""A run's rounds in this site's privacy ledger: the whole run must fit, and each round is charged before it leaves.

Rounds without noise too: whoever sets a budget later must know of them.
"""

from mpctf_secure.config.privacy import NoPrivacy
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import UsageError
from mpctf_secure.privacy.ledger import Charge, Ledger, check_budget, check_rows
from mpctf_secure.rounds.contract import Contract


class Charging:
    """Of one run, with the rows that have this hash."""

    def __init__(self, site: SiteConfig, contract: Contract, fingerprint: bytes, *, accept_change: bool) -> None:
        self._site, self._contract, self._accept_change = site, contract, accept_change
        self._contract_hash = contract.hash.hex()
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
        done = sum(charge.contract == self._contract_hash for charge in known)
        if left := self._contract.rounds - done:
            rest = self._charge(done + 1, bytes(32)).model_copy(update={"steps": left})
            check_budget([*known, rest], self._site.data_set, budget)

    def charge(self, number: int, content: bytes) -> None:
        """On disk when this returns; `content` is the hash of what leaves."""
        noised = not isinstance(self._contract.privacy, NoPrivacy)
        self._ledger.charge(
            self._charge(number, content),
            self._site.policy.budget if noised else None,  # a run without noise was refused already where there is one
            accept_change=self._accept_change or not noised,
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
        )
