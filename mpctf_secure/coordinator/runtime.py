"""The coordinator: opens gates, closes them on time, and lets the state machine of secure aggregation do the rest.

One event loop, no locks: between answering one gate and opening the next nothing is awaited, so whoever passes a gate
finds the next one open. What is published is on disk before anybody gets it. After a restart the same code goes on from
the last finished round, its gates fed from the journal (RECOVERY.md section 1).
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mpctf_secure.config.run import Timeouts
from mpctf_secure.config.training import Choice
from mpctf_secure.coordinator.agreement import close_contract
from mpctf_secure.coordinator.attempt import Stages, announcement
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.gate import Answer, Gate
from mpctf_secure.coordinator.journal import Attempt, Ended, Finished, Journal
from mpctf_secure.coordinator.ledger import VETO, Ledger, end_run
from mpctf_secure.coordinator.news import Outcome
from mpctf_secure.coordinator.opening import open_sum
from mpctf_secure.coordinator.patience import ForQuorum
from mpctf_secure.coordinator.reception import Reception
from mpctf_secure.coordinator.results import Results
from mpctf_secure.coordinator.spool import Spool
from mpctf_secure.errors import (
    EnvironmentUnfitError,
    InterruptedRunError,
    MpctfError,
    ParticipationError,
    SecurityError,
    UsageError,
)
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.monitoring.events import Record
from mpctf_secure.parallel import ordered_map
from mpctf_secure.privacy.integers import Scheme
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Facts, Position, Publication, Void, Witnessed
from mpctf_secure.rounds.outcome import Aggregate, Sum, bias_of_means, next_state, read_sum, void_state
from mpctf_secure.rounds.state import State, Survey, initial_state
from mpctf_secure.rounds.terms import noise_scheme, round_context
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.secagg.parameters import MAX_ATTEMPTS, Context, check_cohort
from mpctf_secure.secagg.proof import BadDealerError
from mpctf_secure.secagg.server import Server
from mpctf_secure.secagg.transitions import ServerState

ACK = Answer("ack", b"")
_MOST_REASON = 250  # characters, at most four bytes each
T = TypeVar("T")
_LOOK_SECONDS = 0.2
_DISMISSING_SECONDS = 20.0  # a site that trains says every 15 that it is there


class AbsentError(ParticipationError):
    """Too few are there at the moment: the run has not ended, and can be gone on with."""


class Ending(NamedTuple):
    """A round's end: the state it leads to, what is published and how, and the gate where the releasers wait."""

    state: State
    body: bytes
    outcome: Outcome
    release: Gate | None = None


class Coordinator:
    """One run; `reception` is what listens for it."""

    def __init__(
        self,
        proposal: Proposal,
        timeouts: Timeouts,
        roster: Roster,
        keys: Keys,
        folder: Path,
        record: Record,
        journal: Journal,
        log: RunLog,
        secret: bytes,
    ) -> None:
        """`record` gets all that is told, and puts into `log` what belongs there.

        `secret` is that of the run: the coordinator's noise, where it adds any, follows from it.
        """
        self.reception = Reception(proposal, roster, keys.identity, self._tell, journal, log.pieces)
        self.ledger = Ledger(roster, self._tell)
        self.contract: Contract | None = None
        self.choices: dict[str, dict[str, float]] = {}
        """By name: what sites train with instead of the defaults."""
        self._proposal = proposal
        self._timeouts = timeouts
        self._roster = roster
        self._results = Results(folder)
        self._listener = record
        self._journal = journal
        self._log, self._log_key = log, keys.log
        self._secret = secret
        self._facts: dict[IdentityKey, Facts] = {}

    async def run(self) -> tuple[Contract, State]:
        """The whole run, or what is left of it: what was agreed and the final state. MpctfError says why there is none.

        What another start may mend, and an interruption, do not end the run; nobody is told.
        """
        if self._journal.ended is None:
            self._log.begin(self._listener, self._proposal)
        try:
            return await self._replayed(self._run())
        except (AbsentError, EnvironmentUnfitError):
            raise
        except MpctfError as error:
            self._end(error.exit_code, error.message)
            raise

    def stop(self, reason: str) -> None:
        """End the run before its time, for good."""
        self._end(InterruptedRunError.exit_code, reason)

    @property
    def is_done(self) -> bool:
        """Whether all rounds are."""
        return len(self.reception.archive.finished) == self._proposal.rounds

    @property
    def reports(self) -> list[dict[str, Any]]:
        """Every round as report.json has it, also those of earlier processes."""
        done = [row.record for row in self.reception.archive.finished]
        return done + [record.to_dict() for record in self.ledger.rounds if record.round > len(done)]

    async def _replayed(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which the journal is fed to."""
        running = asyncio.create_task(work)
        replay = asyncio.create_task(self.reception.replay(running.done))
        replay.add_done_callback(lambda task: running.cancel() if task.cancelled() or task.exception() else None)
        try:
            result = await running
            await replay
            return result
        except asyncio.CancelledError:
            if replay.done() and not replay.cancelled() and (error := replay.exception()):
                raise error from None
            raise
        finally:
            running.cancel()
            replay.cancel()

    def _end(self, code: int, reason: str) -> None:
        end_run(self._journal, self._listener, Ended(code, reason))
        self.reception.end(reason)

    async def dismiss(self) -> None:
        """The run has ended before its time: wait until those who are there know, for a heartbeat at the most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISMISSING_SECONDS):
                while self.reception.listening():
                    await asyncio.sleep(_LOOK_SECONDS)

    async def farewell(self, stopped: Callable[[], bool]) -> None:
        """All rounds are done: wait until those who are there know the end, a stage's time at the most.

        Where that was so before this start: until everybody knows, however long it takes. Unless the operator stops it.
        """
        reception, again = self.reception, self._journal.ended is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if again else self._timeouts.stage):
                while left := reception.active - reception.told - reception.banned.keys():
                    if stopped() or (not again and not any(map(reception.present, left))):
                        return
                    await asyncio.sleep(_LOOK_SECONDS)

    async def _run(self) -> tuple[Contract, State]:
        contract, state = await self._agree()
        self._results.tidy(state.round)
        while state.round < contract.rounds:
            state = await self._run_round(contract, state)
        return contract, state

    def _tell(self, kind: str, **fields: Any) -> None:
        """Events that are replayed were told before, but for those behind the last row, which maybe were not."""
        if self.reception.fed.is_set():
            self._listener(kind, **fields)

    async def _agree(self) -> tuple[Contract, State]:
        everyone = self.reception.active
        facts = self.reception.open("facts", self._roster.hash, 0, everyone, self._accept_facts)
        await self._collect_everyone(facts, "joined", self._timeouts.join)
        facts_by_name = {self.ledger.name(member): found for member, found in self._facts.items()}
        contract = self.contract = close_contract(self._proposal, facts_by_name)
        self.reception.run_context = contract.run_context
        hashes = {"contract_hash": contract.hash.hex(), "base_model_hash": contract.base_model_hash}
        self._tell("contract_closed", **hashes)
        self._log.keep(contract.encode(), {})
        self._log.checkpoint(0, self._log_key)
        accept = self.reception.open("accept", contract.run_context, 0, everyone, self._accept_choice)
        facts.answer({}, otherwise=Answer("contract", contract.encode()))
        await self._collect_everyone(accept, "accepted the contract", self._timeouts.stage)
        certificate = self._certify(0, accept)
        self._tell("contract_accepted", **hashes, choices=self.choices)
        done = len(self.reception.archive.finished)
        state = self._results.load(done) if done else initial_state(contract)
        self.reception.archive.state = state if done else None
        if state.round < contract.rounds:
            self._ready = self._open_round(contract, state)
        accept.answer({}, otherwise=Answer("go", certificate))
        return contract, state

    def _certify(self, step: int, gate: Gate) -> bytes:
        """The certificate of a step, from the messages in a gate that is closed; the next step's log has its hash."""
        certificate, witnesses = self._log.certify(step, gate.messages)
        self._tell("step_witnessed", round=step, certificate=sha256(certificate).hex(), witnesses=witnesses)
        return certificate

    def _open_round(self, contract: Contract, state: State) -> Gate:
        number = state.round + 1
        self.reception.open_round(number)
        return self._open_positioned("ready", contract, number, state)

    def _open_positioned(self, label: str, contract: Contract, number: int, state: State) -> Gate:
        """A gate for those who hold this very state; another state convicts one of the two ends."""
        expected = Position(number, state.hash(contract))

        def accept(sender: IdentityKey, message: bytes) -> None:
            """Of a transition also that its sender has seen the log."""
            body = Signed.decode(message).body
            if label == "transition":
                witnessed = Witnessed.decode(body)
                self._log.check(number, sender, witnessed)
                body = witnessed.said
            if Position.decode(body) != expected:
                raise SecurityError(f"another state than the coordinator's in round {number}", culprits=[sender.hex()])

        return self.reception.open(label, contract.run_context, number, self.reception.active, accept)

    async def _run_round(self, contract: Contract, state: State) -> State:
        """One round: attempts until a sum is opened or none can be; either way all agree on the next state."""
        number, ready = state.round + 1, self._ready
        self.reception.traffic = self.ledger.begin_round(number, self.reception.banned)
        await self._gather(ready, "training", self._proposal.quorum)
        cohort = tuple(sorted(ready.arrived))
        self._check_cohort(cohort)
        context = round_context(contract, state, cohort)
        while True:
            self.ledger.begin_attempt(context)
            server = Server(context)
            try:
                finished = await self._attempt(contract, state, server, ready)
            except (ParticipationError, SecurityError) as error:
                if not await self.reception.decided(number, context.attempt + 1):
                    self.reception.look()
                    self._check_not_refused(context)
                following = self._next_context(server)
                claimed = server.claim and server.claim.hash.hex()
                failed = {"round": number, "attempt": context.attempt, "tuple": claimed}
                self._tell("attempt_failed", **failed, reason=error.message)
                self.reception.end_attempt(context.digest())
                if following is None:
                    finished = self._void(contract, state, context, error)
                    break
                self.reception.clear_attempt(context.digest())
                context = following
            else:
                break
        return await self._close_round(contract, context, finished)

    def _check_not_refused(self, context: Context) -> None:
        """Too many do not take part in such an attempt, and the next would be no other: it is for people to mend."""
        refusing = self.ledger.refusing
        willing = set(context.cohort) - refusing.keys()
        if refusing and self.reception.gone.isdisjoint(context.cohort) and len(willing) < context.floor:
            reasons = [f"{self.ledger.name(member)} {reason}" for member, reason in sorted(refusing.items())]
            raise AbsentError(
                f"round {context.round}: {'; '.join(reasons)}",
                hint="install what they have (enroll verify), then mpctf-secure runs resume",
                culprits=self.ledger.names(refusing),
            )

    def _next_context(self, server: Server) -> Context | None:
        """The next attempt's context; None where there may be none: shares were asked for, or too few are left."""
        context, gone = server.context, self.reception.gone
        left = tuple(member for member in context.cohort if member not in gone)
        opened = server.state in {ServerState.RELEASES, ServerState.OPENED}
        if opened or len(left) < context.floor or context.attempt == MAX_ATTEMPTS:
            left = ()
        cohort = self.reception.decide(Attempt(context.round, context.attempt + 1, left))
        return context.retry(context.attempt + 1, cohort) if cohort else None

    def _void(self, contract: Contract, state: State, context: Context, error: MpctfError) -> Ending:
        """The round has no sum: the model stays, and a dealer who is proved to have spoilt it is out."""
        proof, convicted = b"", None
        if isinstance(error, BadDealerError):
            proof, convicted = error.proof.encode(), error.dealer
            self.reception.ban(convicted, f"convicted: {error.message}")
        try:
            following = void_state(contract, state, convicted)
        except ParticipationError as last:
            raise ParticipationError(f"{last.message}: {error.message}", culprits=error.culprits) from error
        self.ledger.round.void = error.message
        void = Void(announcement(context), error.message[:_MOST_REASON], proof).encode()
        out = self.ledger.name(convicted) if convicted else None
        self._tell("round_void", round=following.round, attempt=context.attempt, reason=error.message, convicted=out)
        header = self.reception.sign("void", contract.run_context, void)
        return Ending(following.after(void), void, Outcome(header))

    async def _attempt(self, contract: Contract, state: State, server: Server, ready: Gate) -> Ending:
        """One attempt and its sum, which is on disk before anybody gets it."""
        context = server.context
        spool = Spool(self._results.uploads(context.round, context.attempt), context)
        self.reception.spools[context.digest()] = spool
        stages = Stages(server, spool, self.reception, self.ledger, self._timeouts)
        release, left = await stages.aggregate(ready)
        path = self._results.sum(context.round)
        began = asyncio.get_running_loop().time()
        scheme = self._own_noise(contract, state, len(context.first_cohort))
        digest = await asyncio.to_thread(open_sum, spool, context, server.survivors, left, path, scheme, self._secret)
        total = Sum(*await asyncio.to_thread(spool.load_sum, path), context.first_cohort, server.survivors)
        said = await asyncio.to_thread(self._read, contract, state, total)
        following = await asyncio.to_thread(next_state, contract, state, said)
        self.ledger.round.add_seconds("open the sum", asyncio.get_running_loop().time() - began)
        if isinstance(said, Aggregate):
            self.ledger.round.bias = await asyncio.to_thread(bias_of_means, contract, state, said)
        self.ledger.note_sum(server.survivors, said, digest)
        if server.claim:
            self.ledger.note_published(context, server.claim, digest)
        publication = Publication(announcement(context), server.survivors, digest).encode()
        header = self.reception.sign("publication", contract.run_context, publication)
        return Ending(
            following.after(publication), publication, Outcome(header, partial(spool.read_sum, path)), release
        )

    @staticmethod
    def _own_noise(contract: Contract, state: State, cohort_size: int) -> Scheme | None:
        """What the coordinator adds to a sum, where it is not the participants who do."""
        central = contract.privacy.against == "participants"
        return noise_scheme(contract, state.clip_norm, cohort_size) if central else None

    def _read(self, contract: Contract, state: State, total: Sum) -> Aggregate | Survey:
        try:
            return read_sum(contract, state, total, ordered_map)
        except SecurityError as error:
            # Not the coordinator's fault, whatever a participant would say of the same sum.
            raise ParticipationError(
                f"{error.message}; a participant put in what none may, and masks hide which"
            ) from error

    async def _close_round(self, contract: Contract, context: Context, finished: Ending) -> State:
        """Tell the outcome, wait until the participants hold the same state, and open the next round."""
        state = finished.state
        # Of gigabytes once, and not while everybody waits for an answer.
        state_hash = await asyncio.to_thread(state.hash, contract)
        self._tell("round_closed", round=state.round, state_hash=state_hash.hex())
        self._log.checkpoint(state.round, self._log_key)
        transition = self._open_positioned("transition", contract, state.round, state)
        self.reception.archive.tell(state.round, finished.outcome)
        if finished.release:
            finished.release.answer({}, otherwise=ACK)
        await self._gather(transition, "transition", contract.agreement)
        if len(transition.arrived) < contract.agreement:
            reason = self.ledger.round.void
            void = f"; it is void: {reason}" if reason else ""
            raise AbsentError(f"round {state.round}: too few participants hold the next state{void}", hint=self._resume)
        await asyncio.to_thread(self._results.save, state)
        certificate = self._certify(state.round, transition)
        self._tell("round_finished", round=state.round, state_hash=state_hash.hex())
        self.reception.finish(Finished(state.round, finished.body, certificate, self.ledger.round.to_dict()), state)
        self.reception.end_attempt(context.digest())
        self.reception.clear_attempt(context.digest())
        self._results.forget_before(state.round)
        if state.round < contract.rounds:
            self._ready = self._open_round(contract, state)
        transition.answer({}, otherwise=Answer("next", certificate))
        return state

    @property
    def _resume(self) -> str:
        return (
            f"mpctf-secure runs resume {self._proposal.run_id} goes on, once they are back; report.json says who was "
            "lost when and why"
        )

    def _check_cohort(self, cohort: tuple[IdentityKey, ...]) -> None:
        proposal, members = self._proposal, len(self._proposal.participants)
        try:
            check_cohort(len(cohort), members, colluders=proposal.colluders, quorum=proposal.quorum)
        except ParticipationError as error:
            lost = sorted(
                {
                    *self.ledger.names(self.reception.banned),
                    *(entry["participant"] for entry in self.ledger.round.dropouts),
                }
            )
            raise AbsentError(
                f"round {self.ledger.round.round}: {members - len(lost)} of {members} participants "
                f"are left, the contract asks for {proposal.quorum}; lost: {', '.join(lost)}",
                hint=self._resume,
                culprits=lost,
            ) from error

    async def _gather(self, gate: Gate, stage: str, quorum: int) -> None:
        """Wait for a quorum, however long it takes, and for the others not for ever."""
        times = self._timeouts

        def tell_waiting(absent: set[IdentityKey]) -> None:
            names = self.ledger.names(absent)
            self._tell("waiting", round=gate.key.round, participants=names, quorum=quorum, seconds=times.absence)

        patience = ForQuorum(quorum, times.stage, times.absence, self.reception.present, tell_waiting)
        await gate.gather(lambda: patience.is_over(gate), times.training, quorum)
        self.ledger.note_stage(gate, stage)

    async def _collect_everyone(self, gate: Gate, deed: str, seconds: float) -> None:
        everyone = len(self.reception.active)
        await gate.gather(lambda: len(gate.arrived) + len(gate.awaited) < everyone, seconds, everyone)
        if len(gate.arrived) < everyone:
            missing = {**self.reception.banned, **gate.left}
            reasons = [f"{self.ledger.name(member)} ({reason})" for member, reason in sorted(missing.items())]
            final = bool(self.reception.banned) or any(reason.startswith(VETO) for reason in missing.values())
            raise (ParticipationError if final else AbsentError)(
                f"not everyone {deed}: {', '.join(reasons)}",
                hint="mend it there, and start another run" if final else self._resume,
                culprits=self.ledger.names(missing),
            )

    def _accept_choice(self, sender: IdentityKey, message: bytes) -> None:
        """What a site trains with, within the bounds: signed, so that it can be held to it."""
        witnessed = Witnessed.decode(Signed.decode(message).body)
        self._log.check(0, sender, witnessed)
        choice = Choice.decode(witnessed.said)
        try:
            self._proposal.training.with_choice(choice)
        except UsageError as error:
            raise SecurityError(f"accepted the contract and not its bounds: {error.message}") from error
        self.choices[self.ledger.name(sender)] = choice.chosen()

    def _accept_facts(self, sender: IdentityKey, message: bytes) -> None:
        facts = Facts.decode(Signed.decode(message).body)
        if sender not in self._facts:
            self._tell("participant_joined", participant=self.ledger.name(sender))
        self._facts[sender] = facts
