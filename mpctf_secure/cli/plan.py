"""What a run was started with: all that `runs resume` needs, kept in the run's folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mpctf_secure import files
from mpctf_secure.cli.local_sites import Material
from mpctf_secure.config.run import RunConfig
from mpctf_secure.errors import UsageError
from mpctf_secure.rounds.contract import Proposal

PLAN = "plan.json"
STOPPED = "stopped by its operator"
STOP = "stop"
"""A file of this name in a run's folder asks its coordinator to end the run."""


@dataclass(frozen=True)
class Plan:
    """A run file as it was resolved, the proposal made from it, the coordinator's keys, local material."""

    config: RunConfig
    proposal: Proposal
    home: Path
    material: Material | None
    compare: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write it to a run's folder."""
        content = {
            "config": self.config.model_dump(mode="json"),
            "proposal": self.proposal.model_dump(mode="json"),
            "home": str(self.home),
            "material": self.material and self.material.to_json(),
            "compare": self.compare,
        }
        files.replace(folder / PLAN, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it; UsageError for a folder that is no run's."""
        try:
            content: dict[str, Any] = json.loads((folder / PLAN).read_bytes())
            material = content["material"]
            return cls(
                RunConfig.model_validate(content["config"]),
                Proposal.model_validate(content["proposal"]),
                Path(content["home"]),
                Material.from_json(material) if material else None,
                tuple(content["compare"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder}: not the folder of a run", hint="mpctf-secure runs list") from error
