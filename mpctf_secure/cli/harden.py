"""`mpctf-secure harden`: the protection that is really in force in this process, as in every other command's."""

import json

import typer

from mpctf_secure.attestation.hardening import read_back
from mpctf_secure.cli.options import Format


def show(output: Format) -> None:
    """Print what the kernel says."""
    protections = read_back()
    if output is Format.JSON:
        typer.echo(json.dumps([protection._asdict() for protection in protections], indent=2))
        return
    for name, in_force, against in protections:
        typer.echo(f"{'on ' if in_force else 'OFF'}  {name}: against {against}")
