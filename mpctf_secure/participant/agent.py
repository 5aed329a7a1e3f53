"""A site's agent: dials out, waits for runs, checks each before it agrees, and takes part from where it was."""

import contextlib
import functools
import math
import threading
import time
from collections.abc import Iterator
from typing import Never

from mpctf_secure import files
from mpctf_secure.attestation.measurement import measure_package
from mpctf_secure.auditlog.own import OwnLog
from mpctf_secure.auditlog.own_events import Charged, RunAccepted, RunDone, RunRefused
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.config.strategies import MemoryAware
from mpctf_secure.config.training import Training
from mpctf_secure.errors import BudgetSpentError, InterruptedRunError, MpctfError, SecurityError, UsageError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.monitoring.events import SITE_KINDS, EventLog, Listener, Record
from mpctf_secure.participant.charging import Charging, Rows, record_noise
from mpctf_secure.participant.link import Link
from mpctf_secure.participant.members import Members
from mpctf_secure.participant.policy import (
    UnsuitableError,
    check_contract,
    check_packing,
    check_proposal,
    check_volume,
    told_size,
)
from mpctf_secure.participant.rounds import Participant
from mpctf_secure.participant.sharing import ResourceSharing
from mpctf_secure.participant.store import Store, Terms
from mpctf_secure.participant.witness import Witness
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Facts, ModelHashes, TrainingFault
from mpctf_secure.rounds.state import State
from mpctf_secure.training.adapters import save_adapter_folder
from mpctf_secure.training.faults import Fault
from mpctf_secure.training.launch.job import Job
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.rows import load_rows
from mpctf_secure.training.spec import JobSpec
from mpctf_secure.transport.client import Channel
from mpctf_secure.transport.tls import OwnTls, utc_now

_BETWEEN_RUNS_SECONDS = 5.0
_BEAT_SECONDS = 15.0
_STOPS = "it stops"
DONE = "done"


def join(site: SiteConfig, keys: Keys, own: OwnLog, listener: Listener, accepted_data: bytes = b"") -> None:
    """Take part in one run; returns when it is over. Errors name culprits by their names in the roster.

    `accepted_data`: hash of a data file that may have other rows than the privacy ledger was charged for last.
    """
    with _opened(site, listener) as (store, record):
        _Agent(site, keys, store, record, own, site.patience, {}, accepted_data).run_once()


def serve(site: SiteConfig, keys: Keys, own: OwnLog, listener: Listener, accepted_data: bytes = b"") -> Never:
    """Take part in one run after the other, until a signal or an error that time cannot mend."""
    refused = dict[str, bytes]()
    patience = site.patience
    with _opened(site, listener) as (store, record):
        while True:
            agent = _Agent(site, keys, store, record, own, patience, refused, accepted_data)
            try:
                agent.run_once()
            except InterruptedRunError as error:
                record("run_left", reason=error.message)
            except (VetoError, UnsuitableError, BudgetSpentError):
                pass  # it is recorded, and the coordinator's operator was told; another run may fit
            except SecurityError:
                if not agent.roster_is_old:
                    raise
            patience = math.inf  # whoever has answered once is waited for without end
            time.sleep(_BETWEEN_RUNS_SECONDS)


@contextlib.contextmanager
def _opened(site: SiteConfig, listener: Listener) -> Iterator[tuple[Store, Record]]:
    """What this site keeps on disk; the store's lock is held before the events are touched."""
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(Store(site.work)))
        events = stack.enter_context(contextlib.closing(EventLog(site.work / "events.jsonl", SITE_KINDS, utc_now)))
        events.listeners.append(listener)
        yield store, events.record


class VetoError(SecurityError):
    """This site does not take part in the run that it was asked to, and has said so."""


class _Agent:
    """One site, from its first call to the end of one run."""

    def __init__(
        self,
        site: SiteConfig,
        keys: Keys,
        store: Store,
        record: Record,
        own: OwnLog,
        patience: float,
        refused: dict[str, bytes],
        accepted_data: bytes,
    ) -> None:
        self._site, self._keys, self._store, self._record = site, keys, store, record
        self._own, self._patience, self._refused = own, patience, refused
        self._accepted_data = accepted_data
        self._run_context: bytes | None = None
        self._roster = keystore.load_roster(site.keys)
        self._roster.check_unexpired(utc_now())
        self._me = self._roster.by_identity(keys.identity.public)

    @property
    def roster_is_old(self) -> bool:
        """Whether a newer one was installed since this agent began."""
        return keystore.latest_version(self._site.keys) > self._roster.version

    def run_once(self) -> None:
        """Wait for a run, and take part in it to its end."""
        self._close_finished_runs()
        load_rows(self._site.data)  # a bad row is found before anybody waits for us
        # Every node's first process takes the model's hash again, from the files themselves.
        model, data_hash = hash_model(self._site.model, self._site.work / "model.sha256"), files.digest(self._site.data)
        tls = OwnTls(self._keys.identity, self._me)

        def note_break(reason: str) -> None:
            self._record("no_connection", reason=reason)

        with contextlib.closing(
            Channel(self._site.coordinator, self._roster, tls, self._patience, note_break)
        ) as channel:
            link = Link(channel, self._keys.identity, self._roster.coordinator)
            try:
                proposal = self._hear_proposal(link, channel)
                self._take_part(link, proposal, model, data_hash)
            except MpctfError as error:
                error.culprits = tuple(self._roster.named(error.culprits))
                raise
            finally:
                self._own.sign(self._keys.log)

    def _hear_proposal(self, link: Link, channel: Channel) -> Proposal:
        """What is on; waits for it. A coordinator that has answered once is waited for without end."""
        while True:
            proposal = Proposal.decode(link.ask("hello", self._roster.hash, b"", "proposal"))
            channel.patience = math.inf
            if proposal.run_id in self._refused:  # a coordinator that was started again may not know it any more
                link.tell("veto", bytes.fromhex(proposal.roster_hash), self._refused[proposal.run_id])
            elif self._store.ended(proposal.run_id) is None:
                return proposal
            time.sleep(_BETWEEN_RUNS_SECONDS)

    def _take_part(self, link: Link, proposal: Proposal, model: ModelHashes, data_hash: bytes) -> None:
        name, run_id = self._me.name, proposal.run_id
        # A run that this site is in goes on under the roster with which it began.
        known = self._store.knows(run_id)
        roster = (
            keystore.load_roster_of(self._site.keys, bytes.fromhex(proposal.roster_hash)) if known else self._roster
        )
        with self._vetoing(link, proposal):
            check_proposal(proposal, self._site.policy, roster, name)
            check_packing(proposal, self._site.compute)
            training = proposal.training.with_choice(self._site.training)
            accepted = self._store.terms(run_id)
            if accepted:
                self._check_unchanged(accepted, data_hash)
            elif keystore.has_run_secret(self._site.keys, run_id):
                raise SecurityError(
                    f"the work folder has forgotten run {run_id}",
                    hint="restore it: who forgets may join a round twice",
                )
        self._record("run_joined", run=run_id)
        with contextlib.closing(self._job(link, proposal, training, (model.whole, data_hash))) as job:
            self._record("job_started", rows=job.rows, truncated=job.truncated, hardware=job.hardware_text)
            with self._stopping(link, proposal):
                terms = accepted or Terms(
                    data_hash=data_hash.hex(),
                    choice=self._site.training,
                    memory=job.memory,
                    own_clip_norm=self._site.policy.own_clip_norm,
                    dpsgd=record_noise(proposal, self._site.policy, training, job.rows),
                )
            facts = self._facts(proposal, model, job)
            contract = Contract.decode(link.ask("facts", roster.hash, facts.encode(), "contract"))
            with self._vetoing(link, proposal):
                check_contract(contract, proposal, facts)
                check_volume(contract, training, self._site.policy, job.rows)
            with self._stopping(link, proposal):
                accept_change = data_hash == self._accepted_data
                rows = Rows(data_hash.hex(), job.rows + job.held_out)
                charging = Charging(self._site, contract, rows, terms.dpsgd, accept_change=accept_change)
                charging.check_run()
            self._store.accept(contract, terms)
            self._record("contract_accepted", run=run_id, contract_hash=contract.hash.hex())
            self._run_context = contract.run_context
            members = Members(self._site.keys, roster, contract.participants)
            witness = self._accept(link, roster, contract, members)
            with _heart(link, contract):
                state = Participant(
                    name,
                    link,
                    self._keys.identity,
                    contract,
                    job,
                    members,
                    self._site.keys,
                    self._store,
                    self._record,
                    terms,
                    functools.partial(self._charge, charging, run_id),
                    witness,
                ).run()
        self._finish(contract, state)

    def _accept(self, link: Link, roster: Roster, contract: Contract, members: Members) -> Witness:
        """Sign the contract, once the log that begins with it is here, and see that a quorum has."""
        run, hashes = contract.run_id, {"roster_hash": contract.roster_hash, "contract_hash": contract.hash.hex()}
        if self._own.history.find("run_accepted", run) is None:  # under another policy it is the same acceptance
            policy = sha256(self._site.policy.model_dump_json().encode()).hex()
            self._own.append(RunAccepted(run=run, **hashes, policy=policy))
        folder, rosters = self._store.folder(run), keystore.roster_files(self._site.keys, roster.version)
        witness = Witness(self._me.name, link, roster, contract, self._keys.log, self._own, folder, rosters)
        body = witness.witness(0, self._site.training.encode(), None)
        certificate = link.ask("accept", contract.run_context, body, "go")
        witness.keep_certificate(witness.check_certificate(0, certificate, None, members.identities))
        return witness

    def _charge(self, charging: Charging, run: str, number: int, content: bytes) -> None:
        """In the privacy ledger, and what the ledger is then in the own log, before anything leaves."""
        charges, last = charging.charge(number, content)
        self._own.append(Charged(run=run, round=number, charges=charges, ledger=last))

    def _job(self, link: Link, proposal: Proposal, training: Training, hashes: tuple[bytes, bytes]) -> Job:
        spec = JobSpec.of(
            self._site,
            hashes,
            proposal.lora,
            training,
            proposal.aggregation,
            proposal.seed,
            self._me.name,
            proposal.privacy.record_dpsgd,
        )
        tell_resources = functools.partial(self._tell_resources, link, proposal)
        sharing = ResourceSharing(self._site.policy.share_resources, self._record, tell_resources)
        return Job(spec, self._site, functools.partial(self._note_fault, link, proposal), sharing.note)

    def _facts(self, proposal: Proposal, model: ModelHashes, job: Job) -> Facts:
        return Facts(
            measure_package(),
            model,
            job.schema,
            size=told_size(proposal.data, self._site.policy, job.rows),
            memory=job.memory_kind if isinstance(proposal.data, MemoryAware) else "",
        )

    def _check_unchanged(self, accepted: Terms, data_hash: bytes) -> None:
        """The coordinator's operator hears of it too, and of no path here."""
        if accepted.data_hash != data_hash.hex():
            changed = "data: the file has"
        elif accepted.choice != self._site.training:
            changed = (
                f"training: {self._site.training.encode().decode()}, before {accepted.choice.encode().decode()}: it has"
            )
        else:
            return
        raise UsageError(
            f"{changed} changed since this site accepted the run", hint="put the old one back, or leave the run"
        )

    def _note_fault(self, link: Link, proposal: Proposal, fault: Fault, again: bool) -> None:
        """The log stays here, for it may hold prompts: the coordinator hears what failed and where.

        Not where noise is to hide even how training goes.
        """
        tells = not proposal.privacy.hides_training
        self._record("job_failed", **fault._asdict(), again=again)
        known = TrainingFault(fault.code, fault.node, fault.rank, again)
        with contextlib.suppress(MpctfError):  # the failure is what this site ends with
            if self._run_context and tells:
                link.tell("fault", self._run_context, known.encode())
            elif not again and not self._run_context:
                reason = f"its training job does not start: {known.code}, node {known.node}, rank {known.rank}"
                link.tell("veto", bytes.fromhex(proposal.roster_hash), (reason if tells else _STOPS).encode())

    def _tell_resources(self, link: Link, proposal: Proposal, body: bytes) -> None:
        if self._run_context and not proposal.privacy.hides_training:  # there is a context when a job trains
            link.tell("resources", self._run_context, body)

    def _close_finished_runs(self) -> None:
        """Whose last state a quorum had signed when this site was killed."""
        for contract in self._store.open_runs():
            state, certificate = self._store.last_state(contract)
            if certificate and state.round == contract.rounds:
                self._finish(contract, state)

    def _finish(self, contract: Contract, state: State) -> None:
        """Write the adapter, which this site computed itself; only then the run has ended here."""
        folder = self._store.folder(contract.run_id) / "adapter"
        how = (contract.tensors, contract.lora, contract.base_model)
        weights = save_adapter_folder(folder, state.adapter, *how)
        keystore.destroy_run_secret(self._site.keys, contract.run_id)
        self._own.append(RunDone(run=contract.run_id, adapter=weights.hex()))
        self._own.sign(self._keys.log)
        self._record("run_done", run=contract.run_id, adapter=str(folder))
        self._store.end(contract.run_id, DONE)

    @contextlib.contextmanager
    def _vetoing(self, link: Link, proposal: Proposal) -> Iterator[None]:
        """What this site does not take part in is said to the coordinator's operator before the run is left."""
        try:
            yield
        except (SecurityError, UsageError) as error:
            self._refuse(link, proposal, error, f"{error.message}; {error.hint}")
            if isinstance(error, UsageError):
                raise
            raise VetoError(error.message, hint=error.hint, culprits=error.culprits) from error

    @contextlib.contextmanager
    def _stopping(self, link: Link, proposal: Proposal) -> Iterator[None]:
        """As above, but what was spent on which rows is nobody else's business: it is said that this site stops."""
        try:
            yield
        except (SecurityError, UsageError, BudgetSpentError) as error:
            self._refuse(link, proposal, error, _STOPS)
            raise

    def _refuse(self, link: Link, proposal: Proposal, error: MpctfError, said: str) -> None:
        self._own.append(RunRefused(run=proposal.run_id))
        self._record("run_refused", run=proposal.run_id, reason=error.message, hint=error.hint)
        self._refused[proposal.run_id] = said.encode()
        with contextlib.suppress(InterruptedRunError):
            link.ask("veto", bytes.fromhex(proposal.roster_hash), self._refused[proposal.run_id], "noted")


@contextlib.contextmanager
def _heart(link: Link, contract: Contract) -> Iterator[None]:
    """Say now and then that this site is there: between its calls it may train for hours."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_BEAT_SECONDS):
            with contextlib.suppress(MpctfError):  # the main thread's calls hear of it too
                link.tell("alive", contract.run_context, b"")

    thread = threading.Thread(target=beat, name="heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
