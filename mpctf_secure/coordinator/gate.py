"""A gate: one stage at which participants arrive with a message and wait until all may pass.

Rules of this file:
- Whatever an answer may depend on is logged first: a message before its sender counts, a closing before anything
  follows from it. A restarted coordinator is fed its log: `take` and `close_as` do what `enter` and time did.
- Nobody says two things: the same message again gets the same answer, another one is refused.
- A closed gate accepts nothing. Who comes then, late or again with the same, only waits for the answer.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import NamedTuple

from mpctf_secure.coordinator.journal import Closed, GateKey, Message, Row
from mpctf_secure.errors import SecurityError
from mpctf_secure.ids import IdentityKey

_LOOK_SECONDS = 0.5


class Answer(NamedTuple):
    """What goes back to one participant."""

    label: str
    body: bytes


SKIP = Answer("skip", b"")


class Gate:
    """Collects one message from each expected member, then answers all of them; late ones get `otherwise`."""

    def __init__(
        self,
        key: GateKey,
        expected: Iterable[IdentityKey],
        accept: Callable[[IdentityKey, bytes], None],
        log: Callable[[Row], None] = lambda _: None,
        live: asyncio.Event | None = None,
    ) -> None:
        self.key = key
        self.awaited = set(expected)
        self.closed = False
        self.left: dict[IdentityKey, str] = {}
        """Who was awaited and is no more, and why."""
        self.seconds = 0.0
        self.waited = False
        """Whether somebody has begun to wait for its closing."""
        self._expected = frozenset(self.awaited)
        self._accept = accept
        self._log = log
        self._live = live
        self._opened = asyncio.get_running_loop().time()
        self._limits: set[asyncio.Timeout] = set()
        self._arrived: dict[IdentityKey, bytes] = {}
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._replies: asyncio.Future[Callable[[IdentityKey], Answer]] = asyncio.get_running_loop().create_future()

    @property
    def arrived(self) -> list[IdentityKey]:
        """Who is in, in the order of arrival."""
        return list(self._arrived)

    @property
    def messages(self) -> list[bytes]:
        """What they brought."""
        return list(self._arrived.values())

    @property
    def age(self) -> float:
        """Seconds since it was opened."""
        return asyncio.get_running_loop().time() - self._opened

    def expects(self, sender: IdentityKey) -> bool:
        """Whether a message of this member would still be taken, for the first time or again."""
        return not self.closed and sender in self._expected

    async def enter(self, sender: IdentityKey, message: bytes) -> Answer:
        """Hand in a message and wait for the answer; raises what `accept` raises."""
        # Before the first round a site may still mend what it is; behind a closed gate nothing of it counts.
        differs = self._arrived.get(sender, message) != message
        if differs and self.key.round:
            raise SecurityError(
                f"a second, different {self.key.label} message",
                hint="does another machine use the same keys?",
                culprits=[sender.hex()],
            )
        if self.expects(sender) and (differs or sender not in self._arrived):
            self._accept(sender, message)
            self._log(Message(self.key, sender, message))
            self._count(sender, message)
        return await self.wait(sender)

    async def wait(self, sender: IdentityKey) -> Answer:
        """The answer, once there is one."""
        reply = await asyncio.shield(self._replies)
        return reply(sender)

    def take(self, sender: IdentityKey, message: bytes) -> None:
        """A message from the log."""
        self._accept(sender, message)
        self._count(sender, message)

    def close_as(self, left: Mapping[IdentityKey, str], seconds: float) -> None:
        """A closing from the log, whatever time says and whoever has left since."""
        self.left, self.seconds = dict(left), seconds
        self._close()

    def drop(self, member: IdentityKey, reason: str) -> None:
        """Wait for this one no longer; it may still come while the gate is open."""
        if member in self.awaited:
            self.awaited.discard(member)
            self.left[member] = reason
            self._changed.set()

    def expel(self, member: IdentityKey, reason: str) -> None:
        """Wait for this one no longer, and while the gate is open do not count it either."""
        self.drop(member, reason)
        if not self.closed and self._arrived.pop(member, None) is not None:
            self.left[member] = reason
            self._changed.set()

    def fail(self, error: Exception) -> None:
        """Whoever collects here gets this error."""
        self._failure = error
        self._changed.set()

    async def collect(self, seconds: float, least: int, done: Callable[[], bool] = lambda: False) -> None:
        """Close when all have arrived, when fewer than `least` still can, when `done` says so, or the time is up."""
        await self._until(
            lambda: not self.awaited or len(self._arrived) + len(self.awaited) < least or done(), seconds, 0
        )

    async def gather(self, done: Callable[[], bool], seconds: float, quorum: int) -> None:
        """Close when all have arrived, when `done` says so, which is asked again and again, or when the time is up.

        With fewer than a quorum the closing is not logged: a restart finds the gate open, with those who are in.
        """
        await self._until(lambda: self._expected <= self._arrived.keys() or done(), seconds, quorum)

    def answer(self, replies: Mapping[IdentityKey, Answer], otherwise: Answer = SKIP) -> None:
        """Let everybody pass. Only the first answer counts."""
        self._close()
        if not self._replies.done():
            self._replies.set_result(lambda sender: replies.get(sender, otherwise))

    @contextlib.asynccontextmanager
    async def while_open(self) -> AsyncIterator[None]:
        """End the block with TimeoutError when the gate closes: no stalled stream outlives its stage."""
        async with asyncio.timeout(None) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    async def _until(self, done: Callable[[], bool], seconds: float, quorum: int) -> None:
        """Wait for the log first, if there is one to be fed from; what it closed is not logged again."""
        self.waited = True
        await self._replayed()
        if self.closed:
            return
        late = False
        try:
            # Not wait_for: before Python 3.12 it can swallow a cancellation that comes together with the event.
            async with asyncio.timeout(seconds):
                while not done():
                    await self._change()
                    if self._failure:
                        raise self._failure
        except TimeoutError:
            late = True
        self.seconds = round(self.age, 3)
        # Who is still awaited where it was not the time that ended the stage is nobody's loss: too few were left.
        self.left |= dict.fromkeys(self.awaited, f"no answer in {seconds:g} s") if late else {}
        if len(self._arrived) >= quorum:
            self._log(Closed(self.key, self.left, self.seconds))
        self._close()

    async def _replayed(self) -> None:
        while self._live is not None and not self._live.is_set() and not self.closed:
            await self._change()

    async def _change(self) -> None:
        """Until something happens here, or for a moment: what `done` asks may have changed elsewhere."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_SECONDS):
                await self._changed.wait()

    def _count(self, sender: IdentityKey, message: bytes) -> None:
        self._arrived[sender] = message
        self.awaited.discard(sender)
        self.left.pop(sender, None)
        self._changed.set()

    def _close(self) -> None:
        self.closed = True
        self._changed.set()
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())
