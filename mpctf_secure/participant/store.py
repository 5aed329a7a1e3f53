"""What a site knows of its runs on disk: contracts, where each run stands, and how it ended. RECOVERY.md section 2.

Whoever calls has it on disk when the call returns. Model states lie beside the database, a file each.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mpctf_secure import files
from mpctf_secure.config.base import Hex32, Wire
from mpctf_secure.config.training import Choice
from mpctf_secure.database import Database
from mpctf_secure.errors import COORDINATOR, EnvironmentUnfitError, SecurityError
from mpctf_secure.privacy.accountant import Release
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.state import State, initial_state

_FILE = "site.sqlite"
_TERMS = "terms.json"
_SCHEMA = """
CREATE TABLE run (id TEXT PRIMARY KEY, contract BLOB, ended TEXT);
CREATE TABLE certificate (run TEXT, round INTEGER, body BLOB, PRIMARY KEY (run, round));
"""


class Terms(Wire):
    """What a site accepted a contract with, besides the contract."""

    data_hash: Hex32
    """Rows are chosen by number, and in another file the numbers mean other rows."""
    choice: Choice
    """Signed with the acceptance."""
    memory: Annotated[int, Field(ge=1)]
    """In MiB: once it is added up, this site's share depends on it."""
    own_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Where the contract's is larger."""
    dpsgd: Release | None = None
    """On records in each round of `record_dpsgd`: as much as the whole run needs, to its end."""


class Store:
    """The runs of one site; holds the site's lock, so that one agent of it works here."""

    def __init__(self, work: Path) -> None:
        """Open, or make a new one; EnvironmentUnfitError where another process has it or it cannot be read."""
        work.mkdir(mode=0o700, parents=True, exist_ok=True)  # logs may hold prompts
        self._work = work
        busy = EnvironmentUnfitError(f"{work}: another process of this site works here", hint="end one of the two")
        self._db = Database(work / _FILE, _SCHEMA, busy)

    def close(self) -> None:
        """Let go of the work folder."""
        self._db.close()

    def folder(self, run_id: str) -> Path:
        """Where the run's files lie."""
        return self._work / "runs" / run_id

    def knows(self, run_id: str) -> bool:
        """Whether this site ever accepted a contract of this run."""
        return self._contract(run_id) is not None

    def accept(self, contract: Contract, terms: Terms) -> None:
        """Keep what this site is about to sign; SecurityError for a second contract under a run's id."""
        known = self._contract(contract.run_id)
        for folder in (self._work / "runs", self.folder(contract.run_id)):
            files.make_folder(folder)
        if known is None:
            files.replace(self.folder(contract.run_id) / _TERMS, terms.encode())
            self._db.execute("INSERT INTO run VALUES (?, ?, NULL)", (contract.run_id, contract.encode()))
        elif known != contract.encode():
            raise SecurityError(f"another contract for run {contract.run_id}", culprits=[COORDINATOR])

    def terms(self, run_id: str) -> Terms | None:
        """Those with which the contract was accepted, None where there was none yet."""
        if not self.knows(run_id):
            return None
        path = self.folder(run_id) / _TERMS
        try:
            return Terms.decode(path.read_bytes())
        except (OSError, SecurityError) as error:
            raise EnvironmentUnfitError(f"{path}: {error}", hint="restore it, or leave the run") from error

    def last_state(self, contract: Contract) -> tuple[State, bytes | None]:
        """The newest state of a run, and the quorum's signatures of it where they were seen."""
        numbers = [int(path.stem) for path in self.folder(contract.run_id).glob("*.state")]
        if not numbers:
            return initial_state(contract), None
        path = self._state(contract.run_id, max(numbers))
        try:
            state = State.from_bytes(path.read_bytes())
        except SecurityError as error:
            raise EnvironmentUnfitError(f"{path}: {error.message}", hint="restore it, or leave the run") from error
        row = self._db.execute(
            "SELECT body FROM certificate WHERE run = ? AND round = ?", (contract.run_id, state.round)
        ).fetchone()
        return state, row[0] if row else None

    def keep(self, run_id: str, state: State) -> None:
        """The state that this site is about to say it holds."""
        files.replace(self._state(run_id, state.round), state.to_bytes())

    def certify(self, run_id: str, state: State, certificate: bytes) -> None:
        """A quorum holds this state, which is kept: those before it go."""
        self._db.execute("INSERT OR REPLACE INTO certificate VALUES (?, ?, ?)", (run_id, state.round, certificate))
        self._db.execute("DELETE FROM certificate WHERE run = ? AND round < ?", (run_id, state.round))
        for path in self.folder(run_id).glob("*.state"):
            if int(path.stem) < state.round:
                path.unlink()

    def end(self, run_id: str, how: str) -> None:
        """This site takes no more part in a run."""
        self._db.execute("UPDATE run SET ended = ? WHERE id = ?", (how, run_id))

    def open_runs(self) -> list[Contract]:
        """The contracts of runs that have not ended for this site."""
        return [Contract.decode(row[0]) for row in self._db.execute("SELECT contract FROM run WHERE ended IS NULL")]

    def ended(self, run_id: str) -> str | None:
        """How a run ended for this site, None while it has not."""
        row = self._db.execute("SELECT ended FROM run WHERE id = ?", (run_id,)).fetchone()
        return row[0] if row else None

    def _contract(self, run_id: str) -> bytes | None:
        row = self._db.execute("SELECT contract FROM run WHERE id = ?", (run_id,)).fetchone()
        return row[0] if row else None

    def _state(self, run_id: str, number: int) -> Path:
        return self.folder(run_id) / f"{number}.state"
