"""One participant's rounds: train, take part in the attempt, apply the published sum, agree on the next state."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.errors import ParticipationError, SecurityError, UsageError
from mpctf_secure.hazmat.encoding import decode_sequence, enc
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant.link import Link, Skipped
from mpctf_secure.partition.slices import fixed_size, round_slice
from mpctf_secure.privacy.clipping import clip_to_norm
from mpctf_secure.rounds.contract import Contract
from mpctf_secure.rounds.messages import Announce, Position, Progress
from mpctf_secure.rounds.state import State, Sum, grid, initial_state, most_chunks, next_state, round_context, sum_of
from mpctf_secure.secagg import codec, masks
from mpctf_secure.secagg.client import Client
from mpctf_secure.secagg.messages import Signed, Survivors
from mpctf_secure.secagg.parameters import Context, check_cohort, threshold
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


@dataclass
class Seen:
    """What the coordinator showed of an attempt; the publication must agree with it."""

    cohort: tuple[IdentityKey, ...] | None = None
    survivors: tuple[IdentityKey, ...] | None = None


class Participant:
    """A site inside a run whose contract it accepted."""

    def __init__(
        self,
        name: str,
        link: Link,
        key: SigningKey,
        contract: Contract,
        job: Job,
        members: set[IdentityKey],
        report: Report,
    ) -> None:
        self._name = name
        self._link = link
        self._key = key
        self._contract = contract
        self._job = job
        self._members = members
        self._report = report
        self._run_secret = os.urandom(32)

    def run(self) -> State:
        """All rounds; the final state, which every participant and the coordinator hold alike."""
        state = initial_state(self._contract)
        for _ in range(self._contract.rounds):
            seen = Seen()
            try:
                self._contribute(state, self._train(state), seen)
            except Skipped:
                self._report(f"{self._name}: round {state.round + 1} goes on without this site")
            total = self._fetch(state, seen)
            state = next_state(self._contract, state, total)
            self._agree(state, total)
        return state

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

    def _contribute(self, state: State, contribution: Contribution, seen: Seen) -> None:
        """The stages of one attempt; what the coordinator showed of it stays in `seen`, however it ends."""
        context = self._context(state)
        seen.cohort = context.cohort
        lanes, scalars = self._encode(state, contribution, context)
        ctx = context.digest()
        client = Client(context, self._key, os.urandom)
        adverts = self._link.send("advert", client.advertise(), ctx, "adverts")
        delivery = self._link.send("shares", client.share(adverts), ctx, "delivery")
        masked = client.mask(delivery, lanes, scalars)
        claim = self._link.upload(lambda: _upload(client, ctx, masked), ctx, "survivors")
        confirmation = client.confirm(claim)
        seen.survivors = Survivors.decode(claim).survivors
        signatures = self._link.send("consistency", confirmation, ctx, "signatures")
        self._link.send("release", client.release(signatures), ctx, "ack")

    def _context(self, state: State) -> Context:
        position = Position(state.round + 1, state.hash(self._contract))
        run_context = self._contract.run_context
        body = self._link.ask("ready", run_context, position.encode(), "announce", skippable=True)
        announce = Announce.decode(body)
        if announce.round != position.round:
            raise SecurityError("announced cohort is of another round", culprits=["coordinator"])
        return self._cohort_context(state, announce.cohort)

    def _cohort_context(self, state: State, cohort: tuple[IdentityKey, ...]) -> Context:
        """The attempt's context for a cohort that the contract allows."""
        contract = self._contract
        try:
            check_cohort(len(cohort), len(contract.participants), colluders=contract.colluders, quorum=contract.quorum)
        except ParticipationError as error:
            raise SecurityError(error.message, culprits=["coordinator"]) from error
        if not set(cohort) <= self._members:
            raise SecurityError("cohort holds somebody outside the contract", culprits=["coordinator"])
        return round_context(contract, state, cohort)

    def _encode(self, state: State, contribution: Contribution, context: Context) -> tuple[masks.Lanes, masks.Lanes]:
        """Weigh and quantise the update; its rounding bits come from the run secret and the update itself."""
        members = len(context.cohort)
        info = enc("mpctf-secure/rounding/v1", context.round, sha256(contribution.update.tobytes()), members)
        lanes, clipped = codec.encode(
            contribution.update,
            contribution.rows / self._contract.weight_cap,
            grid(self._contract, state, members),
            Generator(hkdf(self._run_secret, info)),
        )
        loss = round(contribution.loss * contribution.rows * codec.LOSS_SCALE)
        scalars = [contribution.rows, loss, int(contribution.norm_clipped), *clipped]
        return lanes, codec.encode_scalars(scalars, members)

    def _fetch(self, state: State, seen: Seen) -> Sum:
        """The published sum, if it is of the cohort and survivors that this site saw, and of the schema's size."""
        position = Position(state.round + 1, state.hash(self._contract))
        run_context, most = self._contract.run_context, most_chunks(self._contract)
        publication, chunks = self._link.fetch_sum(run_context, position, most)
        context = self._cohort_context(state, publication.cohort)
        if seen.cohort not in {None, publication.cohort} or seen.survivors not in {None, publication.survivors}:
            raise SecurityError("published sum is of another cohort or other survivors", culprits=["coordinator"])
        if not set(publication.survivors) <= set(context.cohort) or len(set(publication.survivors)) < context.floor:
            raise SecurityError("published sum has too few survivors", culprits=["coordinator"])
        sizes = masks.chunk_sizes(context.ring_bits, context.dimension, context.scalars)
        if [len(chunk) for chunk in chunks] != sizes:
            raise SecurityError("published sum does not have the schema's size", culprits=["coordinator"])
        return sum_of(context, publication.survivors, chunks)

    def _agree(self, state: State, total: Sum) -> None:
        """Sign the state I arrived at, and see that t others did: two different states never both get so many.

        Without this a coordinator could publish two sums in the last round, where no later context shows it.
        """
        run_context, position = self._contract.run_context, Position(state.round, state.hash(self._contract)).encode()
        answer = self._link.ask("transition", run_context, position, "next")
        signers = set()
        for message in map(Signed.decode, decode_sequence(answer)):
            message.verify("transition", run_context)
            if message.sender in self._members and message.body == position:
                signers.add(message.sender)
        if len(signers) < threshold(len(total.cohort), self._contract.colluders):
            raise SecurityError(f"only {len(signers)} participants hold my state", culprits=["coordinator"])


def _upload(client: Client, ctx: bytes, masked: masks.MaskedInput) -> Iterator[bytes]:
    """ctx, the chunks, then the signed digest: the same bytes however often it is read."""
    yield ctx
    hashes = []
    for chunk in masked.chunks():
        hashes.append(sha256(chunk))
        yield chunk
    yield client.declare(masks.digest(hashes))
