"""What would be started, without starting anything: every generated script, behind the command that reads it."""

import shlex
from pathlib import Path

import typer

from mpctf_secure.cli.text import one_line
from mpctf_secure.config.site import Compute
from mpctf_secure.training.launch.job import gpus_here
from mpctf_secure.training.launch.launchers import launches

_SOCKET = Path("/tmp/mpctf-…/job.sock")  # noqa: S108  # stands for one in a folder that is made at the start
_TICKET = "agent.tls"  # stands for one whose name is made at the start


def show_scripts(name: str, compute: Compute, work: Path) -> None:
    """Print the scripts of a site's nodes; ports, ids and the agent's socket are others in a real start."""
    meeting = work / _TICKET if compute.slurm else _SOCKET
    for launch in launches(compute, meeting, gpus_here()):
        typer.echo(one_line(f"# {name}, node {launch.node}: {shlex.join(launch.argv)}"))
        typer.echo(launch.script)
