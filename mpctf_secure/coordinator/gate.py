"""A gate: one stage at which participants arrive with a message and wait until all may pass."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from mpctf_secure.ids import IdentityKey

M = TypeVar("M")


class Answer(NamedTuple):
    """What goes back to one participant."""

    label: str
    body: bytes


SKIP = Answer("skip", b"")


class Gate(Generic[M]):
    """Collects one message from each awaited member, then answers all of them; late ones get `otherwise`.

    A message may come again after its answer was lost: it is checked again and gets the same answer.
    """

    def __init__(self, awaited: Iterable[IdentityKey], accept: Callable[[IdentityKey, M], None]) -> None:
        self.awaited = set(awaited)
        self.closed = False
        self.left: dict[IdentityKey, str] = {}
        """Who was awaited and is no more, and why."""
        self._limits: set[asyncio.Timeout] = set()
        self._accept = accept
        self._arrived: dict[IdentityKey, M] = {}
        self._changed = asyncio.Event()
        self._replies: asyncio.Future[Callable[[IdentityKey], Answer]] = asyncio.get_running_loop().create_future()

    @property
    def arrived(self) -> list[IdentityKey]:
        """Who is in, in the order of arrival."""
        return list(self._arrived)

    @property
    def messages(self) -> list[M]:
        """What they brought."""
        return list(self._arrived.values())

    async def enter(self, sender: IdentityKey, message: M) -> Answer:
        """Hand in a message and wait for the answer; raises what `accept` raises.

        Once the gate is closed nothing is accepted any more, for the protocol has moved on; whoever comes then, again
        or late, only waits for the answer.
        """
        if not self.closed and (sender in self.awaited or sender in self._arrived):
            self._accept(sender, message)
            self._arrived[sender] = message
            self.awaited.discard(sender)
            self._changed.set()
        return await self.wait(sender)

    async def wait(self, sender: IdentityKey) -> Answer:
        """The answer, once there is one."""
        reply = await asyncio.shield(self._replies)
        return reply(sender)

    def drop(self, member: IdentityKey, reason: str) -> None:
        """Wait for this one no longer."""
        if member in self.awaited:
            self.awaited.discard(member)
            self.left[member] = reason
            self._changed.set()

    async def collect(self, seconds: float, least: int) -> bool:
        """Close when all have arrived, when fewer than `least` still can, or when the time is up (then True)."""
        try:
            # Not wait_for: before Python 3.12 it can swallow a cancellation that comes together with the event.
            async with asyncio.timeout(seconds):
                while self.awaited and len(self.arrived) + len(self.awaited) >= least:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return True
        finally:
            self._close()
        return False

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

    def _close(self) -> None:
        self.closed = True
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())
