"""What a site's privacy ledger comes to, for people and for programs."""

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mpctf_secure.config.site import Against, Budget, Unit
from mpctf_secure.privacy.accountant import Cost
from mpctf_secure.privacy.ledger import Charge, Ledger, spent

_WHOM = {
    "coordinator": "the coordinator, with as many participants as a run bears",
    "participants": "participants and outsiders",
}
_UNITS = {"record": "a row", "participant": "all rows together"}
_VERSIONS = [f"{name} {importlib.metadata.version(name)}" for name in ("mpctf-secure", "opacus", "scipy")]
_MEANING = (
    "a row: or one that teaches nothing in its place; whose text is in several rows is protected in each alone",
    "all rows together: this site's whole contribution to a round, or nothing in its place (zero-out)",
    "noise: discrete Gaussian by AES-CTR from the operating system's randomness, as much as with the fewest survivors",
    "not covered: how many rows there are, whether and when this site answers, settings chosen by looking at the rows",
)


def spending(keys: Path, delta: float, budget: Budget | None, data_set: str) -> list[dict[str, Any]]:
    """Of each data set in the ledger; SecurityError for a ledger that was changed. `budget` is that of `data_set`."""
    charges = Ledger(keys).charges()
    names = sorted({charge.data_set for charge in charges})
    return [_of_data_set(name, charges, delta, budget if name == data_set else None) for name in names]


def _of_data_set(name: str, charges: Sequence[Charge], delta: float, budget: Budget | None) -> dict[str, Any]:
    costs = {
        (unit, against): spent(charges, name, unit, against, delta)
        for unit in get_args(Unit)
        for against in get_args(Against)
    }
    own = [charge for charge in charges if charge.data_set == name]
    runs = dict[str, list[Charge]]()
    for charge in own:
        runs.setdefault(charge.run, []).append(charge)
    statements = [_statement(unit, against, cost, delta) for (unit, against), cost in costs.items()]
    if budget:
        left = max(budget.epsilon - costs[budget.unit, budget.against].epsilon, 0)
        about = f"of {_UNITS[budget.unit]} against the {budget.against}"
        statements.append(f"budget: epsilon {budget.epsilon:g} {about}, {left:.4g} is left")
    return {
        "data_set": name,
        "delta": delta,
        "spent": [
            {
                "unit": unit,
                "against": against,
                "epsilon": cost.epsilon if math.isfinite(cost.epsilon) else None,
                "accountant": cost.accountant,
            }
            for (unit, against), cost in costs.items()
        ],
        "charges": len(own),
        "runs": [_of_run(run, charges) for run, charges in runs.items()],
        "statements": [*statements, *_MEANING, f"computed with {', '.join(_VERSIONS)}"],
    }


def _of_run(run: str, charges: Sequence[Charge]) -> dict[str, Any]:
    first = charges[0]  # the others have the same contract
    return {
        "run": run,
        "releases": len(charges),
        "noise_multiplier": first.noise_multiplier,
        "against": first.against,
        "records": first.model_dump(include={"records"})["records"],
    }


def _statement(unit: Unit, against: Against, cost: Cost, delta: float) -> str:
    about = f"{_UNITS[unit]}, against {_WHOM[against]}:"
    if math.isinf(cost.epsilon):
        return f"{about} NO GUARANTEE ({cost.accountant})"
    text = f"{about} epsilon {cost.epsilon:.4g} at delta {delta:g} ({cost.accountant})"
    return f"NO MEANINGFUL GUARANTEE {text}" if cost.is_meaningless else text
