"""The table at the end of a run: held-out accuracy of base, federated adapter and what it is compared with.

Scoring needs torch, so it runs in child processes of `start`, as many at a time as there are processors.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpctf_secure.cli.local_sites import Material
from mpctf_secure.cli.plan import Plan
from mpctf_secure.cli.screen import Screen
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.partition.held_out import divide
from mpctf_secure.partition.slices import round_slice
from mpctf_secure.rounds.contract import Proposal
from mpctf_secure.training import children
from mpctf_secure.training.rows import load_rows

Accuracies = dict[str, float]


def evaluate(plan: Plan, folder: Path, screen: Screen) -> Accuracies | None:
    """Accuracy by variant, None where the run has no test set; "alone" is trained at the same rows and steps."""
    config, material = plan.config, plan.material
    if material is None or material.test is None:
        return None
    variants = list(_variants(plan.proposal, material, folder, plan.compare))
    screen.line(f"scoring {', '.join(str(variant['name']) for variant in variants)} on the held-out rows")
    request = {
        "model": str(material.model),
        "test": str(material.test),
        "lora": config.model.lora.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json"),
        "seed": config.seed,
    }
    workers = max(1, min(os.cpu_count() or 1, len(variants)))
    homes = [folder / "evaluation" / str(number) for number in range(workers)]
    running = []
    try:
        for number, home in enumerate(homes):
            home.mkdir(parents=True)
            (home / "request.json").write_text(json.dumps({**request, "variants": variants[number::workers]}))
            argv = [sys.executable, "-m", "mpctf_secure.evaluation.score", str(home / "request.json")]
            threads = str(max(1, (os.cpu_count() or 1) // workers))
            running.append(children.spawn(argv, home / "score.log", {"OMP_NUM_THREADS": threads}))
        for child, home in zip(running, homes, strict=True):
            if child.wait() != 0:
                raise EnvironmentUnfitError("scoring failed", hint=f"see {home / 'score.log'}")
    finally:
        children.end(running)
    scored = {row["name"]: row["accuracy"] for home in homes for row in _read(home / "results.jsonl")}
    return {name: scored[name] for name in (str(variant["name"]) for variant in variants)}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _variants(
    proposal: Proposal, material: Material, folder: Path, compare: Sequence[str]
) -> Iterator[dict[str, object]]:
    slices = {name: _slices(proposal, name, path, folder) for name, path in material.data.items()}
    yield {"name": "base"}
    if "alone" in compare:
        for name, part in slices.items():
            yield {"name": f"{name} alone", "train": [part]}
    yield {"name": "federated", "adapter": str(folder / "adapter")}
    if "centralised" in compare:
        yield {"name": "centralised", "train": list(slices.values())}


def _slices(proposal: Proposal, name: str, path: Path, folder: Path) -> dict[str, object]:
    """The very rows that the participant trained on, by its own account."""
    rows, _ = divide(proposal.training.validation, len(load_rows(path)), proposal.seed, name)
    events = _read(folder / "sites" / name / "work" / "events.jsonl")
    trained = {event["turn"]: event["rows"] for event in events if event["event"] == "round_trained"}
    slices = (round_slice(turn, count, len(rows), proposal.seed, name) for turn, count in sorted(trained.items()))
    return {"data": str(path), "rounds": [[rows[index] for index in part] for part in slices]}
