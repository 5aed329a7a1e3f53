"""The run file: what the coordinator's operator writes. Defaults make most lines unnecessary."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mpctf_secure.config.address import Address
from mpctf_secure.config.base import Frozen
from mpctf_secure.config.privacy import NoNoise, Privacy
from mpctf_secure.config.strategies import Aggregation, Count, Data, FedAvg, FixedSize
from mpctf_secure.config.training import Training
from mpctf_secure.ids import NAME

BUILTIN = "builtin:"
"""Prefix of data and models that the program makes itself: builtin:intents, builtin:tiny-llama."""

MOST_ROUNDS = 10_000
Seconds = Annotated[float, Field(gt=0)]


class Participants(Frozen):
    """A list of enrolled names; or local participants, each its own process on this machine."""

    enrolled: tuple[Annotated[str, Field(pattern=f"^{NAME.pattern}$")], ...] = ()
    local: Annotated[int, Field(ge=2, le=26)] | None = None
    data: str = ""
    """Of local ones: one file each with `{participant}` in its name, one for all with `split`, or builtin:intents."""
    split: Literal["iid", "label"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _list_of_names(cls, value: object) -> object:
        return {"enrolled": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_source_each(self) -> Self:
        if bool(self.enrolled) == bool(self.local):
            raise ValueError("name enrolled participants in a list, or say how many local ones to start")
        if self.enrolled:
            return self
        named_each = "{participant}" in self.data or self.data.startswith(BUILTIN)
        if named_each and self.split:
            raise ValueError("split divides one file; this data already names one for each participant")
        if not named_each and not self.split:
            raise ValueError("one file for all needs split: iid or split: label, or put {participant} in its name")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Those listed, or site-1 … site-N."""
        return self.enrolled or tuple(f"site-{number}" for number in range(1, (self.local or 0) + 1))


class Lora(Frozen):
    """The adapter's shape."""

    r: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Count = 16
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Model(Frozen):
    """The base model: a folder, a name in the model cache, or builtin:tiny-llama."""

    base: str
    lora: Lora = Lora()


class Secagg(Frozen):
    """Secure aggregation; the ring follows from state and cohort."""

    colluders: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    allow_pair: bool = False
    secure: bool = True
    """False: the coordinator sees each update, for experiments; a site refuses unless its policy says allow_clear."""
    void_rounds: Annotated[int, Field(ge=0)] = 2
    """How many rounds may end without a sum; one round at least must have one."""


class Evaluation(Frozen):
    """A common held-out set, scored after the run."""

    test: str | None = None
    """A file of rows like the training data; builtin:intents brings its own."""


class Timeouts(Frozen):
    """After this long, a stage closes without those who have not answered."""

    join: Seconds = 600
    training: Seconds = 24 * 3600
    stage: Seconds = 120
    """Of masked inputs: without a byte of any; once enough are in, the others have as long again besides."""
    absence: Annotated[float, Field(ge=0)] = 3600
    """How long a run waits while fewer than a quorum are there; then it can be resumed."""


class RunConfig(Frozen):
    """A whole run."""

    run: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,39}[a-z0-9])?$")] = "run"
    participants: Participants
    model: Model
    quorum: Annotated[int, Field(ge=2)] | None = None
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = 4
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    listen: Address = "127.0.0.1:0"
    """IP literal and port; enrolled participants need a fixed port that they can reach."""
    keys: Path = Path("keys")
    """The coordinator's keys and roster, for enrolled participants; relative to this file."""
    training: Training = Training()
    data: Data = FixedSize()
    aggregation: Aggregation = FedAvg()
    secagg: Secagg = Secagg()
    privacy: Privacy = NoNoise()
    evaluation: Evaluation = Evaluation()
    timeouts: Timeouts = Timeouts()

    @field_validator("evaluation")
    @classmethod
    def _scored_where_the_model_is(cls, evaluation: Evaluation, info: ValidationInfo) -> Evaluation:
        if evaluation.test and "participants" in info.data and info.data["participants"].enrolled:
            raise ValueError("a test set is for local participants: here the coordinator has no model to score")
        return evaluation
