"""`mpctf-secure runs`: what became of the coordinator's runs, and going on with or ending one."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mpctf_secure.cli.options import Format, PassphraseFd
from mpctf_secure.cli.plan import PLAN, STOP, STOPPED, Plan
from mpctf_secure.cli.text import one_line
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.coordinator.journal import Ended, Journal
from mpctf_secure.coordinator.ledger import end_run
from mpctf_secure.database import is_in_use
from mpctf_secure.errors import EnvironmentUnfitError, InterruptedRunError, MpctfError, UsageError
from mpctf_secure.identity import keystore
from mpctf_secure.monitoring.events import COORDINATOR_KINDS, EventLog
from mpctf_secure.transport.tls import utc_now

app = typer.Typer(no_args_is_help=True, help="The coordinator's runs: list, show, resume, stop.")

RunsFolder = Annotated[Path, typer.Option("--runs", help="Where the runs' folders are.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="Its name, as `runs list` has it.")]
Output = Annotated[Format, typer.Option("--format", help="json: for programs.")]


@app.command("list")
def list_runs(runs: RunsFolder = Path("runs"), output: Output = Format.TEXT) -> None:
    """List all runs: running, interrupted, done, failed, stopped or damaged, and how far they are.

    Example: mpctf-secure runs list
    """
    found = [_describe_any(path.parent) for path in sorted(runs.glob(f"*/{PLAN}"))]
    if output is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
        return
    for run in found:
        typer.echo(one_line(f"{run['state']:11} {run['run']}  round {len(run['rounds'])} of {run['of']}{_why(run)}"))


@app.command("show")
def show_run(run: RunId, runs: RunsFolder = Path("runs"), output: Output = Format.TEXT) -> None:
    """Show a run's rounds: who contributed, who did not, at which stage and why.

    Example: mpctf-secure runs show joint-20270101-120000-1a2b
    """
    found = _describe(_folder(runs, run))
    if output is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(one_line(f"{found['run']}: {found['state']}{_why(found)}"))
    for record in found["rounds"]:
        names = ", ".join(record["survivors"]) or "nobody"
        void = f"; void: {record['void']}" if record["void"] else ""
        typer.echo(one_line(f"  round {record['round']} of {found['of']}: {names}{void}"))
        for lost in record["dropouts"]:
            typer.echo(one_line(f"    without {lost['participant']}: {lost['stage']}: {lost['reason']}"))


@app.command("resume")
def resume(
    run: RunId,
    runs: RunsFolder = Path("runs"),
    output: Annotated[Format, typer.Option("--format", help="json: the report on standard output.")] = Format.TEXT,
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Go on with an interrupted run from where it was; give participants who were away the end of one that is done.

    Example: mpctf-secure runs resume joint-20270101-120000-1a2b
    """
    from mpctf_secure.cli.start import resume_run  # noqa: PLC0415 - --help must not wait for grpc

    resume_run(_folder(runs, run).resolve(), passphrase_fd, as_json=output is Format.JSON)


@app.command("stop")
def stop(run: RunId, runs: RunsFolder = Path("runs")) -> None:
    """End a run for good, running or interrupted: its sites are told, or left to wait for the next one. No adapter.

    Example: mpctf-secure runs stop joint-20270101-120000-1a2b
    """
    from mpctf_secure.cli.local_sites import destroy_keys  # noqa: PLC0415 - --help must not wait for numpy

    folder = _folder(runs, run)
    try:
        journal = Journal(folder)
    except EnvironmentUnfitError:
        (folder / STOP).touch()
        typer.echo(f"{run} will be stopped within seconds by the process that runs it")
        return
    if journal.ended:
        raise UsageError(f"{run} has ended: {journal.ended.reason}", hint=f"mpctf-secure runs show {run}")
    plan = Plan.load(folder)
    if len(journal.finished()) == plan.proposal.rounds:
        raise UsageError(f"all rounds of {run} are done", hint=f"mpctf-secure runs resume {run} writes its adapter")
    roster = keystore.load_roster_of(plan.home, bytes.fromhex(plan.proposal.roster_hash))
    with contextlib.closing(EventLog(folder / "events.jsonl", COORDINATOR_KINDS, utc_now)) as events:
        log = RunLog(folder, roster, plan.proposal.run_id, utc_now)
        end_run(journal, log.recording(events.record), Ended(InterruptedRunError.exit_code, STOPPED))
    if not plan.config.participants.enrolled:
        destroy_keys(plan.config, folder)
    typer.echo(f"{run} is stopped")


def _folder(runs: Path, run: str) -> Path:
    folder = runs / run
    if not (folder / PLAN).is_file():
        names = ", ".join(path.parent.name for path in sorted(runs.glob(f"*/{PLAN}"))) or "none"
        raise UsageError(f"{runs}: no run {run}", hint=f"there are: {names}")
    return folder


def _describe(folder: Path) -> dict[str, Any]:
    plan = Plan.load(folder)
    finished, ended = Journal.peek(folder)
    if ended:
        state = {0: "done", InterruptedRunError.exit_code: "stopped"}.get(ended.code, "failed")
    else:
        state = "running" if is_in_use(folder) else "interrupted"
    return {
        "run": folder.name,
        "state": state,
        "reason": ended.reason if ended else None,
        "participants": list(plan.proposal.participants),
        "of": plan.proposal.rounds,
        "rounds": [row.record for row in finished],
    }


def _describe_any(folder: Path) -> dict[str, Any]:
    """One that is damaged must not hide the others."""
    try:
        return _describe(folder)
    except MpctfError as error:
        told = {"run": folder.name, "state": "damaged", "reason": error.message}
        return {**told, "participants": [], "of": 0, "rounds": []}


def _why(run: dict[str, Any]) -> str:
    return f": {run['reason']}" if run["reason"] and run["state"] in {"failed", "stopped", "damaged"} else ""
