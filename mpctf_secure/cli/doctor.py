"""`mpctf-secure doctor` and `join --check`: findings on a site, each with how to mend it."""

import json
from collections.abc import Mapping
from pathlib import Path

import typer

from mpctf_secure.cli.join import load_site
from mpctf_secure.cli.options import Format
from mpctf_secure.cli.text import one_line
from mpctf_secure.participant.checks import Check, examine


def examine_site(site_file: Path, checks: Mapping[str, Check], output: Format) -> None:
    """Print what was found; exit with the code of the first failure."""
    findings = examine(checks, load_site(site_file))
    if output is Format.JSON:
        typer.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(one_line(f"{finding.state:4}  {finding.check}: {finding.text}"))
            if finding.mend:
                typer.echo(one_line(f"      mend: {finding.mend}"))
    failed = [finding.code for finding in findings if finding.state == "fail"]
    raise typer.Exit(failed[0] if failed else 0)
