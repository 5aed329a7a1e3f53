"""What participants make the operator hear of: so much of it and no more, whatever they send."""

import math
import time
from collections import Counter
from dataclasses import asdict

from mpctf_secure.monitoring.events import Record
from mpctf_secure.monitoring.usage import Usage
from mpctf_secure.rounds.messages import Progress, TrainingFault

_MOST = {"refused": 10, "veto": 3, "training_failed": 100}  # of one participant in a run
_PAUSES = {"progress": 0.2, "resources": 10.0}  # seconds from one to the next of a participant


class Notices:
    """Makes events of what participants say and do, each kind up to its limit for each of them."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._counts: Counter[tuple[str, str]] = Counter()
        self._noted_at: dict[tuple[str, str], float] = {}

    def refused(self, participant: str, reason: str) -> None:
        """A message of theirs broke the rules."""
        self._refused(participant, reason, participant, "message")

    def turned_away(self, caller: str, reason: str, member: str | None) -> None:
        """A call did not get through, maybe of nobody in the roster: then its address is told, and in no log."""
        self._refused(caller, reason, member, "call")

    def _refused(self, caller: str, reason: str, member: str | None, at: str) -> None:
        left = self._left("refused", caller)
        if left >= 0:
            last = "" if left else "; its next ones are not told"
            self._record("refused", participant=caller, reason=f"{reason}{last}", member=member, at=at)

    def veto(self, participant: str, reason: str) -> None:
        """They want no part in the run, or in an attempt."""
        if self._left("veto", participant) >= 0:
            self._record("veto", participant=participant, reason=reason)

    def fault(self, participant: str, fault: TrainingFault) -> None:
        """Their training job failed."""
        if self._left("training_failed", participant) >= 0:
            self._record("training_failed", participant=participant, **vars(fault))

    def progress(self, participant: str, progress: Progress) -> None:
        """How far they are."""
        if self._is_due("progress", participant):
            self._record("progress", participant=participant, **vars(progress))

    def resources(self, participant: str, usage: Usage) -> None:
        """For people to look at: nothing is decided by it."""
        if self._is_due("resources", participant):
            for node, resources in usage.nodes.items():
                self._record("resources", participant=participant, node=node, **asdict(resources))

    def _left(self, kind: str, participant: str) -> int:
        """How many more of this kind are told of them; below zero: not this one either."""
        self._counts[kind, participant] += 1
        return _MOST[kind] - self._counts[kind, participant]

    def _is_due(self, kind: str, participant: str) -> bool:
        now = time.monotonic()
        due = now - self._noted_at.get((kind, participant), -math.inf) > _PAUSES[kind]
        if due:
            self._noted_at[kind, participant] = now
        return due
