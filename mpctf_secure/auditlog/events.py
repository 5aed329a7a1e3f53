"""What logs tell: the kinds of leaves of a run's log, and the fields that may be in one; own_events.py has the others.

A leaf's fields are chosen here, not where something happens: what is recorded for people to look at has more of them
(`monitoring.events`), which do not get into a log by accident.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from mpctf_secure.config.base import Frozen, Hex32
from mpctf_secure.ids import NAME

Key = tuple[str | int, ...]
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Names = tuple[Name, ...]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # what RFC 8785 takes
Text = Annotated[str, Field(max_length=100)]
"""Ours, never a person's or a peer's."""


class Leaf(Frozen):
    """What happened."""

    ONCE: ClassVar[tuple[str, ...] | None] = None
    """The fields of which a log has each combination once; None where it may have any number."""
    kind: str

    @property
    def key(self) -> Key | None:
        """The kind and those fields."""
        return None if self.ONCE is None else (self.kind, *(getattr(self, name) for name in self.ONCE))


class RunOpened(Leaf):
    """The first leaf of a run's log: what was proposed to whom, by which program, under which roster."""

    ONCE = ()
    kind: Literal["run_opened"] = "run_opened"
    run: Name
    roster_version: Count
    roster_hash: Hex32
    package: Hex32
    participants: Names


class ProcessStarted(Leaf):
    """The coordinator's process begins, or goes on with the run: the protection that the kernel reports."""

    kind: Literal["process_started"] = "process_started"
    version: Text
    package: Hex32
    protections: tuple[Text, ...]


class ContractClosed(Leaf):
    """What every site found is the same; the contract that all are asked to accept."""

    ONCE = ()
    kind: Literal["contract_closed"] = "contract_closed"
    contract_hash: Hex32
    base_model_hash: Hex32


class StepWitnessed(Leaf):
    """The hash of a step's certificate: who has cosigned its checkpoint, and each one's commitment to its own log."""

    ONCE = ("round",)
    kind: Literal["step_witnessed"] = "step_witnessed"
    round: Count
    certificate: Hex32
    witnesses: Names


class AttemptOpened(Leaf):
    """A try at a round: its context binds roster, contract, model, state and cohort."""

    ONCE = ("round", "attempt")
    kind: Literal["attempt_opened"] = "attempt_opened"
    round: Count
    attempt: Count
    context: Hex32
    cohort: Names


class AttemptFailed(Leaf):
    """A try without a sum. `tuple` as in SumPublished, if it came so far."""

    ONCE = ("round", "attempt")
    kind: Literal["attempt_failed"] = "attempt_failed"
    round: Count
    attempt: Count
    tuple: Hex32 | None


class SumPublished(Leaf):
    """The aggregate: its digest as published, with the noise that the contract asks for, and whose inputs it holds."""

    ONCE = ("round",)
    kind: Literal["sum_published"] = "sum_published"
    round: Count
    attempt: Count
    tuple: Hex32
    """Hash of what the survivors signed: key transcript, who shared, who uploaded, the digest of each masked input."""
    survivors: Names
    recovered: Names
    """Whose pairwise masks were removed from shares of others, since they dropped out after sharing."""
    digest: Hex32


class RoundVoid(Leaf):
    """A round without a sum; `convicted` is a dealer with a proof against it."""

    ONCE = ("round",)
    kind: Literal["round_void"] = "round_void"
    round: Count
    attempt: Count
    convicted: Name | None


class RoundClosed(Leaf):
    """The hash of the state after a round, which also binds every outcome before it."""

    ONCE = ("round",)
    kind: Literal["round_closed"] = "round_closed"
    round: Count
    state_hash: Hex32


class Dropout(Leaf):
    """Somebody was awaited at a stage of a round and is not in."""

    kind: Literal["dropout"] = "dropout"
    round: Count
    participant: Name
    stage: Text


class Refused(Leaf):
    """A message of a member broke the rules, or a call did not get through, maybe one of nobody in the roster."""

    kind: Literal["refused"] = "refused"
    member: Name | None
    at: Literal["message", "call"]


class Vetoed(Leaf):
    """A site wants no part in the run or in an attempt."""

    kind: Literal["veto"] = "veto"
    participant: Name


class Banned(Leaf):
    """A participant is out of the run."""

    ONCE = ("participant",)
    kind: Literal["banned"] = "banned"
    participant: Name


class RosterChanged(Leaf):
    """A newer roster was put in force in the middle of a run."""

    kind: Literal["roster_changed"] = "roster_changed"
    version: Count
    hash: Hex32
    gone: Names


class ModelExported(Leaf):
    """The adapter was written: SHA-256 of adapter_model.safetensors."""

    ONCE = ()
    kind: Literal["model_exported"] = "model_exported"
    adapter: Hex32


class RunInterrupted(Leaf):
    """The coordinator's process ends, and the run does not."""

    kind: Literal["run_interrupted"] = "run_interrupted"
    exit_code: Count


class RunEnded(Leaf):
    """The last leaf of a run's log."""

    ONCE = ()
    kind: Literal["run_ended"] = "run_ended"
    exit_code: Count


class ClockSet(Leaf):
    """The writer's clock went back: the leaf before is from `before`."""

    kind: Literal["clock_set"] = "clock_set"
    before: Text


class LogRecovered(Leaf):
    """So many bytes behind the last whole leaf were dropped at opening: what a power cut, or a full disk, had left."""

    kind: Literal["log_recovered"] = "log_recovered"
    dropped: Count


OfRun = (
    RunOpened
    | ProcessStarted
    | ContractClosed
    | StepWitnessed
    | AttemptOpened
    | AttemptFailed
    | SumPublished
    | RoundVoid
    | RoundClosed
    | Dropout
    | Refused
    | Vetoed
    | Banned
    | RosterChanged
    | ModelExported
    | RunInterrupted
    | RunEnded
    | ClockSet
    | LogRecovered
)
"""What a run's log may hold."""
_KINDS_OF_RUN: Mapping[str, type[Leaf]] = {leaf.model_fields["kind"].default: leaf for leaf in get_args(OfRun)}


def leaf_of(kind: str, fields: Mapping[str, Any]) -> Leaf | None:
    """Of what is told of a run, the leaf for its log; None for what is for people only."""
    leaf = _KINDS_OF_RUN.get(kind)
    if leaf is None:
        return None
    return leaf.model_validate({name: value for name, value in fields.items() if name in leaf.model_fields})
