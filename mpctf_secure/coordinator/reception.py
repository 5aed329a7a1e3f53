"""Where participants' calls arrive: each is authenticated, led to its gate, and answered with a signed message."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mpctf_secure.coordinator.gate import SKIP, Answer, Gate
from mpctf_secure.coordinator.ledger import RoundRecord
from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.errors import SecurityError
from mpctf_secure.hazmat.encoding import Reader
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.monitoring.events import Record
from mpctf_secure.rounds.contract import Proposal
from mpctf_secure.rounds.messages import Announce, Fetch, Position, Progress
from mpctf_secure.secagg.messages import Signed

NOTED = Answer("noted", b"")
_KEPT_ROUNDS = 2
_PROGRESS_SECONDS = 0.2
_OF_AN_ATTEMPT = {"advert", "shares", "complaint", "consistency", "release"}
_POSITIONED = {"ready", "transition"}  # stages of the run, not of an attempt: the round is in the body


@dataclass(frozen=True)
class Outcome:
    """How a round ended: a signed header, and the chunks of the sum on disk where there is one."""

    header: bytes
    chunks: Callable[[], Iterable[bytes]] = tuple


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


class Reception:
    """The handler behind `transport.server`. What the stages mean is decided in `runtime`."""

    def __init__(self, proposal: Proposal, roster: Roster, key: SigningKey, record: Record) -> None:
        self.active = {m.identity for m in roster.participants if m.name in proposal.participants}
        self.gone: dict[IdentityKey, str] = {}
        self.spools: dict[bytes, Spool] = {}
        self.traffic = RoundRecord(0)
        self._proposal = proposal
        self._roster = roster
        self._key = key
        self._record = record
        self._gates: dict[tuple[str, bytes, int], Gate[Any]] = {}
        self._news: dict[int, News] = {}
        self._uploading: dict[IdentityKey, asyncio.Task[Any]] = {}
        self._progress_at: dict[str, float] = {}
        self._ended: str | None = None

    def open(
        self,
        label: str,
        ctx: bytes,
        number: int,
        awaited: Iterable[IdentityKey],
        accept: Callable[[IdentityKey, Any], None],
    ) -> Gate[Any]:
        """A new gate for messages with this label and context; participants that are gone are not awaited."""
        gate: Gate[Any] = Gate(set(awaited) - set(self.gone), accept)
        self._gates[label, ctx, number] = gate
        return gate

    def open_round(self, number: int) -> None:
        """Let the round's outcome be asked for; forget old gates but the transitions, which late sites still need."""
        self._news[number] = News()
        for old in [key for key in self._gates if 0 < key[2] <= number - _KEPT_ROUNDS and key[0] != "transition"]:
            del self._gates[old]

    def tell(self, number: int, news: Announce | Outcome) -> None:
        """Hand the news of a round to whoever asks for it."""
        self._news[number].tell(news)

    def end_attempt(self, ctx: bytes) -> None:
        """Nothing more is taken for this attempt; whoever waits in it is sent to ask for news."""
        for (_, gate_ctx, _), gate in self._gates.items():
            if gate_ctx == ctx:
                gate.answer({})
        if spool := self.spools.pop(ctx, None):
            spool.clear()

    def lose(self, name: str, reason: str) -> None:
        """A participant is known to have left: no stage waits for it any more."""
        member = next(member for member in self._roster.participants if member.name == name)
        self.gone.setdefault(member.identity, reason)
        for gate in self._gates.values():
            gate.drop(member.identity, reason)

    def end(self, reason: str) -> None:
        """The run is over: whoever still waits, or comes later, is told so."""
        self._ended = reason
        for gate in self._gates.values():
            gate.answer({}, otherwise=self._abort)
        for news in self._news.values():
            news.tell(self._abort)

    def sign(self, label: str, ctx: bytes, body: bytes) -> bytes:
        """A message of the coordinator."""
        return Signed.make(label, ctx, self._key, body).encode()

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        """One message of one participant: find its gate, wait there, sign the answer."""
        with Reader(request) as reader:
            label, ctx, message = reader.text(), reader.bytes(32), reader.bytes()
        self.traffic.bytes_up[peer.name] += len(request)
        answer = await self._answer(peer, label, ctx, message)
        reply = self._reply(ctx, answer)
        self.traffic.bytes_down[peer.name] += len(reply)
        return reply

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        """Spool a masked input, then wait at the gate like with any message. One stream a member: the newest."""
        with Reader(await anext(pieces, b"")) as opening:
            ctx, size = opening.bytes(32), opening.integer()
        gate = self._find("upload", ctx, None)
        if gate is None or ctx not in self.spools:
            return self.sign(SKIP.label, ctx, SKIP.body)
        if gate.closed or peer.identity not in {*gate.awaited, *gate.arrived}:
            return self._reply(ctx, await gate.wait(peer.identity))
        with self._newest_stream(peer):
            try:
                with self._refusing(peer):
                    async with gate.while_open():
                        upload = await self.spools[ctx].receive(pieces, size)
            except TimeoutError:
                return self._reply(ctx, await gate.wait(peer.identity))
            if upload is None:
                return b""  # to nobody: the connection is gone
            self.traffic.bytes_up[peer.name] += upload.size
            try:
                signed = Signed.decode(upload.trailer)
                return self._reply(ctx, await self._enter(gate, peer, "upload", ctx, upload, signed))
            finally:
                upload.path.unlink(missing_ok=True)  # it is still there if it was not kept

    @contextlib.contextmanager
    def _newest_stream(self, peer: Member) -> Iterator[None]:
        """End the peer's older stream, whose connection may have died unnoticed."""
        mine = asyncio.current_task()
        if older := self._uploading.get(peer.identity):
            older.cancel()
        if mine is not None:
            self._uploading[peer.identity] = mine
        try:
            yield
        finally:
            if self._uploading.get(peer.identity) is mine:
                del self._uploading[peer.identity]

    async def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
        """What became of a round, once the peer cannot know it yet: an attempt, or the outcome."""
        message = Signed.decode(request)
        self._check_sender(peer, message, "fetch", message.ctx)
        fetch = Fetch.decode(message.body)
        if fetch.position.round not in self._news:
            raise SecurityError(f"there is no round {fetch.position.round}", culprits=[peer.name])
        news = await self._news[fetch.position.round].after(fetch.attempt, peer.identity)
        if isinstance(news, Announce):
            yield self.sign("announce", message.ctx, news.encode())
        elif isinstance(news, Answer):
            yield self._reply(message.ctx, news)
        else:
            yield news.header
            for chunk in news.chunks():
                self.traffic.bytes_down[peer.name] += len(chunk)
                yield chunk

    def _reply(self, ctx: bytes, answer: Answer) -> bytes:
        return self.sign(answer.label, ctx, answer.body)

    @property
    def _abort(self) -> Answer:
        return Answer("abort", (self._ended or "").encode())

    async def _answer(self, peer: Member, label: str, ctx: bytes, message: bytes) -> Answer:
        # The signed part of `shares` is inside, with the boxes behind it.
        signed = Signed.decode(Reader(message).bytes() if label == "shares" else message)
        match label:
            case "hello":
                if signed.ctx != self._roster.hash:
                    raise SecurityError(
                        f"{peer.name} has another roster than version {self._roster.version} of this run",
                        hint="mpctf-secure enroll show at both ends; install the newest one",
                        culprits=[peer.name],
                    )
                self._check_sender(peer, signed, label, self._roster.hash)
                return Answer("proposal", self._proposal.encode())
            case "progress" if self._ended is None:
                self._check_sender(peer, signed, label, ctx)
                self._note_progress(peer, Progress.decode(signed.body))
                return NOTED
        if self._ended is not None:
            return self._abort
        number = Position.decode(signed.body).round if label in _POSITIONED else None
        gate = self._find(label, ctx, number)
        if gate:
            return await self._enter(gate, peer, label, ctx, message, signed)
        self._check_sender(peer, signed, label, signed.ctx)
        if label in _OF_AN_ATTEMPT or (label == "ready" and number is not None and number < max(self._news, default=0)):
            return SKIP  # so late that its gate is forgotten
        raise SecurityError(f"a {label} message is not due", culprits=[peer.name])

    def _note_progress(self, peer: Member, progress: Progress) -> None:
        """A few events a second from one participant at the most, whatever it sends."""
        now = asyncio.get_running_loop().time()
        if now - self._progress_at.get(peer.name, 0) > _PROGRESS_SECONDS:
            self._progress_at[peer.name] = now
            self._record("progress", participant=peer.name, **vars(progress))

    def _find(self, label: str, ctx: bytes, number: int | None) -> Gate[Any] | None:
        matches = (gate for (a, b, n), gate in self._gates.items() if (a, b) == (label, ctx) and number in {None, n})
        return next(matches, None)

    async def _enter(
        self, gate: Gate[Any], peer: Member, label: str, ctx: bytes, message: Any, signed: Signed
    ) -> Answer:
        self._check_sender(peer, signed, label, ctx)
        with self._refusing(peer):
            return await gate.enter(peer.identity, message)

    @contextlib.contextmanager
    def _refusing(self, peer: Member) -> Iterator[None]:
        """Who breaks the protocol is out of the run."""
        try:
            yield
        except SecurityError as error:
            self._record("refused", participant=peer.name, reason=error.message)
            self.lose(peer.name, f"refused: {error.message}")
            raise

    def _check_sender(self, peer: Member, message: Signed, label: str, ctx: bytes) -> None:
        """The signer is the TLS peer and in the run: nobody passes on another's message."""
        if message.sender != peer.identity:
            raise SecurityError("message is not signed by who sent it", culprits=[peer.name])
        if peer.identity not in self.active:
            raise SecurityError(f"{peer.name} is not in this run", culprits=[peer.name])
        if peer.identity in self.gone:
            raise SecurityError(f"{peer.name} is out of this run: {self.gone[peer.identity]}", culprits=[peer.name])
        message.verify(label, ctx)
