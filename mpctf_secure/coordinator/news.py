"""What became of a round, for those who ask."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mpctf_secure.coordinator.gate import Answer
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.messages import Announce


@dataclass(frozen=True)
class Outcome:
    """How a round ended: a signed header, and the chunks of the sum on disk, from one on, where there is a sum."""

    header: bytes
    chunks: Callable[[int], Iterable[bytes]] = lambda _: ()


class News:
    """What became of a round so far: its latest attempt after the first, then its outcome."""

    def __init__(self) -> None:
        self._announce: Announce | None = None
        self._outcome: Outcome | Answer | None = None
        self._changed = asyncio.Event()

    def tell(self, news: Announce | Outcome | Answer) -> None:
        """Let everybody who waits look; an outcome is final, an answer means that the run is over."""
        if isinstance(news, Announce):
            self._announce = news
        else:
            self._outcome = self._outcome or news
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, attempt: int, member: IdentityKey) -> Announce | Outcome | Answer:
        """The outcome, or an attempt above `attempt` that this member may take part in."""
        while True:
            if self._outcome:
                return self._outcome
            if self._announce and self._announce.attempt > attempt and member in self._announce.cohort:
                return self._announce
            await self._changed.wait()
