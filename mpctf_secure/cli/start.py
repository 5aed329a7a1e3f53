"""`mpctf-secure start`: the coordinator in this process, local participants in their own, the report at the end."""

import asyncio
import contextlib
import secrets
import shutil
import signal
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Never

import typer

from mpctf_secure.auditlog.own import OwnLog
from mpctf_secure.auditlog.own_events import KeysOpened, RunKept
from mpctf_secure.cli import local_sites, passphrase, report
from mpctf_secure.cli.compare import evaluate
from mpctf_secure.cli.dry_run import show_scripts
from mpctf_secure.cli.local_sites import COORDINATOR, Fleet, destroy_keys, hold_ceremony, keys_folder, prepare
from mpctf_secure.cli.models import builtin_config
from mpctf_secure.cli.own_log import own_log
from mpctf_secure.cli.plan import STOP, STOPPED, Plan
from mpctf_secure.cli.screen import Screen
from mpctf_secure.cli.signals import interrupt_when_told_to_end
from mpctf_secure.config import load
from mpctf_secure.config.run import RunConfig
from mpctf_secure.config.site import Compute
from mpctf_secure.config.strategies import MemoryAware
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.journal import Ended, Journal
from mpctf_secure.coordinator.ledger import end_run
from mpctf_secure.coordinator.runtime import Coordinator
from mpctf_secure.errors import EnvironmentUnfitError, InterruptedRunError, MpctfError, UsageError
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.monitoring.events import COORDINATOR_KINDS, Event, EventLog, Record
from mpctf_secure.quorum import default_colluders, default_quorum
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.state import State
from mpctf_secure.rounds.terms import check_noise
from mpctf_secure.secagg.parameters import check_terms
from mpctf_secure.training.adapters import save_adapter_folder
from mpctf_secure.transport.server import Listener, listen
from mpctf_secure.transport.tls import OwnTls, utc_now

_ENDING_SECONDS = 20.0
_LOOK_SECONDS = 1.0
_GRACE_SECONDS, _DOWNLOAD_SECONDS = 1.0, 60.0


class _Parties(NamedTuple):
    """Who is in, the coordinator's own keys and their folder; a fleet where participants are local."""

    roster: Roster
    keys: Keys
    home: Path
    fleet: Fleet | None


def start_run(
    run_file: Path | None,
    overrides: Sequence[str],
    compare: Sequence[str],
    runs: Path,
    passphrase_fd: int | None,
    *,
    as_json: bool,
) -> None:
    """The whole command; raises the MpctfError that ended the run after everything is written and every child gone."""
    path = run_file or builtin_config("demo")
    config = load.load(path, RunConfig, overrides)
    rules = _cohort_rules(config)
    beside = path.resolve().parent
    enrolled = _enrolled(config, beside / config.keys, compare, passphrase_fd) if config.participants.enrolled else None
    folder = runs.resolve() / f"{config.run}-{utc_now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    screen = Screen(quiet=as_json)
    screen.line(f"run folder {folder}")
    try:
        material = None if enrolled else prepare(config, folder, beside)
        parties = enrolled or _local(config, folder, screen)
    except BaseException:
        shutil.rmtree(folder)
        raise
    proposal = _propose(config, folder.name, parties.roster.hash, rules)
    plan = Plan(config=config, proposal=proposal, home=parties.home, material=material, compare=tuple(compare))
    plan.save(folder)
    _run(plan, parties, folder, screen, as_json=as_json)


def show_plan(run_file: Path | None, overrides: Sequence[str]) -> None:
    """What `start` would do: the terms that it would propose, and the scripts of local participants."""
    config = load.load(run_file or builtin_config("demo"), RunConfig, overrides)
    proposal = _propose(config, config.run, bytes(32), _cohort_rules(config))
    Screen(quiet=False).terms(proposal, {})
    if config.participants.enrolled:
        typer.echo("each site shows its own scripts: mpctf-secure join SITE.yaml --dry-run")
        return
    for name in proposal.participants:
        show_scripts(name, Compute(), Path(name) / "work")


def resume_run(folder: Path, passphrase_fd: int | None, *, as_json: bool) -> None:
    """Go on with a run that has not ended, as if it had never been interrupted."""
    plan = Plan.load(folder)
    screen = Screen(quiet=as_json)
    screen.line(f"run folder {folder}")
    phrase = None if plan.config.participants.enrolled else local_sites.load_phrase(folder)
    keys = keystore.unseal(plan.home, phrase or passphrase.read(passphrase_fd))
    roster = keystore.load_roster_of(plan.home, bytes.fromhex(plan.proposal.roster_hash))
    if keys.identity.public != roster.coordinator.identity:
        raise UsageError(
            f"{folder.name} began with other keys than those in force: they were rotated since",
            hint=f"no site would know this coordinator; mpctf-secure runs stop {folder.name}, and start another",
        )
    fleet = Fleet(plan.config, folder, phrase) if phrase else None
    _run(plan, _Parties(roster, keys, plan.home, fleet), folder, screen, as_json=as_json)


def _enrolled(config: RunConfig, home: Path, compare: Sequence[str], passphrase_fd: int | None) -> _Parties:
    """Participants that come from elsewhere: all in the installed roster, as this coordinator is."""
    if compare:
        raise UsageError("--compare trains on the participants' rows", hint="only with local participants")
    owner = keystore.organisation(home)
    if owner.role != "coordinator":
        raise UsageError(f"{home}: keys of {owner.name}, who is no coordinator", hint="the coordinator starts runs")
    roster = keystore.load_roster(home)
    roster.check_unexpired(utc_now())
    known = {str(member.name) for member in roster.participants}
    if strangers := sorted(set(config.participants.enrolled) - known):
        raise UsageError(
            f"participants: {', '.join(strangers)} not in roster version {roster.version}",
            hint=f"its participants are {', '.join(sorted(known))}",
        )
    return _Parties(roster, keystore.unseal(home, passphrase.read(passphrase_fd)), home, None)


def _local(config: RunConfig, folder: Path, screen: Screen) -> _Parties:
    phrase = local_sites.make_phrase(folder)
    roster, keys = hold_ceremony(config, folder, utc_now(), phrase)
    screen.line(
        f"ephemeral local ceremony: fresh keys, a roster of {len(roster.members)} that all signed, "
        f"hash {roster.hash.hex()[:16]}…"
    )
    return _Parties(roster, keys, keys_folder(folder, COORDINATOR), Fleet(config, folder, phrase))


def _run(plan: Plan, parties: _Parties, folder: Path, screen: Screen, *, as_json: bool) -> None:
    interrupt_when_told_to_end()  # until the event loop hears of it
    own = own_log(parties.home)
    own.append(KeysOpened(command="start"))
    own.sign(parties.keys.log)
    with contextlib.closing(Journal(folder)) as journal:
        log = _open_log(plan, parties, folder, journal)
        if ended := journal.ended:
            _put_away(plan, parties, log, own, ended)
            if ended.code or parties.fleet:
                raise UsageError(f"{folder.name} has ended: {ended.reason}", hint="mpctf-secure start begins another")
        events = EventLog(folder / "events.jsonl", COORDINATOR_KINDS, utc_now)
        events.listeners.append(screen.show)
        events.listeners.append(lambda event: _show_terms(event, plan.proposal, screen))
        record = log.recording(events.record)
        run = _Run(plan, parties, folder, record, journal, log)
        if ended:
            screen.line("the run is done: waiting for participants who have not heard of its end; Ctrl-C ends this")
            with contextlib.closing(events), screen:
                _until_interrupted(run, folder)
            return
        accuracies, failure = None, None
        try:
            with screen:
                _until_interrupted(run, folder)
                accuracies = evaluate(plan, folder, screen)
        except (MpctfError, KeyboardInterrupt) as error:
            failure = error if isinstance(error, MpctfError) else _interrupted(folder)
            failure.culprits = tuple(parties.roster.named(failure.culprits))
        content = report.build(run.coordinator, plan.proposal, folder, accuracies, failure)
        report.write(folder, content)
        if run.coordinator and run.coordinator.contract:
            report.write_contract(folder, run.coordinator.contract)
        if failure is None:
            end_run(journal, record, Ended(0, "done"))
        elif isinstance(failure, EnvironmentUnfitError) and journal.is_empty:  # there is nothing to go on with
            end_run(journal, record, Ended(failure.exit_code, failure.message))
        if ended := journal.ended:
            _put_away(plan, parties, log, own, ended)
        if failure and journal.ended is None:
            record("run_interrupted", exit_code=failure.exit_code, reason=failure.message)
        elif parties.fleet:
            destroy_keys(plan.config, folder)
        events.close()
        screen.summary(content, folder, as_json=as_json)
    if failure:
        raise failure


def _open_log(plan: Plan, parties: _Parties, folder: Path, journal: Journal) -> RunLog:
    """The run's audit log, which goes with its journal."""
    log = RunLog(folder, parties.roster, plan.proposal.run_id, utc_now)
    if log.is_empty and not journal.is_empty:
        raise EnvironmentUnfitError(f"{folder}: the run's audit log is gone", hint="restore the folder as it was")
    if log.ended and journal.ended is None:  # killed in between; one that ended well is gone through once more
        journal.end(Ended(log.ended, "its audit log has ended"))
    log.keep(b"", keystore.roster_files(parties.home, parties.roster.version))
    return log


def _put_away(plan: Plan, parties: _Parties, log: RunLog, own: OwnLog, ended: Ended) -> None:
    """The last checkpoint of a run's log, and into the own log what it ended with; the run's secret goes."""
    if not log.is_empty:
        closed = log.close(parties.keys.log)
        kept = RunKept(run=plan.proposal.run_id, size=closed.size, root=closed.root.hex(), exit_code=ended.code)
        own.append(kept)
        own.sign(parties.keys.log)
    keystore.destroy_run_secret(parties.home, plan.proposal.run_id)


def _show_terms(event: Event, proposal: Proposal, screen: Screen) -> None:
    if event.kind == "contract_accepted":
        screen.terms(proposal, event.fields["choices"])


def _until_interrupted(run: "_Run", folder: Path) -> None:
    try:
        asyncio.run(run.main())
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        raise _interrupted(folder) from error


def _interrupted(folder: Path) -> InterruptedRunError:
    return InterruptedRunError("interrupted", hint=f"mpctf-secure runs resume {folder.name} goes on")


def _cohort_rules(config: RunConfig) -> tuple[int, int]:
    """(colluders, quorum); what all sites would refuse is refused here."""
    members = len(config.participants.names)
    colluders = default_colluders(members) if config.secagg.colluders == "auto" else config.secagg.colluders
    quorum = config.quorum or default_quorum(members, colluders)
    check_terms(members, colluders=colluders, quorum=quorum, allow_pair=config.secagg.allow_pair)
    check_noise(_propose(config, config.run, bytes(32), (colluders, quorum)))
    return colluders, quorum


def _propose(config: RunConfig, run_id: str, roster_hash: bytes, rules: tuple[int, int]) -> Proposal:
    return Proposal(
        run_id=run_id,
        roster_hash=roster_hash.hex(),
        participants=config.participants.names,
        colluders=rules[0],
        quorum=rules[1],
        allow_pair=config.secagg.allow_pair,
        secure=config.secagg.secure,
        rounds=config.rounds + isinstance(config.data, MemoryAware),
        void_rounds=min(config.secagg.void_rounds, config.rounds - 1),
        seed=config.seed,
        base_model=config.model.base,
        lora=config.model.lora,
        training=config.training,
        data=config.data,
        aggregation=config.aggregation,
        privacy=config.privacy,
    )


class _Run:
    """The part inside the event loop."""

    def __init__(
        self, plan: Plan, parties: _Parties, folder: Path, record: Record, journal: Journal, log: RunLog
    ) -> None:
        self._plan, self._parties = plan, parties
        self._folder, self._record, self._journal, self._log = folder, record, journal, log
        self._version = parties.roster.version
        self.coordinator: Coordinator | None = None

    async def main(self) -> None:
        """Listen, start local participants, run all rounds, write the adapter; ends with no child left."""
        _cancel_on_sigterm()
        parties, config, proposal = self._parties, self._plan.config, self._plan.proposal
        work = self._folder / "spool"
        work.mkdir(exist_ok=True)
        timeouts = config.timeouts
        if parties.fleet:
            # A local participant that ended does not come back.
            timeouts = timeouts.model_copy(update={"absence": 0.0})
        secret = self._noise_secret()
        coordinator = self.coordinator = Coordinator(
            proposal, timeouts, parties.roster, parties.keys, work, self._record, self._journal, self._log, secret
        )
        tls = OwnTls(parties.keys.identity, parties.roster.coordinator)
        grace = _GRACE_SECONDS
        listener = await listen(config.listen, parties.roster, tls, coordinator.reception)
        try:
            address = f"{config.listen.rpartition(':')[0]}:{listener.port}"
            names = proposal.participants
            if not self._journal.ended:
                self._record("run_started", run=proposal.run_id, participants=names, listens_at=address)
            with self._local_participants(address, coordinator):
                coordinator.reception.look = lambda: self._look(listener, coordinator)
                try:
                    await _first(self._work(coordinator), self._watch(coordinator))
                except MpctfError as error:
                    if self._journal.ended:
                        with contextlib.suppress(asyncio.CancelledError):  # what ended the run stays the reason
                            await coordinator.dismiss()
                    if parties.fleet and coordinator.contract is None and not isinstance(error, InterruptedRunError):
                        await asyncio.to_thread(parties.fleet.finish, _GRACE_SECONDS, _ENDING_SECONDS)
                        if failures := parties.fleet.failures():  # they are the operator's own mistakes
                            raise failures[0] from error
                    raise
                grace = _DOWNLOAD_SECONDS
            if parties.fleet:
                await asyncio.to_thread(parties.fleet.finish, _ENDING_SECONDS)
        finally:
            if parties.fleet:
                parties.fleet.end()
            await listener.stop(grace)

    def _noise_secret(self) -> bytes:
        """Of a run in which the coordinator adds the noise: drawn once, as another would add other noise to a sum that
        some have seen already."""
        home, proposal = self._parties.home, self._plan.proposal
        if proposal.privacy.against != "participants" or self._journal.ended:
            return b""
        if not self._journal.is_empty and not keystore.has_run_secret(home, proposal.run_id):
            raise EnvironmentUnfitError(
                f"{home}: the secret of run {proposal.run_id} is gone, and with it the noise of its sums",
                hint=f"restore the folder, or mpctf-secure runs stop {proposal.run_id}",
            )
        return keystore.run_secret(home, proposal.run_id)

    async def _work(self, coordinator: Coordinator) -> None:
        contract, state = await coordinator.run()
        if self._journal.ended is None:
            await asyncio.to_thread(self._save, contract, state)
        stop = self._folder / STOP
        await coordinator.farewell(stop.exists)
        stop.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _local_participants(self, address: str, coordinator: Coordinator) -> Iterator[None]:
        fleet, material = self._parties.fleet, self._plan.material
        if fleet is None or material is None or coordinator.is_done:
            yield
            return
        fleet.start(material, address)
        with fleet.watched(coordinator.reception.lose):
            yield

    async def _watch(self, coordinator: Coordinator) -> Never:
        """Within seconds: put a newer installed roster in force, and end the run if `runs stop` asks for it."""
        while True:
            if (self._folder / STOP).exists() and not coordinator.is_done:
                coordinator.stop(STOPPED)
                raise InterruptedRunError(STOPPED, hint="mpctf-secure start begins another")
            if coordinator.reception.live.is_set():  # a ban has its place in the journal
                coordinator.reception.look()
            await asyncio.sleep(_LOOK_SECONDS)

    def _look(self, listener: Listener, coordinator: Coordinator) -> None:
        """Whoever is not in the newest roster any more, under the identity of this run, is out of the run."""
        if keystore.latest_version(self._parties.home) <= self._version:
            return
        roster = keystore.load_roster(self._parties.home)
        gone = [m for m in self._parties.roster.participants if m not in roster.members]
        names = [member.name for member in gone]
        self._record("roster_changed", version=roster.version, hash=roster.hash.hex(), gone=names)
        for member in gone:
            if member.name in self._plan.proposal.participants:
                coordinator.reception.ban(member.identity, f"not in roster version {roster.version}")
        listener.use(roster)
        self._version = roster.version

    def _save(self, contract: Contract, state: State) -> None:
        how = (contract.tensors, contract.lora, contract.base_model)
        weights = save_adapter_folder(self._folder / "adapter", state.adapter, *how)
        self._record("model_exported", adapter=weights.hex())


async def _first(work: Coroutine[Any, Any, None], watch: Coroutine[Any, Any, Never]) -> None:
    """To the end of `work`, unless `watch` fails before."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(watch)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        next(task for task in reversed(tasks) if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _cancel_on_sigterm() -> None:
    task: asyncio.Task[Any] | None = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
