"""`mpctf-secure start`: the coordinator in this process, local participants in their own, the report at the end."""

import asyncio
import datetime
import secrets
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpctf_secure.cli import report
from mpctf_secure.cli.compare import evaluate
from mpctf_secure.cli.local_sites import Fleet, Material, destroy_keys, hold_ceremony, prepare
from mpctf_secure.cli.models import builtin_config
from mpctf_secure.cli.screen import Screen
from mpctf_secure.config import load
from mpctf_secure.config.run import RunConfig
from mpctf_secure.coordinator.runtime import Coordinator
from mpctf_secure.errors import InterruptedRunError, MpctfError
from mpctf_secure.identity.keystore import Keys
from mpctf_secure.identity.roster import Roster
from mpctf_secure.monitoring.events import EventLog
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.state import State
from mpctf_secure.secagg.parameters import check_terms, default_colluders, default_quorum
from mpctf_secure.training.adapters import save_adapter_folder
from mpctf_secure.transport.server import listen

_ENDING_SECONDS = 20.0


def start_run(
    run_file: Path | None, overrides: Sequence[str], compare: Sequence[str], runs: Path, *, as_json: bool
) -> None:
    """The whole command; raises the MpctfError that ended the run after everything is written and every child gone."""
    path = run_file or builtin_config("demo")
    config = load.load(path, RunConfig, overrides)
    proposed = _cohort_rules(config)
    now = datetime.datetime.now(datetime.UTC)
    folder = runs.resolve() / f"{config.run}-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    screen = Screen(quiet=as_json)
    screen.line(f"run folder {folder}")
    try:
        material = prepare(config, folder, path.resolve().parent)
    except BaseException:
        shutil.rmtree(folder)
        raise
    try:
        _run_prepared(config, proposed, material, folder, compare, screen, as_json=as_json)
    finally:
        destroy_keys(config, folder)


def _run_prepared(
    config: RunConfig,
    proposed: tuple[int, int],
    material: Material,
    folder: Path,
    compare: Sequence[str],
    screen: Screen,
    *,
    as_json: bool,
) -> None:
    roster, keys = hold_ceremony(config, folder, datetime.datetime.now(datetime.UTC))
    screen.line(
        f"ephemeral local ceremony: fresh keys, a roster of {len(roster.members)} that all signed, "
        f"hash {roster.hash.hex()[:16]}…"
    )
    proposal = _propose(config, folder.name, roster, proposed)
    events = EventLog(folder / "events.jsonl", lambda: datetime.datetime.now(datetime.UTC))
    events.listeners.append(screen.show)
    run = _Run(config, proposal, material, roster, keys, folder, events)
    accuracies, failure = None, None
    try:
        with screen:
            asyncio.run(run.main())
            accuracies = evaluate(config, proposal, material, folder, compare, screen)
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
    members = config.participants.local
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
        self,
        config: RunConfig,
        proposal: Proposal,
        material: Material,
        roster: Roster,
        keys: Keys,
        folder: Path,
        events: EventLog,
    ) -> None:
        self._config, self._proposal, self._material = config, proposal, material
        self._roster, self._keys, self._folder, self._events = roster, keys, folder, events
        self.coordinator: Coordinator | None = None

    async def main(self) -> None:
        """Listen, start the participants, run all rounds, write the adapter; ends with no child left."""
        _cancel_on_sigterm()
        fleet = Fleet(self._config, self._folder)
        work = self._folder / "spool"
        work.mkdir()
        self.coordinator = Coordinator(
            self._proposal, self._config.timeouts, self._roster, self._keys.identity, work, self._events.record
        )
        listener = await listen(self._config.listen, self._roster, self._keys, self.coordinator.reception)
        try:
            host = self._config.listen.partition(":")[0]
            fleet.start(self._material, f"{host}:{listener.port}")
            self._events.record("run_started", run=self._proposal.run_id, participants=self._proposal.participants)
            with fleet.watched(self.coordinator.reception.lose):
                contract, state = await self.coordinator.run()
            self._save(contract, state)
            await asyncio.to_thread(fleet.finish, _ENDING_SECONDS)
        finally:
            fleet.end()
            await listener.stop(1.0)

    def _save(self, contract: Contract, state: State) -> None:
        unfinished = self._folder / "adapter.part"
        save_adapter_folder(unfinished, state.adapter, contract.tensors, contract.lora, contract.base_model)
        unfinished.rename(self._folder / "adapter")


def _cancel_on_sigterm() -> None:
    task: asyncio.Task[Any] | None = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
