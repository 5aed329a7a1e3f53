"""What a run keeps of its rounds on disk: the last sums, and the last state."""

import re
import shutil
from pathlib import Path

from mpctf_secure import files
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.rounds.state import State

KEPT_ROUNDS = 2
"""Of so many rounds, the open one counted, the sum is kept for who asks again."""


class Results:
    """One folder; uploads of attempts are in folders inside."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def uploads(self, number: int, attempt: int) -> Path:
        """The folder of an attempt's uploads."""
        return self._folder / f"round-{number}-{attempt}"

    def sum(self, number: int) -> Path:
        """The file of a round's sum."""
        return self._folder / f"round-{number}.sum"

    def load(self, number: int) -> State:
        """The state after a finished round; EnvironmentUnfitError where it is not there as it was."""
        path = self._state(number)
        try:
            return State.from_bytes(path.read_bytes())
        except (OSError, SecurityError) as error:
            raise EnvironmentUnfitError(
                f"{path}: no state of round {number}: {error}", hint="restore the file"
            ) from error

    def save(self, state: State) -> None:
        """On disk when this returns."""
        files.replace(self._state(state.round), state.to_bytes())

    def forget_before(self, number: int) -> None:
        """What is not needed any more once this round is finished."""
        self._state(number - 1).unlink(missing_ok=True)
        self.sum(number - KEPT_ROUNDS).unlink(missing_ok=True)

    def tidy(self, done: int) -> None:
        """Delete what an earlier process left of finished rounds."""
        for path in self._folder.glob("round-*"):
            number = int(re.split(r"[-.]", path.name)[1])
            if number <= done and path != self._state(done):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _state(self, number: int) -> Path:
        return self._folder / f"round-{number}.state"
