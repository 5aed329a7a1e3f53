"""What a run leaves behind: report.json and the resolved contract."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import yaml

from mpctf_secure import __version__
from mpctf_secure.cli import privacy_page
from mpctf_secure.cli.resources import over_the_run
from mpctf_secure.coordinator.runtime import Coordinator
from mpctf_secure.errors import MpctfError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.guarantee import RoundSizes, describe

_PACKAGES = ("torch", "transformers", "peft", "opacus", "numpy", "scipy", "cryptography", "pynacl", "grpcio")


def build(
    coordinator: Coordinator | None,
    proposal: Proposal,
    folder: Path,
    accuracies: dict[str, float] | None,
    failure: MpctfError | None,
) -> dict[str, Any]:
    """The report's content; also of a run that failed."""
    contract = coordinator.contract if coordinator else None
    rounds = coordinator.reports if coordinator else []
    sizes = (RoundSizes(len(one["cohort"]), len(one["survivors"])) for one in rounds if one["cohort"])
    weights = folder / "adapter" / "adapter_model.safetensors"
    return {
        "run_id": proposal.run_id,
        "exit": {"code": failure.exit_code if failure else 0, "reason": failure.message if failure else "done"},
        "culprits": list(failure.culprits) if failure else [],
        "contract_hash": contract.hash.hex() if contract else None,
        "adapter_sha256": sha256(weights.read_bytes()).hex() if weights.exists() else None,
        "participants": list(proposal.participants),
        "quorum": proposal.quorum,
        "privacy": describe(proposal, sizes),
        "choices": coordinator.choices if coordinator else {},
        "rounds": rounds,
        "resources": over_the_run(folder / "events.jsonl"),
        "held_out_accuracy": accuracies,
        "versions": {"mpctf-secure": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
        "hardware": {"machine": platform.machine(), "processors": os.cpu_count(), "python": platform.python_version()},
    }


def write(folder: Path, content: dict[str, Any]) -> None:
    """report.json and privacy.md, each complete or not at all."""
    for name, text in (("privacy.md", privacy_page.render(content)), ("report.json", json.dumps(content, indent=2))):
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.rename(folder / name)


def write_contract(folder: Path, contract: Contract) -> None:
    """config.yaml: the contract that every site accepted, and its hash."""
    content = {"contract_hash": contract.hash.hex(), **json.loads(contract.encode())}
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
