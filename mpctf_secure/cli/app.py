"""The verbs, and the one place where errors become two lines and an exit code."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from mpctf_secure import __version__
from mpctf_secure.attestation.hardening import harden, read_back
from mpctf_secure.cli import enroll, privacy
from mpctf_secure.cli import runs as runs_commands
from mpctf_secure.cli.audit import commands as audit
from mpctf_secure.cli.options import Format, PassphraseFd
from mpctf_secure.cli.text import one_line
from mpctf_secure.errors import EnvironmentUnfitError, InterruptedRunError, MpctfError, UsageError

app = typer.Typer(
    name="mpctf-secure",
    help="Fine-tune one language model across organisations whose updates nobody sees.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Compare(StrEnum):
    """What the federated adapter is measured against, besides the base model."""

    ALONE = "alone"
    CENTRALISED = "centralised"


app.add_typer(enroll.app, name="enroll")
app.add_typer(runs_commands.app, name="runs")
app.add_typer(privacy.app, name="privacy")
app.add_typer(audit.app, name="audit")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere in the line.")
    ] = False,
) -> None:
    harden()


@app.command()
def start(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run file; without one, the built-in demo run.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field of the run file.")
    ] = None,
    compare: Annotated[
        list[Compare] | None,
        typer.Option(help="Also train this way on the same rows and steps, for the table at the end."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path("runs"),
    output: Annotated[Format, typer.Option("--format", help="json: the report on standard output.")] = Format.TEXT,
    passphrase_fd: PassphraseFd = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the terms, and every script of local participants.")
    ] = False,
) -> None:
    """Start a run and its local participants, and wait for its end.

    Example: mpctf-secure start configs/smoke.yaml --set rounds=2
    """
    from mpctf_secure.cli.start import show_plan, start_run  # noqa: PLC0415 - --help must not wait for grpc

    if dry_run:
        show_plan(run_file, overrides or [])
        return
    start_run(
        run_file,
        overrides or [],
        [str(item) for item in compare or []],
        runs,
        passphrase_fd,
        as_json=output is Format.JSON,
    )


@app.command()
def join(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site file.")],
    passphrase_fd: PassphraseFd = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether this site is fit, with a training step.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", help="End with the run instead of waiting for the next.")] = False,
    accept_data_change: Annotated[
        bool, typer.Option(help="The rows are others than those the privacy ledger was charged for; it stays as it is.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the scripts that would start training on the nodes.")
    ] = False,
) -> None:
    """Wait for runs, and take part as the participant that a site file describes, until interrupted.

    Example: mpctf-secure join site.yaml
    """
    if check:
        from mpctf_secure.cli.doctor import examine_site  # noqa: PLC0415 - as below
        from mpctf_secure.participant.checks import TRIAL  # noqa: PLC0415

        examine_site(site_file, TRIAL, Format.TEXT)
    from mpctf_secure.cli.join import join_run, load_site  # noqa: PLC0415 - --help must not wait for grpc

    if dry_run:
        from mpctf_secure.cli.dry_run import show_scripts  # noqa: PLC0415 - as above

        site = load_site(site_file)
        show_scripts(site_file.name, site.compute, site.work)
        return
    join_run(site_file, passphrase_fd, once=once, accept_change=accept_data_change)


@app.command()
def doctor(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site file.")],
    output: Annotated[Format, typer.Option("--format", help="json: the findings as a list.")] = Format.TEXT,
) -> None:
    """Look whether this site is fit for a run; every finding says how to mend it.

    Example: mpctf-secure doctor site.yaml
    """
    from mpctf_secure.cli.doctor import examine_site  # noqa: PLC0415 - --help must not wait for grpc
    from mpctf_secure.participant.checks import CHECKS  # noqa: PLC0415

    examine_site(site_file, CHECKS, output)


@app.command("harden")
def show_hardening(
    output: Annotated[Format, typer.Option("--format", help="json: a list.")] = Format.TEXT,
) -> None:
    """Show how this program's processes are protected, as the kernel reports it.

    Example: mpctf-secure harden
    """
    protections = read_back()
    if output is Format.JSON:
        typer.echo(json.dumps([protection._asdict() for protection in protections], indent=2))
        return
    for name, in_force, against in protections:
        typer.echo(f"{'on ' if in_force else 'OFF'}  {name}: against {against}")


_TYPER_INTERRUPTED = 130


def main() -> None:
    """Run a command; every mistake becomes an error: line, a hint: line and its exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it logs of handshakes reaches people as our errors
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(args=arguments or ["--help"], prog_name="mpctf-secure", standalone_mode=False)
        if code == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except (MpctfError, KeyboardInterrupt, EOFError, OSError, TyperException, typer.Abort) as error:
        if "--debug" in sys.argv:
            raise
        ours = _as_ours(error)
        print_error(ours)
        sys.exit(ours.exit_code)


def _as_ours(error: BaseException) -> MpctfError:
    match error:
        case MpctfError():
            return error
        case TyperException():
            said = error.format_message().partition("\n")[0].replace("Value error, ", "") or "no command"
            command = getattr(getattr(error, "ctx", None), "command_path", "mpctf-secure")
            return UsageError(said, hint=f"{command} --help")
        case OSError():
            return EnvironmentUnfitError(
                f"{error.filename or 'system'}: {error.strerror}", hint="check disk and rights"
            )
    return InterruptedRunError("interrupted", hint="the same command again")


def print_error(error: MpctfError) -> None:
    """One error: line, one hint: line, on standard error."""
    unnamed = [culprit for culprit in error.culprits if culprit not in error.message]
    blame = f" (culprit: {', '.join(unnamed)})" if unnamed else ""
    typer.echo(f"error: {one_line(error.message + blame)}", err=True)
    typer.echo(f"hint: {one_line(error.hint or 'mpctf-secure --help; --debug shows the traceback')}", err=True)
