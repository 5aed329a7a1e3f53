"""One participant in one run, from hello to the last transition."""

import os
import time
from collections.abc import Callable, Iterator

import numpy as np

from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import MpctfError, SecurityError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keystore import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.ids import IdentityKey
from mpctf_secure.participant.link import Link, Skipped
from mpctf_secure.participant.policy import check_contract, check_proposal
from mpctf_secure.partition.slices import fixed_size, round_slice
from mpctf_secure.privacy.clipping import clip_to_norm
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Announce, Facts, Position, Progress, Publication
from mpctf_secure.rounds.state import State, Sum, grid, initial_state, next_state, round_context
from mpctf_secure.secagg import codec, masks
from mpctf_secure.secagg.client import Client
from mpctf_secure.secagg.messages import Survivors
from mpctf_secure.secagg.parameters import Context
from mpctf_secure.training.data import load_rows
from mpctf_secure.training.launch import Job, JobSpec, Trained
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.transport.client import Channel

Report = Callable[[str], None]
"""Gets one line for the terminal."""
_PROGRESS_SECONDS = 0.5


def join(site: SiteConfig, report: Report) -> None:
    """Take part in one run; returns when it is over. Errors name culprits by their names in the roster."""
    keys, roster = keystore.load(site.keys), keystore.load_roster(site.keys)
    try:
        _join(site, keys, roster, report)
    except MpctfError as error:
        error.culprits = tuple(roster.named(error.culprits))
        raise


def _join(site: SiteConfig, keys: Keys, roster: Roster, report: Report) -> None:
    name = roster.by_identity(keys.identity.public).name
    load_rows(site.data)  # a bad row is found before anybody waits for us
    base_model_hash = hash_model(site.model)
    site.work.mkdir(parents=True, exist_ok=True)
    channel = Channel(site.coordinator, roster, keys)
    try:
        link = Link(channel, keys.identity, roster.coordinator)
        proposal = Proposal.decode(link.ask("hello", roster.hash, b"", "proposal"))
        check_proposal(proposal, site.policy, roster, name)
        report(f"{name}: joins run {proposal.run_id}")
        job = Job(JobSpec.of(site.model, site.data, proposal.lora, proposal.training), site.work)
        try:
            facts = Facts.of(base_model_hash, job.schema)
            contract = Contract.decode(link.ask("facts", roster.hash, facts.encode(), "contract"))
            check_contract(contract, proposal, facts)
            link.ask("accept", contract.run_context, b"", "go")
            cohort_names = {m.identity: str(m.name) for m in roster.participants}
            Participant(name, link, keys.identity, contract, job, cohort_names, report).run()
        finally:
            job.close()
    finally:
        channel.close()


class Participant:
    """A site inside a run whose contract it accepted."""

    def __init__(
        self,
        name: str,
        link: Link,
        key: SigningKey,
        contract: Contract,
        job: Job,
        names: dict[IdentityKey, str],
        report: Report,
    ) -> None:
        self._name = name
        self._link = link
        self._key = key
        self._contract = contract
        self._job = job
        self._members = {key for key, member in names.items() if member in contract.participants}
        self._report = report
        self._run_secret = os.urandom(32)

    def run(self) -> State:
        """All rounds; the final state, which every participant and the coordinator hold alike."""
        state = initial_state(self._contract)
        for _ in range(self._contract.rounds):
            try:
                survivors = self._contribute(state, self._train(state))
            except Skipped:
                survivors = None
                self._report(f"{self._name}: round {state.round + 1} goes on without this site")
            state = next_state(self._contract, state, self._fetch(state, survivors))
            position = Position(state.round, state.hash(self._contract))
            self._ask("transition", position.encode(), "next")
        return state

    def _ask(self, label: str, body: bytes, expect: str) -> bytes:
        return self._link.ask(label, self._contract.run_context, body, expect)

    def _train(self, state: State) -> Trained:
        count = fixed_size(self._contract.data.size, self._job.rows)
        rows = round_slice(state.round + 1, count, self._job.rows, self._contract.seed, self._name)
        return self._job.train(state.adapter, rows, self._progress(state.round + 1))

    def _progress(self, round_number: int) -> Callable[[int, int], None]:
        told = 0.0

        def progress(step: int, steps: int) -> None:
            nonlocal told
            if step == steps or time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                self._ask("progress", Progress(round_number, step, steps).encode(), "noted")

        return progress

    def _contribute(self, state: State, trained: Trained) -> Survivors:
        """The stages of one attempt; returns the survivor tuple that this site signed."""
        context = self._context(state)
        ctx = context.digest()
        client = Client(context, self._key, os.urandom)
        adverts = self._link.send("advert", client.advertise(), ctx, "adverts")
        delivery = self._link.send("shares", client.share(adverts), ctx, "delivery")
        masked = client.mask(delivery, *self._encode(state, trained, context))
        claim = self._link.upload(lambda: _upload(client, ctx, masked), ctx, "survivors")
        signatures = self._link.send("consistency", client.confirm(claim), ctx, "signatures")
        self._link.send("release", client.release(signatures), ctx, "ack")
        return Survivors.decode(claim)

    def _context(self, state: State) -> Context:
        position = Position(state.round + 1, state.hash(self._contract))
        announce = Announce.decode(self._ask("ready", position.encode(), "announce"))
        if announce.round != position.round or not set(announce.cohort) <= self._members:
            raise SecurityError("announced cohort is not of this round and contract", culprits=["coordinator"])
        if len(announce.cohort) < self._contract.quorum:
            raise SecurityError("announced cohort is below the contract's quorum", culprits=["coordinator"])
        return round_context(self._contract, state, announce.cohort)

    def _encode(self, state: State, trained: Trained, context: Context) -> tuple[masks.Lanes, masks.Lanes]:
        """Clip, weigh and quantise the update; its rounding bits come from the run secret and the update itself."""
        update, norm_clipped = clip_to_norm(trained.adapter - state.adapter, self._contract.privacy.clip_norm)
        lattice = grid(self._contract, state, len(context.cohort))
        info = enc("mpctf-secure/rounding/v1", context.round, sha256(update.tobytes()), len(context.cohort))
        lanes, clipped = codec.encode(
            update, trained.rows / self._contract.weight_cap, lattice, Generator(hkdf(self._run_secret, info))
        )
        loss = round(trained.loss * trained.rows * codec.LOSS_SCALE)
        scalars = [trained.rows, loss, int(norm_clipped), *clipped]
        return lanes, codec.encode_scalars(scalars, len(context.cohort))

    def _fetch(self, state: State, survivors: Survivors | None) -> Sum:
        position = Position(state.round + 1, state.hash(self._contract))
        publication, chunks = self._link.fetch_sum(self._contract.run_context, position)
        # Who took part in the attempt knows whose inputs were opened; a sum of others would be another sum.
        if survivors is not None and publication.survivors != survivors.survivors:
            raise SecurityError("published sum is of other survivors than were signed", culprits=["coordinator"])
        return decode_sum(self._contract, state, publication, chunks)


def decode_sum(contract: Contract, state: State, publication: Publication, chunks: Iterator[bytes]) -> Sum:
    """The published lanes and scalars; SecurityError unless their sizes are those of the schema."""
    context = round_context(contract, state, publication.cohort)
    pieces = list(chunks)
    sizes = masks.chunk_sizes(context.ring_bits, context.dimension, context.scalars)
    if [len(piece) for piece in pieces] != sizes or not set(publication.survivors) <= set(publication.cohort):
        raise SecurityError("published sum does not have the schema's size", culprits=["coordinator"])
    lanes = np.frombuffer(b"".join(pieces[:-1]), masks.LANE_TYPES[context.ring_bits])
    return Sum(lanes, np.frombuffer(pieces[-1], "<u8"), publication.cohort, publication.survivors)


def _upload(client: Client, ctx: bytes, masked: masks.MaskedInput) -> Iterator[bytes]:
    """ctx, the chunks, then the signed digest: the same bytes however often it is read."""
    yield ctx
    hashes = []
    for chunk in masked.chunks():
        hashes.append(sha256(chunk))
        yield chunk
    yield client.declare(masks.digest(hashes))
