"""What a site's privacy ledger comes to, for people and for programs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpctf_secure.config.site import Budget
from mpctf_secure.privacy.accountant import Cost
from mpctf_secure.privacy.ledger import Charge, Ledger, spent

_WHOM = {
    "coordinator": "the coordinator, with as many participants as a run bears",
    "participants": "participants and outsiders",
}
_MEANING = (
    "unit: this site's whole contribution to a round, or nothing in its place (zero-out)",
    "noise: discrete Gaussian by AES-CTR from the operating system's randomness, as much as with the fewest survivors",
    "not covered: whether and when this site answers, settings chosen by looking at the rows, other copies of the rows",
)


def spending(keys: Path, delta: float, budget: Budget | None, data_set: str) -> list[dict[str, Any]]:
    """Of each data set in the ledger; SecurityError for a ledger that was changed. `budget` is that of `data_set`."""
    charges = Ledger(keys).charges()
    names = sorted({charge.data_set for charge in charges})
    return [_of_data_set(name, charges, delta, budget if name == data_set else None) for name in names]


def _of_data_set(name: str, charges: Sequence[Charge], delta: float, budget: Budget | None) -> dict[str, Any]:
    costs = {against: spent(charges, name, against, delta) for against in ("coordinator", "participants")}
    own = [charge for charge in charges if charge.data_set == name]
    runs = [
        {
            "run": run,
            "releases": sum(charge.run == run for charge in own),
            "noise_multiplier": min(charge.noise_multiplier or 0.0 for charge in own if charge.run == run),
            "against": next(charge.against for charge in own if charge.run == run),
        }
        for run in dict.fromkeys(charge.run for charge in own)
    ]
    statements = [_statement(against, cost, delta) for against, cost in costs.items()]
    if budget:
        left = max(budget.epsilon - costs[budget.against].epsilon, 0)
        statements.append(f"budget: epsilon {budget.epsilon:g} against the {budget.against}, {left:.4g} is left")
    return {
        "data_set": name,
        "delta": delta,
        "epsilon": {against: cost.epsilon if math.isfinite(cost.epsilon) else None for against, cost in costs.items()},
        "accountant": {against: cost.accountant for against, cost in costs.items()},
        "charges": len(own),
        "runs": runs,
        "statements": [*statements, *_MEANING],
    }


def _statement(against: str, cost: Cost, delta: float) -> str:
    text = f"against {_WHOM[against]}: epsilon {cost.epsilon:.4g} at delta {delta:g} ({cost.accountant})"
    return f"NO MEANINGFUL GUARANTEE {text}" if cost.is_meaningless else text
