"""The run contract: every fact that all sites agree on before anything is trained. Its hash is in every message."""

from typing import Annotated

from pydantic import Field

from mpctf_secure.config.base import Hex32, Wire
from mpctf_secure.config.privacy import Privacy
from mpctf_secure.config.run import MOST_ROUNDS, Lora
from mpctf_secure.config.strategies import Aggregation, Count, Data, MemoryAware
from mpctf_secure.config.training import Training
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.ids import NAME
from mpctf_secure.quorum import default_quorum


class Proposal(Wire):
    """What the coordinator's operator asks for; a site checks it against its policy before it loads anything."""

    run_id: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    roster_hash: Hex32
    participants: tuple[str, ...]
    quorum: Count
    colluders: Annotated[int, Field(ge=0)]
    allow_pair: bool
    secure: bool = True
    """Whether updates are masked."""
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS + 1)]
    """All of them; under `memory_aware` the first one adds up sizes, and only the others train."""
    void_rounds: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    base_model: str
    lora: Lora
    training: Training
    data: Data
    aggregation: Aggregation
    privacy: Privacy

    @property
    def agreement(self) -> int:
        """How many must hold a state before anybody goes on with it.

        More than half of all members and colluders, so that two different states of a round never both get so many,
        whatever cohorts a coordinator shows to whom.
        """
        return default_quorum(len(self.participants), self.colluders)

    @property
    def training_rounds(self) -> int:
        """R of the data strategies."""
        return self.rounds - isinstance(self.data, MemoryAware)


class Contract(Proposal):
    """The proposal and what the sites found when they loaded the model, the same everywhere."""

    package: Hex32
    """Hash of the program's files: all run the same, from the first round to the last."""
    base_model_hash: Hex32
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the LoRA tensors in canonical order: the adapter's schema."""
    largest_size: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The largest of the sizes that sites told for `max_volume`."""

    @property
    def hash(self) -> bytes:
        """SHA-256 of the canonical encoding."""
        return sha256(self.encode())

    @property
    def schema_hash(self) -> bytes:
        """SHA-256 over names and shapes."""
        return sha256(b"".join(enc(name, *shape) for name, shape in self.tensors))

    @property
    def run_context(self) -> bytes:
        """ctx of the messages that belong to the run and to no attempt."""
        return sha256(enc("mpctf-secure/run/v1", self.run_id, bytes.fromhex(self.roster_hash), self.hash))
