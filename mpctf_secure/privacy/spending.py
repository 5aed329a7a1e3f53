"""What a site's privacy ledger comes to, for people and for programs."""

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from mpctf_secure.config.privacy import USUAL_DELTA, Against
from mpctf_secure.config.site import Budget, Unit
from mpctf_secure.privacy.accountant import Cost, check_delta
from mpctf_secure.privacy.ledger import Charge, Ledger, spent

_WHOM = {
    "coordinator": "the coordinator, with as many participants as each run says",
    "participants": "participants and outsiders",
}
_UNITS = {"record": "a row", "participant": "all rows together"}
_ADJACENCY = {
    "record": "the row, or one that teaches nothing in its place",
    "participant": "this site's whole contribution to a round, or nothing in its place (zero-out)",
}
_NOISE = "discrete Gaussian by AES-CTR from a secret of the round; on updates as much as with the fewest survivors"
_NOT_COVERED = (
    "how many rows there are",
    "what several rows of one person tell together, or one row that is there twice",
    "whether and when this site answers, and how long its training takes",
    "settings chosen by looking at the rows",
    "losses and accuracies that this site measures and keeps",
)
_VERSIONS = {name: importlib.metadata.version(name) for name in ("mpctf-secure", "opacus", "scipy")}


def spending(keys: Path, delta: float | None, budget: Budget | None, data_set: str) -> list[dict[str, Any]]:
    """Of each data set in the ledger; `budget` is that of `data_set`.

    SecurityError for a ledger that was changed, UsageError for a δ with which a row may be published.
    """
    charges = Ledger(keys).charges()
    names = sorted({charge.data_set for charge in charges})
    return [_of_data_set(name, charges, delta, budget if name == data_set else None) for name in names]


def usual_delta(rows: int) -> float:
    """For a data set of so many rows where nobody says another."""
    return min(USUAL_DELTA, 0.1 / rows)


def _of_data_set(name: str, charges: Sequence[Charge], asked: float | None, budget: Budget | None) -> dict[str, Any]:
    own = [charge for charge in charges if charge.data_set == name]
    rows = max(charge.rows for charge in own)
    source, delta = ("policy.budget.delta", budget.delta) if budget else ("delta", usual_delta(rows))
    if asked is not None:
        source, delta = "--delta", asked
    check_delta(f"data set {name}: {source}", delta, rows)
    costs = {
        (unit, against): spent(own, name, unit, against, delta)
        for unit in get_args(Unit)
        for against in get_args(Against)
    }
    runs = dict[str, list[Charge]]()
    for charge in own:
        runs.setdefault(charge.run, []).append(charge)
    statements = [_statement(unit, against, cost, delta) for (unit, against), cost in costs.items()]
    if budget:
        of_budget = costs[budget.unit, budget.against]
        if delta != budget.delta:
            of_budget = spent(own, name, budget.unit, budget.against, budget.delta)
        left = max(budget.epsilon - of_budget.epsilon, 0)
        about = f"of {_UNITS[budget.unit]} against the {budget.against}"
        statements.append(f"budget: epsilon {budget.epsilon:g} at delta {budget.delta:g} {about}, {left:.4g} is left")
    return {
        "data_set": name,
        "rows": rows,
        "delta": delta,
        "spent": [
            {
                "unit": unit,
                "adjacency": _ADJACENCY[unit],
                "against": against,
                "epsilon": cost.epsilon if math.isfinite(cost.epsilon) else None,
                "accountant": cost.accountant,
            }
            for (unit, against), cost in costs.items()
        ],
        "charges": len(own),
        "runs": [_of_run(run, charges) for run, charges in runs.items()],
        "noise": _NOISE,
        "not_covered": list(_NOT_COVERED),
        "versions": _VERSIONS,
        "statements": statements,
    }


def _of_run(run: str, charges: Sequence[Charge]) -> dict[str, Any]:
    first = charges[0]  # the others have the same contract
    return {
        "run": run,
        "releases": len(charges),
        "noise_multiplier": first.noise_multiplier,
        "against": first.against,
        "colluders": first.colluders,
        "dpsgd": first.dpsgd and asdict(first.dpsgd),
    }


def _statement(unit: Unit, against: Against, cost: Cost, delta: float) -> str:
    about = f"{_UNITS[unit]}, against {_WHOM[against]}:"
    if math.isinf(cost.epsilon):
        return f"{about} NO GUARANTEE ({cost.accountant})"
    text = f"{about} epsilon {cost.epsilon:.4g} at delta {delta:g} ({cost.accountant})"
    return cost.qualified(text)
