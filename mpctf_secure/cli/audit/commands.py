"""`mpctf-secure audit`: what logs prove, show, and hand on; all of it offline."""

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mpctf_secure.cli.options import Format
from mpctf_secure.cli.text import one_line
from mpctf_secure.errors import SecurityError, UsageError

app = typer.Typer(no_args_is_help=True, help="Audit logs: verify, show, prove, export, pack, prune.")

LogFolder = Annotated[Path, typer.Argument(metavar="LOG", help="An audit folder: of a run, or one of keys/audit/.")]
_HASH = re.compile("[0-9a-f]{64}")
Output = Annotated[Format, typer.Option("--format", help="json: for programs.")]


@app.command()
def verify(
    logs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[LOG …]", help="Audit folders; two of one run, also with each other; a proof; fork.json."
        ),
    ] = None,
    roster: Annotated[
        Path | None, typer.Option(help="A roster that you have from elsewhere: the log's has to be the same.")
    ] = None,
    site: Annotated[
        Path | None, typer.Option(metavar="SITE.yaml", help="This site's own log, and all runs' logs against it.")
    ] = None,
    output: Output = Format.TEXT,
) -> None:
    """Check logs offline: signatures, witnesses, order, and that nobody has changed them since.

    Example: mpctf-secure audit verify runs/joint-20270101-120000-1a2b/audit --roster roster-1.json
    """
    from mpctf_secure.cli.audit import verdict  # noqa: PLC0415 - --help must not wait for numpy

    if not logs and site is None:
        raise UsageError(
            "name an audit folder, a proof, fork.json, or --site SITE.yaml", hint="mpctf-secure audit verify --help"
        )
    found = [*verdict.of_logs(logs or [], roster), *(verdict.of_site(site, given=roster) if site else [])]
    if output is Format.JSON:
        typer.echo(json.dumps([one.fields() for one in found], indent=2))
    else:
        for one in found:
            typer.echo(one_line(one.log))
            for line in [*one.statements, *(f"NOT RIGHT: {doubt}" for doubt in one.doubts)]:
                typer.echo(one_line(f"  {line}"))
    doubts = [f"{one.log}: {doubt}" for one in found for doubt in one.doubts]
    if doubts:
        raise SecurityError(doubts[0], hint="who is right? each side's signatures decide: docs/audit.md")


@app.command()
def show(
    log: LogFolder,
    kind: Annotated[str | None, typer.Option(help="Only leaves of this kind.")] = None,
    output: Output = Format.TEXT,
) -> None:
    """Show what a log says, a leaf a line; `verify` says whether that is to be believed.

    Example: mpctf-secure audit show runs/joint-20270101-120000-1a2b/audit --kind dropout
    """
    from mpctf_secure.cli.audit.export import leaves  # noqa: PLC0415 - as above

    found = list(leaves(log))
    if kind and kind not in (kinds := sorted({leaf["kind"] for _, leaf in found})):
        raise UsageError(f"--kind: no {kind} in {log}", hint=f"there are {', '.join(kinds)}")
    shown = [(number, leaf) for number, leaf in found if kind in {None, leaf["kind"]}]
    if output is Format.JSON:
        typer.echo(json.dumps([{"leaf": number, **leaf} for number, leaf in shown], indent=2))
        return
    for number, leaf in shown:
        fields = ", ".join(f"{name} {_short(value)}" for name, value in leaf.items() if name not in {"kind", "time"})
        typer.echo(one_line(f"{number:6} {leaf['time']} {leaf['kind']}: {fields}"))


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:16]}…" if _HASH.fullmatch(text) else text


@app.command()
def prove(
    log: LogFolder,
    leaf: Annotated[int, typer.Argument(metavar="LEAF", min=0, help="Its number, as `show` has it.")],
    since: Annotated[
        int | None, typer.Option(metavar="SIZE", min=1, help="Also that the log continues its first SIZE leaves.")
    ] = None,
) -> None:
    """Write a proof, as JSON, that a leaf is below the newest checkpoint: who has that and a roster needs no more.

    Example: mpctf-secure audit prove runs/joint-20270101-120000-1a2b/audit 5 > proof.json
    """
    from mpctf_secure.cli.audit import export as made  # noqa: PLC0415 - as above

    typer.echo(made.prove(log, [leaf], since).encode().decode())


class ExportFormat(StrEnum):
    """What other programs read."""

    JSONL = "jsonl"
    CEF = "cef"
    OCSF = "ocsf"


@app.command()
def export(
    log: LogFolder,
    output: Annotated[
        ExportFormat, typer.Option("--format", help="JSON lines, ArcSight CEF, or OCSF base events.")
    ] = ExportFormat.JSONL,
) -> None:
    """Write a log's leaves to standard output, for a SIEM.

    Example: mpctf-secure audit export runs/joint-20270101-120000-1a2b/audit --format cef
    """
    from mpctf_secure.cli.audit.export import exported  # noqa: PLC0415 - as above

    for line in exported(log, str(output)):
        typer.echo(line)


@app.command()
def prune(
    days: Annotated[
        int, typer.Option("--older-than", min=183, metavar="DAYS", help="Counted from a log's last leaf; 183 at least.")
    ],
    keys: Annotated[Path, typer.Option(help="The keys folder, whose own logs are looked through.")] = Path("keys"),
    runs: Annotated[
        Path | None, typer.Option(help="Also the logs of runs in this folder: runs/, or a site's work/runs/.")
    ] = None,
) -> None:
    """Delete logs that nobody has to keep any longer; what each ended with stays in the own log.

    Example: mpctf-secure audit prune --older-than 2200 --runs work/runs
    """
    from mpctf_secure.cli.audit.prune import prune_logs  # noqa: PLC0415 - as above

    for origin in prune_logs(keys, runs, days):
        typer.echo(one_line(f"deleted {origin}"))


@app.command()
def pack(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site file.")],
    run: Annotated[str, typer.Argument(metavar="RUN", help="Its name.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.zip", help="A new file.")],
) -> None:
    """Put all evidence of a run that this site has into one archive, with how to check it without this program.

    Example: mpctf-secure audit pack site.yaml joint-20270101-120000-1a2b evidence.zip
    """
    from mpctf_secure.cli.audit.pack import write_pack  # noqa: PLC0415 - as above

    names, doubts = write_pack(site_file, run, target)
    typer.echo(f"{target}: {len(names)} files")
    for doubt in doubts:
        typer.echo(one_line(f"NOT RIGHT: {doubt}"))
