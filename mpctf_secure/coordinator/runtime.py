"""The coordinator: opens gates, closes them on time, and lets the state machine of secure aggregation do the rest.

One event loop, no locks: between answering one gate and opening the next nothing is awaited, so whoever passes a gate
finds the next one open. What is published is on disk before anybody gets it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpctf_secure.config.run import Timeouts
from mpctf_secure.coordinator.gate import SKIP, Answer, Gate
from mpctf_secure.coordinator.ledger import RoundRecord
from mpctf_secure.coordinator.spool import Spool, Upload
from mpctf_secure.errors import MpctfError, ParticipationError, SecurityError, UsageError
from mpctf_secure.hazmat.encoding import Reader
from mpctf_secure.identity.keystore import Keys
from mpctf_secure.identity.roster import Member, Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.monitoring.events import Record
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Announce, Facts, Position, Progress, Publication
from mpctf_secure.rounds.state import State, Sum, initial_state, next_state, round_context, summarise
from mpctf_secure.secagg import masks
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.secagg.parameters import Context, check_cohort_size
from mpctf_secure.secagg.server import Server

NEXT, GO, ACK, NOTED = (Answer(label, b"") for label in ("next", "go", "ack", "noted"))
_KEPT_ROUNDS = 2


@dataclass(frozen=True)
class Published:
    """A sum on disk and its signed header."""

    header: bytes
    path: Path
    spool: Spool


class Coordinator:
    """One run. It is the handler behind `transport.server`; `run` is what decides."""

    def __init__(
        self, proposal: Proposal, timeouts: Timeouts, roster: Roster, keys: Keys, folder: Path, record: Record
    ) -> None:
        self._proposal = proposal
        self._timeouts = timeouts
        self._roster = roster
        self._keys = keys
        self._folder = folder
        self._record = record
        self._active = {m.identity for m in roster.participants if m.name in proposal.participants}
        self._gone: dict[IdentityKey, str] = {}
        self._gates: dict[tuple[str, bytes, int], Gate[Any]] = {}
        self._published: dict[int, asyncio.Future[Published]] = {}
        self._spools: dict[bytes, Spool] = {}
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._facts: dict[IdentityKey, Facts] = {}
        self._round = RoundRecord(0)
        self.rounds: list[RoundRecord] = []
        self.contract: Contract | None = None

    # What decides

    async def run(self) -> tuple[Contract, State]:
        """The whole run: what was agreed and the final state. MpctfError says why there is none."""
        reason = "the run is over"
        try:
            contract = await self._agree()
            state = initial_state(contract)
            for _ in range(contract.rounds):
                state = await self._run_round(contract, state)
            return contract, state
        except BaseException as error:
            reason = error.message if isinstance(error, MpctfError) else "the coordinator stopped"
            raise
        finally:
            self._ended.set_result(reason)

    def gone(self, name: str, reason: str) -> None:
        """A participant's process is known to have ended: no stage waits for it any more."""
        member = next(member for member in self._roster.participants if member.name == name)
        self._gone.setdefault(member.identity, reason)
        for gate in self._gates.values():
            gate.drop(member.identity)

    async def _agree(self) -> Contract:
        facts = self._open("facts", self._roster.hash, 0, self._active, self._accept_facts)
        await self._collect_everyone(facts, "joined", self._timeouts.join)
        contract = self._close_contract()
        accept = self._open("accept", contract.run_context, 0, self._active, lambda *_: None)
        facts.answer({}, otherwise=Answer("contract", contract.encode()))
        await self._collect_everyone(accept, "accepted the contract", self._timeouts.stage)
        self._record("contract_closed", contract_hash=contract.hash.hex(), base_model_hash=contract.base_model_hash)
        self._open_round(contract, initial_state(contract))
        accept.answer({}, otherwise=GO)
        return contract

    def _close_contract(self) -> Contract:
        """The proposal and the facts that all sites agree on."""
        members, facts = list(self._facts), list(self._facts.values())
        for member, found in zip(members[1:], facts[1:], strict=True):
            for component in ("base_model_hash", "tensors"):
                if getattr(found, component) != getattr(facts[0], component):
                    pair = [self._name(members[0]), self._name(member)]
                    raise UsageError(
                        f"{pair[0]} and {pair[1]} differ in {component}", hint="every site needs the same base model"
                    )
        base, tensors = facts[0].base_model_hash.hex(), facts[0].tensors
        self.contract = Contract(**self._proposal.model_dump(), base_model_hash=base, tensors=tensors)
        return self.contract

    def _open_round(self, contract: Contract, state: State) -> None:
        number, ctx = state.round + 1, contract.run_context
        self._published[number] = asyncio.get_running_loop().create_future()
        expected = Position(number, state.hash(contract))
        self._open("ready", ctx, number, self._active, _same_position(expected))
        for old in [key for key in self._gates if 0 < key[2] <= number - _KEPT_ROUNDS]:
            del self._gates[old]

    async def _run_round(self, contract: Contract, state: State) -> State:
        number = state.round + 1
        self._round = RoundRecord(number)
        self.rounds.append(self._round)
        self._record("round_started", round=number)
        ready = self._gates["ready", contract.run_context, number]
        await self._collect(ready, "training", self._timeouts.training, self._proposal.quorum)
        cohort = tuple(sorted(ready.arrived))
        self._check_cohort(cohort)
        self._round.cohort = self._names(cohort)
        context = round_context(contract, state, cohort)
        self._round.ring_bits = context.ring_bits
        release, server, spool, left = await self._aggregate(context, ready)
        total, header = await self._open_sum(contract, context, server.survivors, spool, left)
        following = await asyncio.to_thread(next_state, contract, state, total)
        return await self._close_round(contract, following, release, header)

    async def _aggregate(
        self, context: Context, ready: Gate[bytes]
    ) -> tuple[Gate[bytes], Server, Spool, tuple[masks.Mask, ...]]:
        """The stages of the round's attempt, up to the masks that are left on the sum; the last gate stays shut."""
        server, ctx, number = Server(context), context.digest(), context.round
        spool = self._spools[ctx] = Spool(self._folder / f"round-{number}", context)
        digests: dict[IdentityKey, bytes] = {}

        def keep(sender: IdentityKey, upload: Upload) -> None:
            server.accept_upload(upload.trailer, upload.digest)
            spool.keep(sender, upload)
            digests[sender] = upload.digest

        def stage(label: str, accept: Callable[[IdentityKey, Any], None]) -> Gate[Any]:
            return self._open(label, ctx, number, server.expected, accept)

        advert = stage("advert", lambda _, message: server.accept_advert(message))
        announce = Answer("announce", Announce(number, context.cohort).encode())
        ready.answer(dict.fromkeys(context.cohort, announce))
        await self._collect(advert, "advertise keys", self._timeouts.stage, context.floor)
        adverts = Answer("adverts", server.close_adverts())

        shares = stage("shares", lambda _, message: server.accept_shares(message))
        advert.answer(dict.fromkeys(server.expected, adverts))
        await self._collect(shares, "share keys", self._timeouts.stage, context.floor)
        deliveries = {member: Answer("delivery", body) for member, body in server.close_shares().items()}

        uploads = stage("upload", keep)
        shares.answer(deliveries)
        await self._collect(uploads, "masked input", self._timeouts.stage, context.floor)
        survivors = Answer("survivors", server.close_uploads())

        consistency = stage("consistency", lambda _, message: server.accept_consistency(message))
        uploads.answer(dict.fromkeys(server.survivors, survivors))
        await self._collect(consistency, "consistency check", self._timeouts.stage, context.threshold)
        signatures = Answer("signatures", server.close_consistency())

        release = stage("release", lambda _, message: server.accept_release(message))
        consistency.answer(dict.fromkeys(server.survivors, signatures))
        await self._collect(release, "unmask", self._timeouts.stage, context.threshold)
        return release, server, spool, server.close_releases()

    async def _open_sum(
        self,
        contract: Contract,
        context: Context,
        survivors: tuple[IdentityKey, ...],
        spool: Spool,
        left: tuple[masks.Mask, ...],
    ) -> tuple[Sum, Published]:
        """The sum, on disk before anybody gets it, and its signed header."""
        path = self._folder / f"round-{context.round}.sum"
        digest = await asyncio.to_thread(spool.open_sum, survivors, left, path)
        *lanes, scalars = spool.read_sum(path)
        vector = np.frombuffer(b"".join(lanes), masks.LANE_TYPES[context.ring_bits])
        total = Sum(vector, np.frombuffer(scalars, "<u8"), context.cohort, survivors)
        publication = Publication(context.round, context.cohort, survivors, digest)
        header = self._signed("publication", contract.run_context, publication.encode())
        record, summary = self._round, summarise(total)
        record.survivors, record.summary = self._names(survivors), summary
        record.stage_done("open the sum")
        figures = {"rows": summary.rows, "mean_loss": summary.mean_loss, "digest": digest.hex()}
        self._record("sum_opened", round=context.round, survivors=record.survivors, **figures)
        return total, Published(header, path, spool)

    async def _close_round(self, contract: Contract, state: State, release: Gate[bytes], published: Published) -> State:
        """Publish, wait until the participants hold the same state, and open the next round."""
        position = Position(state.round, state.hash(contract))
        transition = self._open("transition", contract.run_context, state.round, self._active, _same_position(position))
        self._published[state.round].set_result(published)
        release.answer({}, otherwise=ACK)
        await self._collect(transition, "transition", self._timeouts.stage, 1)
        self._record("round_finished", round=state.round, state_hash=position.state_hash.hex())
        published.spool.clear()
        self._spools.clear()
        if state.round < contract.rounds:
            self._open_round(contract, state)
        transition.answer({}, otherwise=NEXT)
        return state

    def _check_cohort(self, cohort: tuple[IdentityKey, ...]) -> None:
        proposal = self._proposal
        try:
            check_cohort_size(
                len(cohort),
                len(proposal.participants),
                proposal.colluders,
                quorum=proposal.quorum,
                allow_pair=proposal.allow_pair,
            )
        except UsageError as error:
            lost = sorted({*self._names(self._gone), *(entry["participant"] for entry in self._round.dropouts)})
            raise ParticipationError(
                f"round {self._round.round}: {len(proposal.participants) - len(lost)} of {len(proposal.participants)} "
                f"participants are left, the contract asks for {proposal.quorum}; lost: {', '.join(lost)}",
                hint="report.json says at which stage and why",
                culprits=lost,
            ) from error

    # Gates

    def _open(
        self,
        label: str,
        ctx: bytes,
        number: int,
        awaited: Iterable[IdentityKey],
        accept: Callable[[IdentityKey, Any], None],
    ) -> Gate[Any]:
        gate: Gate[Any] = Gate(set(awaited) - set(self._gone), accept)
        self._gates[label, ctx, number] = gate
        return gate

    async def _collect(self, gate: Gate[Any], stage: str, seconds: float, least: int) -> None:
        """Wait at a gate; whoever is missing afterwards is a dropout of this stage."""
        awaited = {*gate.awaited, *gate.arrived}
        await gate.collect(seconds, least)
        took = self._round.stage_done(stage)
        for member in sorted(awaited - set(gate.arrived)):
            if member in self._gone or took >= seconds:  # else the stage ended early, for want of others
                self._drop(member, stage, self._gone.get(member, f"no answer in {seconds:g} s"))
        self._record("stage_closed", round=self._round.round, stage=stage, arrived=len(gate.arrived), seconds=took)

    async def _collect_everyone(self, gate: Gate[Any], deed: str, seconds: float) -> None:
        await gate.collect(seconds, len(self._active))
        missing = sorted(self._active - set(gate.arrived))
        if missing:
            reasons = [f"{self._name(m)} ({self._gone.get(m, f'no answer in {seconds:g} s')})" for m in missing]
            raise ParticipationError(
                f"not everyone {deed}: {', '.join(reasons)}",
                hint="see the participants' logs in the run folder",
                culprits=self._names(missing),
            )

    def _drop(self, member: IdentityKey, stage: str, reason: str) -> None:
        entry = {"participant": self._name(member), "stage": stage, "reason": reason}
        self._round.dropouts.append(entry)
        self._record("dropout", round=self._round.round, **entry)

    def _accept_facts(self, sender: IdentityKey, message: bytes) -> None:
        self._facts[sender] = Facts.decode(Signed.decode(message).body)
        self._record("participant_joined", participant=self._name(sender))

    # What answers

    async def exchange(self, peer: Member, request: bytes) -> bytes:
        """One message of one participant: find its gate, wait there, sign the answer."""
        reader = Reader(request)
        label, ctx, message = reader.text(), reader.bytes(32), reader.bytes()
        reader.end()
        self._round.bytes_up[peer.name] += len(request)
        answer = await self._answer(peer, label, ctx, message)
        reply = self._signed(answer.label, ctx, answer.body)
        self._round.bytes_down[peer.name] += len(reply)
        return reply

    async def upload(self, peer: Member, pieces: AsyncIterator[bytes]) -> bytes:
        """Spool a masked input, then wait at the gate like with any message."""
        ctx = await anext(pieces, b"")
        if ctx not in self._spools:
            return self._signed(SKIP.label, ctx, SKIP.body)
        upload = await self._spools[ctx].receive(pieces)
        self._round.bytes_up[peer.name] += upload.size
        answer = await self._pass(peer, ("upload", ctx), upload, Signed.decode(upload.trailer))
        return self._signed(answer.label, ctx, answer.body)

    async def download(self, peer: Member, request: bytes) -> AsyncIterator[bytes]:
        """The published sum of a round, once there is one."""
        message = Signed.decode(request)
        self._check_sender(peer, message, "fetch")
        position = Position.decode(message.body)
        if position.round not in self._published:
            raise SecurityError(f"there is no round {position.round}", culprits=[peer.name])
        await self._first(self._published[position.round])
        if not self._published[position.round].done():
            yield self._signed("abort", message.ctx, self._ended.result().encode())
            return
        published = self._published[position.round].result()
        yield published.header
        for chunk in published.spool.read_sum(published.path):
            self._round.bytes_down[peer.name] += len(chunk)
            yield chunk

    async def _answer(self, peer: Member, label: str, ctx: bytes, message: bytes) -> Answer:
        if label == "shares":  # the signed part is inside, with the boxes behind it
            return await self._pass(peer, (label, ctx), message, Signed.decode(Reader(message).bytes()))
        signed = Signed.decode(message)
        if label == "hello":
            self._check_sender(peer, signed, "hello", self._roster.hash)
            return Answer("proposal", self._proposal.encode())
        if label == "progress":
            self._check_sender(peer, signed, "progress")
            progress = Progress.decode(signed.body)
            self._record("progress", participant=peer.name, **vars(progress))
            return NOTED
        return await self._pass(peer, (label, ctx), message, signed)

    async def _pass(self, peer: Member, stage: tuple[str, bytes], message: Any, signed: Signed) -> Answer:
        label, ctx = stage
        self._check_sender(peer, signed, label, ctx)
        positioned = label in {"ready", "transition"}
        number = Position.decode(signed.body).round if positioned else None
        gate = next((g for (a, b, r), g in self._gates.items() if (a, b) == stage and number in {None, r}), None)
        if gate is None:
            if self._ended.done():
                return Answer("abort", self._ended.result().encode())
            if number is not None and number <= self._round.round:  # so late that its gate is forgotten
                return SKIP if label == "ready" else NEXT
            raise SecurityError(f"a {label} message is not due", culprits=[peer.name])
        passing = asyncio.ensure_future(gate.enter(peer.identity, message))
        await self._first(passing)
        if passing.done():
            return self._refusing(peer, passing)
        passing.cancel()
        return Answer("abort", self._ended.result().encode())

    async def _first(self, awaited: "asyncio.Future[Any]") -> None:
        """Until it is done, or the run has ended."""
        either: set[asyncio.Future[Any]] = {awaited, self._ended}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    def _refusing(self, peer: Member, passing: "asyncio.Future[Answer]") -> Answer:
        try:
            return passing.result()
        except MpctfError as error:
            self._record("refused", participant=peer.name, reason=error.message)
            self.gone(peer.name, f"refused: {error.message}")
            raise

    def _check_sender(self, peer: Member, message: Signed, label: str, ctx: bytes | None = None) -> None:
        """The signer is the TLS peer and in the run: nobody passes on another's message."""
        if message.sender != peer.identity or peer.identity not in self._active:
            raise SecurityError("message is not signed by who sent it", culprits=[peer.name])
        message.verify(label, message.ctx if ctx is None else ctx)

    def _signed(self, label: str, ctx: bytes, body: bytes) -> bytes:
        return Signed.make(label, ctx, self._keys.identity, body).encode()

    @property
    def _agreed(self) -> Contract:
        if self.contract is None:
            raise SecurityError("there is no contract yet")
        return self.contract

    def _name(self, member: IdentityKey) -> str:
        return str(self._roster.by_identity(member).name)

    def _names(self, members: Iterable[IdentityKey]) -> list[str]:
        return sorted(map(self._name, members))


def _same_position(expected: Position) -> Callable[[IdentityKey, bytes], None]:
    """Accepts a participant that holds the coordinator's state; another state convicts one of the two."""

    def accept(sender: IdentityKey, message: bytes) -> None:
        if Position.decode(Signed.decode(message).body) != expected:
            raise SecurityError(f"participant holds another state in round {expected.round}", culprits=[sender.hex()])

    return accept
