"""What a run was started with: all that `runs resume` needs, kept in the run's folder."""

from pathlib import Path
from typing import Self

from mpctf_secure import files
from mpctf_secure.cli.local_sites import Material
from mpctf_secure.config.base import Frozen
from mpctf_secure.config.run import RunConfig
from mpctf_secure.errors import UsageError
from mpctf_secure.rounds.contract import Proposal

PLAN = "plan.json"
STOPPED = "stopped by its operator"
STOP = "stop"
"""A file of this name in a run's folder asks its coordinator to end the run."""


class Plan(Frozen):
    """A run file as it was resolved, the proposal made from it, the coordinator's keys, local material."""

    config: RunConfig
    proposal: Proposal
    home: Path
    material: Material | None
    compare: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write it to a run's folder."""
        files.replace(folder / PLAN, self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read it; UsageError for a folder that is no run's."""
        try:
            return cls.model_validate_json((folder / PLAN).read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder}: not the folder of a run", hint="mpctf-secure runs list") from error
