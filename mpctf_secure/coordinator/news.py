"""What became of rounds, for those who ask."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mpctf_secure.coordinator.gate import Answer
from mpctf_secure.coordinator.journal import Finished
from mpctf_secure.coordinator.results import KEPT_ROUNDS
from mpctf_secure.errors import SecurityError
from mpctf_secure.identity.roster import Member
from mpctf_secure.ids import IdentityKey
from mpctf_secure.rounds.messages import Announce, Caught, Fetch, LogRequest
from mpctf_secure.rounds.state import State

LogOf = Callable[[LogRequest], tuple[bytes, Iterable[bytes]]]


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


class Archive:
    """The open round's news, the rounds that are finished, and the log of the run.

    `sign` makes a message from label, context and body; `log` gives a step's checkpoint, and leaves in pieces.
    """

    def __init__(self, finished: list[Finished], sign: Callable[[str, bytes, bytes], bytes], log: LogOf) -> None:
        self.finished = finished
        self.state: State | None = None
        """After the last finished round: for those who were away."""
        self._sign, self._log = sign, log
        self._news: dict[int, News] = {}

    def open_round(self, number: int) -> None:
        """Let the round's outcome be asked for; forget rounds long past, about which the answer is `behind`."""
        self._news[number] = News()
        self._news.pop(number - KEPT_ROUNDS, None)

    def tell(self, number: int, news: Announce | Outcome) -> None:
        """Hand the news of a round to whoever asks for it."""
        self._news[number].tell(news)

    def end(self, answer: Answer) -> None:
        """The run is over, which is news of every round."""
        for news in self._news.values():
            news.tell(answer)

    def certificate(self, number: int | None) -> bytes | None:
        """The quorum's signatures of a finished round's state."""
        return next((row.certificate for row in self.finished if row.round == number), None)

    def log_of(self, ctx: bytes, request: LogRequest) -> Iterator[bytes]:
        """A step's checkpoint, signed for this context, and the leaves that are asked for."""
        note, leaves = self._log(request)
        return itertools.chain([self._sign("log", ctx, note)], leaves)

    def state_after(self, ctx: bytes, fetch: Fetch) -> Iterator[bytes]:
        """The last finished state, if it is later than the one that the site holds, and all outcomes since then."""
        number = fetch.position.round
        if self.state is None or self.state.round <= number:
            yield self._sign("current", ctx, b"")
            return
        missed = [row.outcome for row in self.finished if row.round > number]
        caught = Caught(self.state.header, len(missed), self.finished[-1].certificate)
        yield self._sign("state", ctx, caught.encode())
        yield from missed[fetch.held :]
        yield from self.state.chunks(max(fetch.held - len(missed), 0))

    async def news_of(self, peer: Member, ctx: bytes, fetch: Fetch) -> Answer | Iterable[bytes]:
        """What became of a round, as soon as there is something that this member has not heard."""
        number = fetch.position.round
        if number <= len(self.finished) and number not in self._news:
            return [self._sign("behind", ctx, b"")]
        if number not in self._news:
            raise SecurityError(f"there is no round {number}", culprits=[peer.name])
        news = await self._news[number].after(fetch.attempt, peer.identity)
        if isinstance(news, Announce):
            return [self._sign("announce", ctx, news.encode())]
        if isinstance(news, Answer):
            return news
        return itertools.chain([news.header], news.chunks(fetch.held))
