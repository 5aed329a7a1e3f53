"""What the rounds leave behind: a record of each for report.json, and events."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpctf_secure.coordinator.gate import Gate
from mpctf_secure.coordinator.journal import Ended, Journal
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.monitoring.events import Record
from mpctf_secure.rounds.outcome import Aggregate, RoundSummary
from mpctf_secure.rounds.state import Survey
from mpctf_secure.secagg.messages import Survivors
from mpctf_secure.secagg.parameters import Context

VETO = "refuses: "
"""How the reason begins of one who wants no part in something."""


def end_run(journal: Journal, record: Record, ended: Ended) -> None:
    """A run is over, for good; only the first end counts."""
    if journal.ended is None:
        record("run_ended", exit_code=ended.code, reason=ended.reason)
        journal.end(ended)


@dataclass
class RoundRecord:
    """One round as it is reported: names, never keys; no figure of a single participant but bytes and stages."""

    round: int
    cohort: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    dropouts: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes_down: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    ring_bits: int = 0
    attempts: int = 0
    void: str | None = None
    summary: RoundSummary | None = None
    survey: Survey | None = None
    bias: float | None = None
    """See `bias_of_means`."""

    def add_seconds(self, stage: str, seconds: float) -> None:
        """A stage took so long, in one of the round's attempts."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 3)

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        summary = self.summary
        return {
            "round": self.round,
            "cohort": self.cohort,
            "survivors": self.survivors,
            "attempts": self.attempts,
            "void": self.void,
            "dropouts": self.dropouts,
            "survey": self.survey and self.survey._asdict(),
            "rows": summary and summary.rows,
            "mean_loss": summary and summary.mean_loss,
            "validation_loss_before": summary and summary.loss_before,
            "bias_of_mean_factors": self.bias,
            "clipped": summary
            and {"participants": summary.norm_clipped, "share_of_coordinates": summary.coordinates_clipped},
            "ring_bits": self.ring_bits,
            "seconds": self.seconds,
            "bytes_up": dict(self.bytes_up),
            "bytes_down": dict(self.bytes_down),
        }


class Ledger:
    """The rounds of this process; `tell` gets the events. Both have names, never keys."""

    def __init__(self, roster: Roster, tell: Record) -> None:
        self.rounds: list[RoundRecord] = []
        self.refusing: dict[IdentityKey, str] = {}
        """Who has refused the attempt that is on, and why."""
        self.tell = tell
        self._roster = roster

    @property
    def round(self) -> RoundRecord:
        """The one that is on, or the last."""
        return self.rounds[-1]

    def name(self, member: IdentityKey) -> str:
        """Its name in the roster."""
        return str(self._roster.by_identity(member).name)

    def names(self, members: Iterable[IdentityKey]) -> list[str]:
        """Their names, sorted."""
        return sorted(map(self.name, members))

    def begin_round(self, number: int, banned: Mapping[IdentityKey, str]) -> RoundRecord:
        """A new record, of a round for which these are out already."""
        out = [{"participant": self.name(m), "stage": "cohort", "reason": why} for m, why in sorted(banned.items())]
        self.rounds.append(RoundRecord(number, dropouts=out))
        self.tell("round_started", round=number)
        return self.round

    def begin_attempt(self, context: Context) -> None:
        """Another attempt of the round, maybe its first."""
        record = self.round
        record.cohort, record.ring_bits = self.names(context.first_cohort), context.ring_bits
        record.attempts = context.attempt
        self.refusing.clear()
        which = {"round": context.round, "attempt": context.attempt, "context": context.digest().hex()}
        self.tell("attempt_opened", **which, cohort=self.names(context.cohort))

    def note_stage(self, gate: Gate, stage: str) -> None:
        """A gate is closed: who is missing is a dropout of this stage."""
        self.round.add_seconds(stage, gate.seconds)
        for member, reason in sorted(gate.left.items()):
            self._drop(member, stage, reason)
            if reason.startswith(VETO):
                self.refusing[member] = reason
        arrived = len(gate.arrived)
        self.tell("stage_closed", round=self.round.round, stage=stage, arrived=arrived, seconds=gate.seconds)

    def note_sum(self, survivors: Iterable[IdentityKey], said: Aggregate | Survey, digest: bytes) -> None:
        """A sum is on disk."""
        record = self.round
        record.survivors = self.names(survivors)
        if isinstance(said, Survey):
            record.survey = said
            sums = {"rows": said.rows, "products": said.products, "digest": digest.hex()}
            self.tell("sizes_added_up", round=record.round, survivors=record.survivors, **sums)
            return
        record.summary = summary = said.summary
        training = record.seconds["training"]
        self.tell(
            "sum_opened",
            round=record.round,
            survivors=record.survivors,
            rows=summary and summary.rows,
            mean_loss=summary and summary.mean_loss,
            validation_loss_before=summary and summary.loss_before,
            clipped=summary and summary.norm_clipped,
            digest=digest.hex(),
            training_seconds=training,
            aggregation_seconds=round(sum(record.seconds.values()) - training, 3),
        )

    def note_published(self, context: Context, claim: Survivors, digest: bytes) -> None:
        """For the audit log: whose inputs are in a sum, by what they signed, and who dropped out after sharing keys."""
        self.tell(
            "sum_published",
            round=context.round,
            attempt=context.attempt,
            tuple=claim.hash.hex(),
            survivors=self.names(claim.survivors),
            recovered=self.names(claim.dropouts),
            digest=digest.hex(),
        )

    def _drop(self, member: IdentityKey, stage: str, reason: str) -> None:
        entry = {"participant": self.name(member), "stage": stage, "reason": reason}
        if entry["participant"] in {known["participant"] for known in self.round.dropouts}:
            return  # what counts is where it was lost first
        self.round.dropouts.append(entry)
        self.tell("dropout", round=self.round.round, **entry)
