"""One participant's rounds: train, take part in the attempt, apply the published sum, agree on the next state."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import COORDINATOR, ParticipationError, SecurityError, UsageError, blaming
from mpctf_secure.hazmat.encoding import decode_sequence, enc
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import keystore
from mpctf_secure.ids import IdentityKey
from mpctf_secure.parallel import ordered_map
from mpctf_secure.participant.attempts import Attempts, Input
from mpctf_secure.participant.link import Link, Outcome, Published, Skipped
from mpctf_secure.participant.round_file import RoundFile
from mpctf_secure.partition.slices import fixed_size, round_slice
from mpctf_secure.privacy.clipping import clip_to_norm
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.messages import Announce, Fetch, Position, Progress, Void
from mpctf_secure.rounds.state import (
    State,
    Sum,
    grid,
    initial_state,
    most_chunks,
    next_state,
    round_context,
    sum_of,
    void_state,
)
from mpctf_secure.secagg import codec
from mpctf_secure.secagg.chunks import digest
from mpctf_secure.secagg.client import BadBoxError
from mpctf_secure.secagg.masks import MaskedInput
from mpctf_secure.secagg.messages import Signed
from mpctf_secure.secagg.parameters import MAX_COHORT, Context, check_ascending, check_cohort
from mpctf_secure.secagg.proof import DealerProof
from mpctf_secure.training.launch import Job

Report = Callable[[str], None]
"""Gets one line for the site's terminal or log."""
_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class Contribution:
    """What a site puts into a round: its clipped update [d], rows, mean loss, and whether the norm was clipped."""

    update: Vector
    rows: int
    loss: float
    norm_clipped: bool


class Participant:
    """A site inside a run whose contract it accepted; `folder` holds what survives a crash."""

    def __init__(
        self,
        name: str,
        link: Link,
        key: SigningKey,
        contract: Contract,
        job: Job,
        members: Callable[[], set[IdentityKey]],
        site: SiteConfig,
        report: Report,
    ) -> None:
        self._name = name
        self._link = link
        self._key = key
        self._contract = contract
        self._job = job
        self._members = members
        self._site = site
        self._report = report
        self._run_secret = keystore.run_secret(site.keys, contract.run_id)

    def run(self) -> State:
        """All rounds; the final state, which every participant and the coordinator hold alike."""
        state = initial_state(self._contract)
        for _ in range(self._contract.rounds):
            state = self._round(state)
        keystore.destroy_run_secret(self._site.keys, self._contract.run_id)
        return state

    def _round(self, state: State) -> State:
        """Train, take part in attempts until the round has an outcome, arrive at the next state with the others."""
        contribution = self._train(state)
        folder = self._site.work / "rounds"
        file = RoundFile(folder, self._site.keys, self._contract.run_id, self._contract.hash, state.round + 1)
        attempts = Attempts(file, self._key, lambda announce: self._context(state, announce))
        outcome: Outcome | None = self._ready(state)
        while outcome is None or isinstance(outcome, Announce):
            if outcome:
                self._take_part(state, contribution, attempts, outcome)
            outcome = self._fetch(state, attempts)
        following = self._apply(state, attempts, outcome)
        self._agree(following)
        file.close()
        return following

    def _train(self, state: State) -> Contribution:
        count = fixed_size(self._contract.data.size, self._job.rows)
        rows = round_slice(state.round + 1, count, self._job.rows, self._contract.seed, self._name)
        trained = self._job.train(state.adapter, rows, self._progress(state.round + 1))
        self._report(
            f"{self._name}: round {state.round + 1}: {trained.rows} rows, {trained.tokens} tokens, "
            f"loss {trained.loss:.3f}, {trained.seconds:.1f} s"
        )
        # Whatever is wrong with an update shows before this site is counted in a cohort.
        if not math.isfinite(trained.loss):
            raise UsageError("the local loss is not a number", hint="lower training.learning_rate")
        update, norm_clipped = clip_to_norm(trained.adapter - state.adapter, self._contract.privacy.clip_norm)
        return Contribution(update, trained.rows, trained.loss, norm_clipped)

    def _progress(self, round_number: int) -> Callable[[int, int], None]:
        told = 0.0

        def progress(step: int, steps: int) -> None:
            nonlocal told
            if step == steps or time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                body = Progress(round_number, step, steps).encode()
                self._link.tell("progress", self._contract.run_context, body)

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

    def _take_part(self, state: State, contribution: Contribution, attempts: Attempts, announce: Announce) -> None:
        """The stages of one attempt, as far as it goes with this site."""
        attempt = f"attempt {announce.attempt} of round {announce.round}"
        try:
            advert = attempts.join(announce, lambda context: self._encode(state, contribution, context))
            ctx = self._context(state, announce).digest()
            adverts = self._link.send("advert", advert, ctx, "adverts")
            delivery = self._link.send("shares", attempts.share(adverts), ctx, "delivery")
            try:
                masked = attempts.mask(delivery)
            except BadBoxError as error:
                self._report(f"{self._name}: left {attempt}: {error.message}: {error.dealer.hex()[:16]}…")
                self._link.send("complaint", attempts.complain(error.dealer), ctx, "noted")
                return
            claim = self._link.upload(lambda: _upload(attempts, ctx, masked), ctx, "survivors")
            signatures = self._link.send("consistency", attempts.confirm(claim), ctx, "signatures")
            self._link.send("release", attempts.release(signatures), ctx, "ack")
        except Skipped:
            self._report(f"{self._name}: {attempt} goes on without this site")

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
        if not set(first) <= self._members() - set(state.convicted):
            raise SecurityError(
                "cohort holds somebody who is not in the contract or the newest roster, or is convicted",
                culprits=[COORDINATOR],
            )
        return context

    def _encode(self, state: State, contribution: Contribution, context: Context) -> Input:
        """Weigh and quantise the update; its rounding bits come from the run secret and the update itself."""
        members = len(context.first_cohort)
        info = enc("mpctf-secure/rounding/v1", context.round, sha256(contribution.update.tobytes()), members)
        lanes, clipped = codec.encode(
            contribution.update,
            contribution.rows / self._contract.weight_cap,
            grid(self._contract, state, members),
            hkdf(self._run_secret, info),
            ordered_map,
        )
        loss = round(contribution.loss * contribution.rows * codec.LOSS_SCALE)
        scalars = [contribution.rows, loss, int(contribution.norm_clipped), *clipped]
        return lanes, codec.encode_scalars(scalars, members)

    def _fetch(self, state: State, attempts: Attempts) -> Outcome:
        known = attempts.announce.attempt if attempts.announce else 0
        request = Fetch(Position(state.round + 1, state.hash(self._contract)), known)
        return self._link.fetch(self._contract.run_context, request, most_chunks(self._contract))

    def _apply(self, state: State, attempts: Attempts, outcome: Published | Void) -> State:
        if isinstance(outcome, Void):
            return self._accept_void(state, outcome)
        return next_state(self._contract, state, self._verified_sum(state, attempts, outcome), ordered_map)

    def _accept_void(self, state: State, void: Void) -> State:
        context = self._context(state, void.announce)
        self._report(f"{self._name}: round {state.round + 1} is void: {void.reason}")
        convicted = None
        if void.proof:
            with blaming(COORDINATOR, "proof against a dealer"):
                convicted = DealerProof.decode(void.proof).convict(context)
            self._report(f"{self._name}: the shares of {convicted.hex()[:16]}… convict it; it is out of the run")
        return void_state(self._contract, state, convicted)

    def _verified_sum(self, state: State, attempts: Attempts, outcome: Published) -> Sum:
        """The published sum, if it is of the attempt and survivors that this site saw, and of the schema's size."""
        header, chunks = outcome
        context = self._context(state, header.announce)
        if attempts.announce and header.announce != attempts.announce:
            later = header.announce.attempt > attempts.announce.attempt
            if not later or header.announce.first_cohort != attempts.announce.first_cohort or attempts.released:
                raise SecurityError("published sum is of another attempt", culprits=[COORDINATOR])
        elif attempts.confirmed not in {None, header.survivors}:
            raise SecurityError("published sum is of other survivors", culprits=[COORDINATOR])
        check_ascending(header.survivors, "survivors")
        if not set(header.survivors) <= set(context.cohort) or len(header.survivors) < context.floor:
            raise SecurityError("published sum has too few survivors", culprits=[COORDINATOR])
        if [len(chunk) for chunk in chunks] != context.layout.sizes:
            raise SecurityError("published sum does not have the schema's size", culprits=[COORDINATOR])
        return sum_of(context, header.survivors, chunks)

    def _agree(self, state: State) -> None:
        """Sign the state I arrived at, and see that a quorum did: two different states never both get one.

        Without this a coordinator could publish two sums in the last round, where no later context shows it.
        """
        run_context, position = self._contract.run_context, Position(state.round, state.hash(self._contract)).encode()
        answer = self._link.ask("transition", run_context, position, "next")
        signers = set()
        for message in map(Signed.decode, decode_sequence(answer, MAX_COHORT)):
            message.verify("transition", run_context)
            if message.sender in self._members() - set(state.convicted) and message.body == position:
                signers.add(message.sender)
        if len(signers) < self._contract.agreement:
            raise SecurityError(f"only {len(signers)} participants hold my state", culprits=[COORDINATOR])


def _upload(attempts: Attempts, ctx: bytes, masked: MaskedInput) -> Iterator[bytes]:
    """ctx and length, the chunks, then the signed digest: the same bytes however often it is read.

    A chunk travels while the next ones are masked.
    """

    def hashed(number: int) -> tuple[bytes, bytes]:
        chunk = masked.chunk(number)
        return chunk, sha256(chunk)

    yield enc(ctx, masked.layout.size)
    hashes = []
    for chunk, chunk_hash in ordered_map(hashed, range(len(masked.layout.sizes))):
        hashes.append(chunk_hash)
        yield chunk
    yield attempts.declare(digest(hashes))
