"""Where participants' calls arrive: each is authenticated, led to its gate, and answered with a signed message."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from mpctf_secure.coordinator.gate import SKIP, Answer, Gate
from mpctf_secure.coordinator.journal import Attempt, Banned, Closed, Finished, GateKey, Journal, Message, Row
from mpctf_secure.coordinator.ledger import VETO, RoundRecord
from mpctf_secure.coordinator.news import Archive, LogOf
from mpctf_secure.coordinator.notices import Notices
from mpctf_secure.coordinator.results import KEPT_ROUNDS
from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.encoding import Reader, enc
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.monitoring.events import Record
from mpctf_secure.monitoring.usage import Usage
from mpctf_secure.rounds.contract import Proposal
from mpctf_secure.rounds.messages import Fetch, LogRequest, Progress, TrainingFault, round_of
from mpctf_secure.rounds.state import State
from mpctf_secure.secagg.messages import Signed

NOTED = Answer("noted", b"")
AGAIN = Answer("again", b"")
_PRESENT_SECONDS = 60.0
_TICK_SECONDS = 0.01
_MOST_REASON = 1000
_OF_AN_ATTEMPT = {"advert", "shares", "complaint", "consistency", "release"}
_OF_THE_RUN = {"accept", "ready", "transition", "alive", "progress", "resources", "fault", "done"}
_UNTIL_CLOSED = {"facts", "accept", "ready", "transition"}  # what came counts once the stage is closed


class Reception:
    """The handler behind `transport.server`. What the stages mean is decided in `runtime`."""

    def __init__(
        self, proposal: Proposal, roster: Roster, key: SigningKey, record: Record, journal: Journal, log: LogOf
    ) -> None:
        self.look: Callable[[], None] = lambda: None
        """Bans whoever a newer roster has removed; asked before anything is decided by who is in."""
        self.active = {m.identity for m in roster.participants if m.name in proposal.participants}
        self.banned: dict[IdentityKey, str] = {}
        """Out of the run for good, and why."""
        self.lost: dict[IdentityKey, str] = {}
        """Known to have left, and why; whoever calls again is back."""
        self.archive = Archive(journal.finished(), self.sign, log)
        self.run_context: bytes | None = None
        """Of the contract, once there is one."""
        self.told: set[IdentityKey] = set()
        """Who has said that it holds the last state, signed by a quorum."""
        self.live = asyncio.Event()
        """Set once the journal is replayed, and what follows from it is done: from then on calls are taken."""
        self.fed = asyncio.Event()
        """Set before, once its last row is read: from then on what happens is new."""
        self.spools: dict[bytes, Spool] = {}
        self.traffic = RoundRecord(0)
        self._proposal = proposal
        self._roster = roster
        self._key = key
        self._record, self._notices = record, Notices(record)
        self._journal = journal
        self._attempts: dict[tuple[int, int], tuple[IdentityKey, ...]] = {}
        self._calls: Counter[IdentityKey] = Counter()
        self._heard: dict[IdentityKey, float] = {}
        self._gates: dict[GateKey, Gate] = {}
        self._row_read = asyncio.Event()
        self._undecided: set[tuple[int, int]] = set()
        self._uploading: dict[IdentityKey, asyncio.Task[Any]] = {}
        self._ended: str | None = None
        self._dismissed: set[IdentityKey] = set()
        self._failure: EnvironmentUnfitError | None = None

    def open(
        self,
        label: str,
        ctx: bytes,
        number: int,
        expected: Iterable[IdentityKey],
        accept: Callable[[IdentityKey, bytes], None],
    ) -> Gate:
        """A new gate for messages with this label and context; who is lost is not awaited, and may still come."""
        if self._failure:
            raise self._failure
        gate = Gate(GateKey(label, ctx, number), set(expected) - set(self.banned), accept, self._log, self.live)
        for member, reason in self.lost.items():
            gate.drop(member, reason)
        self._gates[gate.key] = gate
        return gate

    def open_round(self, number: int) -> None:
        """Let the round's outcome be asked for, and forget rounds long past."""
        self.archive.open_round(number)
        for old in [key for key in self._gates if 0 < key.round <= number - KEPT_ROUNDS]:
            del self._gates[old]

    def end_attempt(self, ctx: bytes) -> None:
        """Nothing more is taken for this attempt; whoever waits in it is sent to ask for news."""
        for key, gate in self._gates.items():
            if key.ctx == ctx:
                gate.answer({})

    def clear_attempt(self, ctx: bytes) -> None:
        """Its uploads are not needed any more, not even after a restart."""
        if spool := self.spools.pop(ctx, None):
            spool.clear()

    def lose(self, name: str, reason: str) -> None:
        """A participant is known to have left: no stage waits for it until it is back."""
        member = next(member for member in self._roster.participants if member.name == name)
        self.lost[member.identity] = reason
        self._drop(member.identity, reason)

    def ban(self, member: IdentityKey, reason: str) -> None:
        """A participant is out of the run for good."""
        if member not in self.banned:
            self._record("banned", participant=self._roster.by_identity(member).name, reason=reason)
            self._log(Banned(member, reason))
            self._apply_ban(member, reason)

    @property
    def gone(self) -> set[IdentityKey]:
        """Who is banned or lost."""
        return {*self.banned, *self.lost}

    def present(self, member: IdentityKey) -> bool:
        """Whether it has a call open, or was heard a short while ago; after a start everybody was."""
        since = asyncio.get_running_loop().time() - self._heard.setdefault(member, asyncio.get_running_loop().time())
        return member not in self.lost and (self._calls[member] > 0 or since < _PRESENT_SECONDS)

    def listening(self) -> set[IdentityKey]:
        """Who is there, and was not told yet that the run is over."""
        heard = self._heard.keys() | self._calls.keys()
        return set(filter(self.present, self.active & heard - self._dismissed - self.banned.keys()))

    async def decided(self, number: int, attempt: int) -> bool:
        """Wait until the journal has said who is in an attempt, or has nothing more to say; whether it has said."""
        self._undecided.add((number, attempt))
        while (number, attempt) not in self._attempts and not self.live.is_set():
            self._row_read.clear()
            await self._row_read.wait()
        self._undecided.clear()
        return (number, attempt) in self._attempts

    def decide(self, row: Attempt) -> tuple[IdentityKey, ...]:
        """The cohort of an attempt: as the journal has it, else as it is proposed here."""
        if (row.round, row.number) not in self._attempts:
            self._log(row)
            self._attempts[row.round, row.number] = row.cohort
        return self._attempts[row.round, row.number]

    def finish(self, row: Finished, state: State) -> None:
        """A round is over; asked about it from now on, the answer is `behind`, or the certificate."""
        self._journal.finish(row)
        self.archive.finished.append(row)
        self.archive.state = state

    async def replay(self, is_over: Callable[[], bool]) -> None:
        """Feed the journal's rows to the gates, in their order; from then on calls are taken.

        A row that does not fit was not written by this program about this run: the journal is damaged.
        """

        def is_idle() -> bool:  # nothing is computed: without a row, or a call, nothing more will happen
            stuck = any(gate.waited and not gate.closed for gate in self._gates.values())
            return is_over() or stuck or not self._undecided <= self._attempts.keys()

        try:
            for row in self._journal.rows():
                await self._replay(row, is_idle)
                self._row_read.set()
        except SecurityError as error:
            raise EnvironmentUnfitError("the run's journal does not fit together", hint=error.message) from error
        self.fed.set()
        while not is_idle():
            await asyncio.sleep(_TICK_SECONDS)
        self.live.set()
        self.look()
        self._row_read.set()

    async def _replay(self, row: Row, is_idle: Callable[[], bool]) -> None:
        match row:
            case Message(key, sender, body):
                (await self._gate(key, is_idle)).take(sender, body)
            case Closed(key, left, seconds):
                (await self._gate(key, is_idle)).close_as(left, seconds)
            case Banned(member, reason):
                self._apply_ban(member, reason)
            case Attempt(number, attempt, cohort):
                self._attempts[number, attempt] = cohort

    async def _gate(self, key: GateKey, is_idle: Callable[[], bool]) -> Gate:
        while key not in self._gates:
            if is_idle():
                raise SecurityError(f"{key.label} of round {key.round} comes before its stage")
            await asyncio.sleep(_TICK_SECONDS)
        return self._gates[key]

    def _log(self, row: Row) -> None:
        if not self.fed.is_set():
            return
        try:
            self._journal.add(row)
        except EnvironmentUnfitError as error:
            # What was accepted and is not in the journal must have no effect: from here on nothing may follow.
            self._failure = error
            for gate in self._gates.values():
                gate.fail(error)
            raise

    def _apply_ban(self, member: IdentityKey, reason: str) -> None:
        self.banned[member] = reason
        for key, gate in self._gates.items():
            # What came to a stage of an attempt has had its effect there, and stays in the sum.
            (gate.expel if key.label in _UNTIL_CLOSED else gate.drop)(member, reason)

    def _drop(self, member: IdentityKey, reason: str) -> None:
        for gate in self._gates.values():
            gate.drop(member, reason)

    def end(self, reason: str) -> None:
        """The run is over: whoever still waits, or comes later, is told so."""
        self._ended = reason
        self.live.set()
        for gate in self._gates.values():
            gate.answer({}, otherwise=self._abort)
        self.archive.end(self._abort)

    def sign(self, label: str, ctx: bytes, body: bytes) -> bytes:
        """A message of the coordinator."""
        return Signed.make(label, ctx, self._key, body).encode()

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        """One message of one participant: find its gate, wait there, sign the answer."""
        await self.live.wait()
        self.traffic.bytes_up[peer.name] += len(request)
        with self._call_of(peer):
            with Reader(request) as reader:
                label, ctx, message = reader.text(), reader.bytes(32), reader.bytes()
            answer = await self._answer(peer, label, ctx, message)
        reply = self._reply(peer, ctx, answer)
        self.traffic.bytes_down[peer.name] += len(reply)
        return reply

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        """Spool a masked input, then wait at the gate like with any message. One stream a member: the newest."""
        await self.live.wait()
        with self._call_of(peer):
            with Reader(await anext(pieces, b"")) as opening:
                ctx, size, first = opening.bytes(32), opening.integer(), opening.integer()
            return self._reply(peer, ctx, await self._receive(peer, ctx, size, first, pieces))

    async def _receive(self, peer: Member, ctx: bytes, size: int, first: int, pieces: AsyncIterator[bytes]) -> Answer:
        gate, spool = self._find("upload", ctx, None), self.spools.get(ctx)
        if gate is None or spool is None:
            return SKIP
        if not gate.expects(peer.identity) or peer.identity in gate.arrived:
            return await gate.wait(peer.identity)
        with self._newest_stream(peer):
            try:
                with self._refusing(peer):
                    async with gate.while_open():
                        upload = await spool.receive(peer.identity, pieces, size, first)
            except TimeoutError:
                return await gate.wait(peer.identity)
            if upload is None:
                return SKIP  # to nobody: the connection is gone
            self.traffic.bytes_up[peer.name] += upload.size
            with spool.holding(peer.identity, upload):
                signed = Signed.decode(upload.trailer)
                if first and signed.body != enc(upload.digest):
                    return AGAIN  # a power cut may have spoilt what lay here: nobody's fault, but it begins anew
                return await self._enter(gate, peer, "upload", ctx, enc(upload.trailer, upload.digest), signed)

    @contextlib.contextmanager
    def _call_of(self, peer: Member) -> Iterator[None]:
        """It is there while its call is; what is refused is told to the operator, some times."""
        member = peer.identity
        self.lost.pop(member, None)
        self._calls[member] += 1
        try:
            yield
        except SecurityError as error:
            self._notices.refused(peer.name, error.message)
            raise
        finally:
            self._calls[member] -= 1
            self._heard[member] = asyncio.get_running_loop().time()

    def turned_away(self, caller: str, reason: str) -> None:
        """See `transport.server.Handler`. Only members get through the handshake, so that addresses are few."""
        members = {str(member.name) for member in self._roster.members}
        self._notices.turned_away(caller, reason, caller if caller in members else None)

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
        """What became of a round, as soon as there is something; the state, for one who was away; or the log."""
        await self.live.wait()
        with self._call_of(peer):
            message = Signed.decode(request)
            label, ctx = message.label, message.ctx
            foreign = ctx != self.run_context
            self._check_sender(peer, message, label if foreign or label in {"behind", "log"} else "fetch", ctx)
            if foreign:
                pieces: Iterable[bytes] = [self._reply(peer, ctx, Answer("abort", b"another run is on"))]
            elif label == "behind":
                pieces = self.archive.state_after(ctx, Fetch.decode(message.body))
            elif label == "log":
                pieces = self.archive.log_of(ctx, LogRequest.decode(message.body))
            else:
                news = await self.archive.news_of(peer, ctx, Fetch.decode(message.body))
                pieces = [self._reply(peer, ctx, news)] if isinstance(news, Answer) else news
            for piece in pieces:
                self.traffic.bytes_down[peer.name] += len(piece)
                yield piece

    def _reply(self, peer: Member, ctx: bytes, answer: Answer) -> bytes:
        if self._ended is not None and answer == self._abort:
            self._dismissed.add(peer.identity)
        return self.sign(answer.label, ctx, answer.body)

    @property
    def _abort(self) -> Answer:
        return Answer("abort", (self._ended or "").encode())

    async def _answer(self, peer: Member, label: str, ctx: bytes, message: bytes) -> Answer:
        # The signed part of `shares` is inside, with the boxes behind it.
        signed = Signed.decode(Reader(message).bytes() if label == "shares" else message)
        if answer := self._answer_at_once(peer, label, ctx, signed):
            return answer
        number = round_of(label, signed.body)
        gate = self._find(label, ctx, number)
        if gate:
            return await self._enter(gate, peer, label, ctx, message, signed)
        self._check_sender(peer, signed, label, signed.ctx)
        return self._answer_late(peer, label, number)

    def _answer_late(self, peer: Member, label: str, number: int | None) -> Answer:
        """To a message whose gate is forgotten, or was never open."""
        certificate = self.archive.certificate(number)
        if certificate and label == "transition":
            return Answer("next", certificate)
        if certificate or label in _OF_AN_ATTEMPT:
            return SKIP
        raise SecurityError(f"a {label} message is not due", culprits=[peer.name])

    def _answer_at_once(self, peer: Member, label: str, ctx: bytes, signed: Signed) -> Answer | None:
        """What belongs to no gate; and everything, once the run is over."""
        match label:
            case "hello":
                # Who has accepted the contract goes on under the run's roster, which it has too.
                if ctx != self._roster.hash and self.run_context is None:
                    raise SecurityError(
                        f"{peer.name} has another roster than version {self._roster.version} of this run",
                        hint="mpctf-secure enroll show at both ends; install the newest one",
                        culprits=[peer.name],
                    )
                self._check_sender(peer, signed, label, ctx)
                return Answer("proposal", self._proposal.encode())
            case "veto":
                self._check_sender(peer, signed, label, ctx)
                self._note_veto(peer, ctx, signed.body)
                if ctx == self._roster.hash:
                    self._dismissed.add(peer.identity)  # from the whole run, by itself
            case "offset":
                self._check_sender(peer, signed, label, ctx)
                spool = self.spools.get(ctx)
                return Answer("held", enc(spool.held(peer.identity) if spool else 0))
            case _ if label in _OF_THE_RUN and ctx != self.run_context:
                self._check_sender(peer, signed, label, ctx)
                return Answer("abort", b"another run is on")
            case "alive" | "progress" | "resources" | "fault" | "done" if self._ended is None:
                self._check_sender(peer, signed, label, ctx)
                if label == "progress":
                    self._notices.progress(peer.name, Progress.decode(signed.body))
                elif label == "resources":
                    self._notices.resources(peer.name, Usage.decode(signed.body))
                elif label == "fault":
                    self._note_fault(peer, TrainingFault.decode(signed.body))
                elif label == "done":
                    self.told.add(peer.identity)
            case _:
                return None if self._ended is None else self._abort
        return NOTED

    def _note_fault(self, peer: Member, fault: TrainingFault) -> None:
        """A site whose job fails for good is not waited for, until it is back."""
        self._notices.fault(peer.name, fault)
        if not fault.again:
            self.lose(peer.name, f"its training failed: {fault.code}, node {fault.node}, rank {fault.rank}")

    def _note_veto(self, peer: Member, ctx: bytes, reason: bytes) -> None:
        """Who wants no part in the run, or in an attempt, is not waited for; its operator's reason reaches ours."""
        gates = [gate for key, gate in self._gates.items() if ctx in {self._roster.hash, key.ctx}]
        if not gates:
            return
        text = reason[:_MOST_REASON].decode(errors="replace")
        self._notices.veto(peer.name, text)
        for gate in gates:
            gate.drop(peer.identity, f"{VETO}{text}")

    def _find(self, label: str, ctx: bytes, number: int | None) -> Gate | None:
        matches = (gate for key, gate in self._gates.items() if key[:2] == (label, ctx) and number in {None, key.round})
        return next(matches, None)

    async def _enter(self, gate: Gate, peer: Member, label: str, ctx: bytes, message: bytes, signed: Signed) -> Answer:
        self._check_sender(peer, signed, label, ctx)
        with self._refusing(peer):
            return await gate.enter(peer.identity, message)

    @contextlib.contextmanager
    def _refusing(self, peer: Member) -> Iterator[None]:
        """Who breaks the protocol is out of the run."""
        try:
            yield
        except SecurityError as error:
            self.ban(peer.identity, f"refused: {error.message}")
            raise

    def _check_sender(self, peer: Member, message: Signed, label: str, ctx: bytes) -> None:
        """The signer is the TLS peer and in the run: nobody passes on another's message."""
        if message.sender != peer.identity:
            raise SecurityError("message is not signed by who sent it", culprits=[peer.name])
        if peer.identity not in self.active:
            raise SecurityError(f"{peer.name} is not in this run", culprits=[peer.name])
        if peer.identity in self.banned:
            raise SecurityError(f"{peer.name} is out of this run: {self.banned[peer.identity]}", culprits=[peer.name])
        message.verify(label, ctx)
