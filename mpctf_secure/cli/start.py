"""`mpctf-secure start`: the coordinator in this process, local participants in their own, the report at the end."""

import asyncio
import contextlib
import secrets
import shutil
import signal
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Never, TypeVar

from mpctf_secure.cli import passphrase, report
from mpctf_secure.cli.compare import evaluate
from mpctf_secure.cli.local_sites import COORDINATOR, Fleet, Material, destroy_keys, hold_ceremony, keys_folder, prepare
from mpctf_secure.cli.models import builtin_config
from mpctf_secure.cli.screen import Screen
from mpctf_secure.config import load
from mpctf_secure.config.run import RunConfig
from mpctf_secure.coordinator.reception import Reception
from mpctf_secure.coordinator.runtime import Coordinator
from mpctf_secure.errors import InterruptedRunError, MpctfError, UsageError
from mpctf_secure.identity import keystore
from mpctf_secure.identity.keys import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.monitoring.events import EventLog
from mpctf_secure.quorum import default_colluders, default_quorum
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.state import State
from mpctf_secure.secagg.parameters import check_terms
from mpctf_secure.training.adapters import save_adapter_folder
from mpctf_secure.transport.server import Listener, listen
from mpctf_secure.transport.tls import OwnTls, utc_now

T = TypeVar("T")

_ENDING_SECONDS = 20.0
_ROSTER_SECONDS = 1.0


class _Parties(NamedTuple):
    """Who is in, the coordinator's own keys and their folder; a fleet and its material where participants are local."""

    roster: Roster
    keys: Keys
    home: Path
    fleet: Fleet | None
    material: Material | None


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
    proposed = _cohort_rules(config)
    beside = path.resolve().parent
    enrolled = _enrolled(config, beside, compare, passphrase_fd) if config.participants.enrolled else None
    folder = runs.resolve() / f"{config.run}-{utc_now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    screen = Screen(quiet=as_json)
    screen.line(f"run folder {folder}")
    if enrolled:
        _run_prepared(config, proposed, enrolled, folder, compare, screen, as_json=as_json)
        return
    try:
        material = prepare(config, folder, beside)
    except BaseException:
        shutil.rmtree(folder)
        raise
    try:
        parties = _local(config, folder, material, screen)
        _run_prepared(config, proposed, parties, folder, compare, screen, as_json=as_json)
    finally:
        destroy_keys(config, folder)


def _enrolled(config: RunConfig, beside: Path, compare: Sequence[str], passphrase_fd: int | None) -> _Parties:
    """Participants that come from elsewhere: all in the installed roster, as this coordinator is."""
    if compare:
        raise UsageError("--compare trains on the participants' rows", hint="only with local participants")
    home = beside / config.keys
    owner = keystore.organisation(home)
    if owner.role != "coordinator":
        raise UsageError(f"{home}: keys of {owner.name}, who is no coordinator", hint="the coordinator starts runs")
    roster = keystore.load_roster(home)
    roster.check_unexpired(utc_now())
    known = {str(member.name) for member in roster.participants}
    if strangers := sorted(set(config.participants.enrolled) - known):
        raise UsageError(
            f"participants: {', '.join(strangers)} not in roster version {roster.version}",
            hint=f"it has {', '.join(sorted(known))}",
        )
    keys = keystore.unseal(home, passphrase.read(passphrase_fd))
    return _Parties(roster, keys, home, None, None)


def _local(config: RunConfig, folder: Path, material: Material, screen: Screen) -> _Parties:
    phrase = secrets.token_hex(32).encode()
    roster, keys = hold_ceremony(config, folder, utc_now(), phrase)
    screen.line(
        f"ephemeral local ceremony: fresh keys, a roster of {len(roster.members)} that all signed, "
        f"hash {roster.hash.hex()[:16]}…"
    )
    return _Parties(roster, keys, keys_folder(folder, COORDINATOR), Fleet(config, folder, phrase), material)


def _run_prepared(
    config: RunConfig,
    proposed: tuple[int, int],
    parties: _Parties,
    folder: Path,
    compare: Sequence[str],
    screen: Screen,
    *,
    as_json: bool,
) -> None:
    roster, material = parties.roster, parties.material
    proposal = _propose(config, folder.name, roster, proposed)
    events = EventLog(folder / "events.jsonl", utc_now)
    events.listeners.append(screen.show)
    run = _Run(config, proposal, parties, folder, events)
    accuracies, failure = None, None
    try:
        with screen:
            asyncio.run(run.main())
            accuracies = evaluate(config, proposal, material, folder, compare, screen) if material else None
    except (MpctfError, KeyboardInterrupt, asyncio.CancelledError) as error:
        failure = error if isinstance(error, MpctfError) else InterruptedRunError("interrupted", hint="start it again")
        failure.culprits = tuple(roster.named(failure.culprits))
    content = report.build(run.coordinator, proposal, folder, accuracies, failure)
    report.write(folder, content)
    if run.coordinator and run.coordinator.contract:
        report.write_contract(folder, run.coordinator.contract)
    events.record("run_ended", exit_code=failure.exit_code if failure else 0)
    events.close()
    screen.summary(content, folder, as_json=as_json)
    if failure:
        raise failure


def _cohort_rules(config: RunConfig) -> tuple[int, int]:
    """(colluders, quorum), refused here if the sites would refuse them."""
    members = len(config.participants.names)
    colluders = default_colluders(members) if config.secagg.colluders == "auto" else config.secagg.colluders
    quorum = config.quorum or default_quorum(members, colluders)
    check_terms(members, colluders=colluders, quorum=quorum, allow_pair=config.secagg.allow_pair)
    return colluders, quorum


def _propose(config: RunConfig, run_id: str, roster: Roster, rules: tuple[int, int]) -> Proposal:
    return Proposal(
        run_id=run_id,
        roster_hash=roster.hash.hex(),
        participants=config.participants.names,
        colluders=rules[0],
        quorum=rules[1],
        allow_pair=config.secagg.allow_pair,
        rounds=config.rounds,
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
        self, config: RunConfig, proposal: Proposal, parties: _Parties, folder: Path, events: EventLog
    ) -> None:
        self._config, self._proposal, self._parties = config, proposal, parties
        self._folder, self._events = folder, events
        self.coordinator: Coordinator | None = None

    async def main(self) -> None:
        """Listen, start local participants, run all rounds, write the adapter; ends with no child left."""
        _cancel_on_sigterm()
        parties = self._parties
        work = self._folder / "spool"
        work.mkdir()
        self.coordinator = Coordinator(
            self._proposal, self._config.timeouts, parties.roster, parties.keys.identity, work, self._events.record
        )
        tls = OwnTls(parties.keys.identity, parties.roster.coordinator)
        listener = await listen(self._config.listen, parties.roster, tls, self.coordinator.reception)
        address = f"{self._config.listen.rpartition(':')[0]}:{listener.port}"
        try:
            self._events.record(
                "run_started", run=self._proposal.run_id, participants=self._proposal.participants, listens_at=address
            )
            with self._local_participants(address, self.coordinator.reception):
                contract, state = await _first(
                    self.coordinator.run(), self._follow_roster(listener, self.coordinator.reception)
                )
            self._save(contract, state)
            if parties.fleet:
                await asyncio.to_thread(parties.fleet.finish, _ENDING_SECONDS)
        finally:
            if parties.fleet:
                parties.fleet.end()
            await listener.stop(1.0)

    @contextlib.contextmanager
    def _local_participants(self, address: str, reception: Reception) -> Iterator[None]:
        fleet, material = self._parties.fleet, self._parties.material
        if fleet is None or material is None:
            yield
            return
        fleet.start(material, address)
        with fleet.watched(reception.lose):
            yield

    async def _follow_roster(self, listener: Listener, reception: Reception) -> Never:
        """Put a newer installed roster in force within seconds: who is not in it any more is out of the run."""
        version = self._parties.roster.version
        while True:
            await asyncio.sleep(_ROSTER_SECONDS)
            if keystore.latest_version(self._parties.home) <= version:
                continue
            roster = keystore.load_roster(self._parties.home)
            version = roster.version
            gone = [m.name for m in self._parties.roster.participants if m.identity not in roster.roles]
            self._events.record("roster_changed", version=version, hash=roster.hash.hex(), gone=gone)
            for name in gone:
                if name in self._proposal.participants:
                    reception.lose(name, f"not in roster version {version} under the identity of this run")
            listener.use(roster)

    def _save(self, contract: Contract, state: State) -> None:
        unfinished = self._folder / "adapter.part"
        save_adapter_folder(unfinished, state.adapter, contract.tensors, contract.lora, contract.base_model)
        unfinished.rename(self._folder / "adapter")


async def _first(work: Coroutine[Any, Any, T], watch: Coroutine[Any, Any, Never]) -> T:
    """The result of `work`, unless `watch` fails before."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work), asyncio.create_task(watch)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: T = done.pop().result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _cancel_on_sigterm() -> None:
    task: asyncio.Task[Any] | None = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
