"""What a round leaves for report.json."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from mpctf_secure.rounds.state import RoundSummary


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
            "rows": summary and summary.rows,
            "mean_loss": summary and summary.mean_loss,
            "clipped": summary
            and {"participants": summary.norm_clipped, "share_of_coordinates": summary.coordinates_clipped},
            "ring_bits": self.ring_bits,
            "seconds": self.seconds,
            "bytes_up": dict(self.bytes_up),
            "bytes_down": dict(self.bytes_down),
        }
