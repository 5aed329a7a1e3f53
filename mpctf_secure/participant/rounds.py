"""One participant's rounds: train, take part in the attempt, apply the published sum, agree on the next state."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial, reduce
from itertools import compress
from pathlib import Path

from mpctf_secure.config.privacy import NoNoise
from mpctf_secure.errors import COORDINATOR, MpctfError, ParticipationError, SecurityError, blaming
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import keystore
from mpctf_secure.monitoring.events import Record
from mpctf_secure.parallel import ordered_map
from mpctf_secure.participant import contribution
from mpctf_secure.participant.attempts import Attempts, Input, uploader
from mpctf_secure.participant.contribution import Contribution
from mpctf_secure.participant.link import BehindError, Link, Outcome, Published, Skipped
from mpctf_secure.participant.members import Members
from mpctf_secure.participant.round_file import LostRoundError, RoundFile
from mpctf_secure.participant.store import Store, Terms
from mpctf_secure.participant.witness import Certified, Witness
from mpctf_secure.partition.slices import round_slice
from mpctf_secure.privacy.records import Samples
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.messages import PROGRESS_PARTS, Announce, Fetch, Position, Progress, Publication, Void
from mpctf_secure.rounds.outcome import Sum, next_state, read_sum, sum_of, void_state
from mpctf_secure.rounds.state import State, Survey, extend_history
from mpctf_secure.rounds.terms import (
    is_survey,
    most_sum_chunks,
    moving_tensors,
    round_context,
    state_chunks,
    turn,
    volume,
)
from mpctf_secure.secagg.client import BadBoxError
from mpctf_secure.secagg.parameters import MAX_ATTEMPTS, Context, check_ascending, check_cohort
from mpctf_secure.secagg.proof import DealerProof
from mpctf_secure.training.launch.job import Job

_PROGRESS_SECONDS = 0.5


class Participant:
    """A site inside a run whose contract it accepted; `store` and `keys` hold what survives a crash.

    `terms` are those with which it accepted: what was added up stays true, whatever memory is free today. `charge` gets
    a round's number and the hash of what this site puts into it, before that leaves.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        key: SigningKey,
        contract: Contract,
        job: Job,
        members: Members,
        keys: Path,
        store: Store,
        record: Record,
        terms: Terms,
        charge: Callable[[int, bytes], None],
        witness: Witness,
    ) -> None:
        self._name = name
        self._link = link
        self._key = key
        self._contract = contract
        self._job = job
        self._members = members
        self._keys = keys
        self._store = store
        self._record = record
        self._terms = terms
        self._charge = charge
        self._witness = witness
        self._run_secret = keystore.run_secret(keys, contract.run_id)

    def run(self) -> State:
        """All rounds from the last state on; the final one, which every participant and the coordinator hold alike."""
        state, certificate = self._store.last_state(self._contract)
        if state.round and certificate is None:
            self._agree(state)
        self._forget_rounds(state.round)
        state = self._catch_up(state)
        while state.round < self._contract.rounds:
            state = self._round(state)
        self._forget_rounds(state.round)
        with contextlib.suppress(MpctfError):  # what it says then changes nothing any more
            self._link.tell("done", self._contract.run_context, b"")  # the coordinator stays until it hears that
        return state

    def _forget_rounds(self, last: int) -> None:
        """Keys and sealed files of rounds that are over and that a crash has left."""
        keystore.destroy_round_keys(self._keys, self._contract.run_id, last)
        for path in self._store.folder(self._contract.run_id).glob("*.sealed"):
            if int(path.stem) <= last:
                path.unlink(missing_ok=True)

    def _round(self, state: State) -> State:
        """Train, take part in attempts until the round has an outcome, arrive at the next state with the others.

        After a restart an attempt that was joined is gone on with; a round whose sealed file is lost is sat out.
        """
        try:
            attempts = self._attempts(state)
        except LostRoundError as error:
            self._record("round_sat_out", round=state.round + 1, reason=error.message)
            attempts = None
        try:
            outcome = self._take_part_until_outcome(state, attempts)
        except BehindError:
            return self._catch_up(state)
        following = self._apply(state, attempts, outcome)
        self._store.keep(self._contract.run_id, following)
        self._agree(following)
        if attempts:
            attempts.close()
        return following

    def _attempts(self, state: State) -> Attempts:
        run, number = self._contract.run_id, state.round + 1
        file = RoundFile(self._store.folder(run), self._keys, run, self._contract.hash, number)
        return Attempts(file, self._key, lambda announce: self._context(state, announce))

    def _take_part_until_outcome(self, state: State, attempts: Attempts | None) -> Published | Void:
        outcome: Outcome | None = attempts.announce if attempts else None
        given = None
        if attempts and outcome is None:
            given = self._contribute(state, attempts.secret("records"))
            outcome = self._ready(state)
        known = 0 if attempts else MAX_ATTEMPTS  # the last attempt that need not be told of
        while outcome is None or isinstance(outcome, Announce):
            if outcome and attempts:
                known = outcome.attempt
                self._take_part(state, given, attempts, outcome)
            outcome = self._fetch(state, known)
        return outcome

    def _contribute(self, state: State, secret: bytes) -> Contribution:
        if is_survey(self._contract, state):
            return contribution.of_sizes(self._sizes)
        return self._train(state, secret)

    def _train(self, state: State, secret: bytes) -> Contribution:
        contract, which, dpsgd = self._contract, moving_tensors(self._contract, state), self._terms.dpsgd
        count = volume(contract, state, self._job.rows, self._terms.memory)
        work: list[int] | Samples
        if dpsgd:
            work = Samples(dpsgd, secret)
        else:
            work = round_slice(turn(contract, state), count, self._job.rows, contract.seed, self._name)
        names = [name for name, _ in compress(contract.tensors, which)]
        trained = self._job.train(state.adapter, work, names, self._progress(state.round + 1))
        self._record(
            "round_trained",
            round=state.round + 1,
            turn=turn(contract, state),
            rows=trained.rows,
            tokens=trained.tokens,
            loss=trained.loss,
            seconds=trained.seconds,
            held_out=trained.held_out and asdict(trained.held_out),
        )
        if isinstance(contract.privacy, NoNoise) and not dpsgd:
            self._job.check_finite(trained)
        return contribution.of_training(contract, state, trained, self._terms.own_clip_norm)

    def _progress(self, round_number: int) -> Callable[[int, int], None]:
        if self._contract.privacy.hides_training:  # how fast it goes depends on rows
            return lambda *_: None
        told_at, told = 0.0, Progress(round_number, 0)

        def progress(step: int, steps: int) -> None:
            """Tell the coordinator, some times a second at the most."""
            nonlocal told_at, told
            now, current = time.monotonic(), Progress(round_number, PROGRESS_PARTS * step // steps)
            few = steps <= PROGRESS_PARTS  # whose parts could be counted
            if current != told and (step == steps or (not few and now - told_at > _PROGRESS_SECONDS)):
                told_at, told = now, current
                self._link.tell("progress", self._contract.run_context, current.encode())

        return progress

    def _ready(self, state: State) -> Announce | None:
        """Say that the update is there; the first attempt, or None if it began without this site."""
        position = Position(state.round + 1, state.hash(self._contract))
        try:
            body = self._link.ask("ready", self._contract.run_context, position.encode(), "announce", skippable=True)
        except Skipped:
            return None
        announce = Announce.decode(body)
        if announce.round != position.round:
            raise SecurityError("announced cohort is of another round", culprits=[COORDINATOR])
        return announce

    def _take_part(self, state: State, given: Contribution | None, attempts: Attempts, announce: Announce) -> None:
        """The stages of one attempt, as far as it goes with this site."""
        which = {"round": announce.round, "attempt": announce.attempt}
        ctx = self._context(state, announce).digest()
        if announce != attempts.announce and not set(announce.cohort) <= self._members.left():
            self._refuse(announce, ctx)
            return
        try:
            secret = attempts.secret("noise")
            advert = attempts.join(announce, lambda context: self._encode(state, given, context, secret))
            self._witness.join(announce, ctx)
            adverts = self._link.send("advert", advert, ctx, "adverts")
            delivery = self._link.send("shares", attempts.share(adverts), ctx, "delivery")
            try:
                masked = attempts.mask(delivery)
            except BadBoxError as error:
                self._record("box_refused", **which, dealer=error.dealer.hex(), reason=error.message)
                self._link.send("complaint", attempts.complain(error.dealer), ctx, "noted")
                return
            self._charge(announce.round, attempts.content)  # others may open it as soon as it is there
            note = partial(self._witness.upload, announce)
            claim = self._link.upload(uploader(attempts, ctx, masked, note), ctx, "survivors")
            confirmation = attempts.confirm(claim)
            self._witness.confirm(announce, claim)
            signatures = self._link.send("consistency", confirmation, ctx, "signatures")
            release = attempts.release(signatures)
            self._witness.release(announce, claim)
            self._record("shares_released", **which, context=ctx.hex())
            self._link.send("release", release, ctx, "ack")
        except Skipped:
            self._record("attempt_missed", **which)

    def _refuse(self, announce: Announce, ctx: bytes) -> None:
        """Put nothing into a sum with a member who was removed; what others had begun with it stays true.

        The coordinator may hear of the removal a moment later than this site, so that this convicts nobody.
        """
        gone, version = ", ".join(self._members.gone()), self._members.newest_roster().version
        reason = f"attempt {announce.attempt} of round {announce.round} with {gone}, not in roster version {version}"
        self._record("attempt_refused", round=announce.round, attempt=announce.attempt, reason=reason)
        self._link.ask("veto", ctx, reason.encode(), "noted")

    def _context(self, state: State, announce: Announce) -> Context:
        """An attempt's context, for cohorts that the contract allows."""
        contract, first = self._contract, announce.first_cohort
        try:
            check_cohort(len(first), len(contract.participants), colluders=contract.colluders, quorum=contract.quorum)
            context = round_context(contract, state, first)
            if announce.attempt != 1 or announce.cohort != first:
                context = context.retry(announce.attempt, announce.cohort)
        except (ParticipationError, SecurityError) as error:
            raise SecurityError(f"announced cohort: {error.message}", culprits=[COORDINATOR]) from error
        if not set(first) <= self._members.identities - set(state.convicted):
            raise SecurityError(
                "cohort holds somebody who is not in the contract, or is convicted", culprits=[COORDINATOR]
            )
        return context

    def _encode(self, state: State, given: Contribution | None, context: Context, secret: bytes) -> Input:
        if given is None:  # an attempt was joined before a restart, but then its input was kept
            raise SecurityError("an attempt without input")
        return contribution.encode(self._contract, state, given, context, self._run_secret, secret)

    def _fetch(self, state: State, known: int) -> Outcome:
        request = Fetch(Position(state.round + 1, state.hash(self._contract)), known)
        return self._link.fetch(self._contract.run_context, request, most_sum_chunks(self._contract))

    def _apply(self, state: State, attempts: Attempts | None, outcome: Published | Void) -> State:
        if isinstance(outcome, Void):
            self._check_unopened(state, attempts)
            following = self._accept_void(state, outcome)
            self._witness.hear(outcome)
            return following
        total = self._verified_sum(state, attempts, outcome)
        said = read_sum(self._contract, state, total, ordered_map)
        if isinstance(said, Survey) and self._key.public in total.survivors:
            self._check_own_part(said, len(total.survivors) - 1)
        self._witness.hear(outcome.header)
        return next_state(self._contract, state, said).after(outcome.header.encode())

    def _check_unopened(self, state: State, attempts: Attempts | None) -> None:
        """Of a void round: sizes do not change, so that the difference of two sums would be those of who was in one."""
        if is_survey(self._contract, state) and (attempts is None or attempts.released):
            raise ParticipationError(
                "sizes were opened, and yet the round is void: this site adds none up again",
                hint="start another run, maybe with another data.strategy",
            )

    def _check_own_part(self, said: Survey, others: int) -> None:
        """A forged sum could make this site train on all its rows, or weigh nothing."""
        if any(total < own + others for total, own in zip(said, self._sizes, strict=True)):
            raise SecurityError("published sum of sizes is less than this site's own: somebody's part of it is false")

    @property
    def _sizes(self) -> Survey:
        return Survey(self._job.rows, self._job.rows * self._terms.memory)

    def _accept_void(self, state: State, void: Void) -> State:
        context = self._context(state, void.announce)
        self._record("round_void", round=state.round + 1, reason=void.reason)
        convicted = None
        if void.proof:
            with blaming(COORDINATOR, "proof against a dealer"):
                convicted = DealerProof.decode(void.proof).convict(context)
            self._record("dealer_convicted", round=state.round + 1, dealer=convicted.hex())
        return void_state(self._contract, state, convicted).after(void.encode())

    def _verified_sum(self, state: State, attempts: Attempts | None, outcome: Published) -> Sum:
        """The published sum, if it is of the attempt and survivors that this site saw, and of the schema's size."""
        header, chunks = outcome
        context = self._context(state, header.announce)
        if attempts:
            _check_seen(attempts, header)
        check_ascending(header.survivors, "survivors")
        if not set(header.survivors) <= set(context.cohort) or len(header.survivors) < context.floor:
            raise SecurityError("published sum has too few survivors", culprits=[COORDINATOR])
        if [len(chunk) for chunk in chunks] != context.layout.sizes:
            raise SecurityError("published sum does not have the schema's size", culprits=[COORDINATOR])
        return sum_of(context, header.survivors, chunks)

    def _agree(self, state: State) -> None:
        """Sign the state I arrived at and its log, and see that a quorum did: two different ones never both get one.

        Without this a coordinator could publish two sums in the last round, where no later context shows it.
        """
        state_hash = state.hash(self._contract)
        body = self._witness.witness(state.round, Position(state.round, state_hash).encode(), state_hash)
        certificate = self._link.ask("transition", self._contract.run_context, body, "next")
        self._witness.keep_certificate(self._check_certificate(state, certificate))
        self._record("round_finished", round=state.round, state_hash=state.hash(self._contract).hex())
        self._store.certify(self._contract.run_id, state, certificate)

    def _check_certificate(self, state: State, certificate: bytes) -> Certified:
        position = Position(state.round, state.hash(self._contract)).encode()
        voters = self._members.identities - set(state.convicted)
        return self._witness.check_certificate(state.round, certificate, position, voters)

    def _catch_up(self, state: State) -> State:
        """The last finished state, if mine is older: signed by a quorum, and with a past that holds what I saw.

        Whoever was away cannot recompute the sums that it missed. But a state's hash covers every outcome on the way:
        a coordinator that opened two sums of a round, and cut off one of the groups, cannot give it the other's state.
        """
        run_context, position = self._contract.run_context, Position(state.round, state.hash(self._contract))
        caught = self._link.catch_up(run_context, position, self._contract.rounds + state_chunks(state))
        if caught is None:
            return state
        following, outcomes, certificate = caught
        with blaming(COORDINATOR, "state"):
            history = reduce(extend_history, outcomes, state.history)
            if (following.round, following.history) != (state.round + len(outcomes), history) or not outcomes:
                raise SecurityError("its past is not the one that goes with it")
            sizes = [[vector.size for vector in one.vectors] for one in (state, following)]
            if sizes[0] != sizes[1] or following.round > self._contract.rounds:
                raise SecurityError("it is not of this contract's model")
            certified = self._check_certificate(following, certificate)
            own = self._own_part(state, outcomes[0])
            for number, outcome in enumerate(map(_decode_outcome, outcomes), state.round + 1):
                if outcome.announce.round != number:
                    raise SecurityError(f"its outcome of round {number} is of another one")
                self._witness.hear(outcome)
        self._witness.follow(following.round, following.hash(self._contract), certified.note)
        self._witness.keep_certificate(certified)
        self._record("caught_up", held=state.round, round=following.round)
        self._store.keep(self._contract.run_id, following)
        self._store.certify(self._contract.run_id, following, certificate)
        if own:
            own.close()
        return following

    def _own_part(self, state: State, outcome: bytes) -> Attempts | None:
        """My attempts in the first missed round, if there were any and its outcome goes with them.

        Only in the first can I have taken part: the others need a later state.
        """
        if keystore.joined_round(self._keys, self._contract.run_id) != state.round + 1:
            return None
        try:
            attempts = self._attempts(state)
        except LostRoundError:
            attempts = None
        published = _decode_outcome(outcome)
        if isinstance(published, Void):
            self._check_unopened(state, attempts)
        elif attempts:
            _check_seen(attempts, published)
        return attempts


def _decode_outcome(body: bytes) -> Publication | Void:
    try:
        return Publication.decode(body)
    except SecurityError:
        return Void.decode(body)


def _check_seen(attempts: Attempts, header: Publication) -> None:
    """A published sum is of the attempt and the survivors that this site saw, or of a later attempt like its own."""
    mine, theirs = attempts.announce, header.announce
    if mine and theirs != mine:
        if theirs.attempt <= mine.attempt or theirs.first_cohort != mine.first_cohort or attempts.released:
            raise SecurityError("published sum is of another attempt", culprits=[COORDINATOR])
    elif attempts.confirmed not in {None, header.survivors}:
        raise SecurityError("published sum is of other survivors", culprits=[COORDINATOR])
