"""The generated script for Slurm, pure: a shell on the agent's machine submits one job for all nodes and watches it.

Nothing secret is in it: rank 0 finds its ticket in the `work` folder, which the nodes must see.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from mpctf_secure.config.site import Slurm
from mpctf_secure.training.launch.scripts import (
    CARRIER_FAILED,
    WORKER,
    Rendezvous,
    exports,
    grouped,
    held,
    launcher,
    threads,
)


@dataclass(frozen=True)
class Batch:
    """One job: a name nobody else has, what the site wants, the port on the head, paths on all nodes."""

    name: str
    section: Slurm
    port: int
    python: str
    ticket: Path
    log: Path


def submission(batch: Batch) -> str:
    """For `sh -s`: ends when the job does, with its exit code, and the job with it, also where it still waits.

    Cancelled by name: that is known before Slurm has given the job a number.
    """
    return grouped(
        [
            f"# {batch.name}: {batch.section.nodes} nodes with {batch.section.workers} processes each",
            f"number=$(mktemp) && trap 'rm -f \"$number\"; {_cancel(batch)}' EXIT || exit 3",
            *held(f"{_sbatch(batch)} >\"$number\" <<'{batch.name}'", [*_job(batch), batch.name]),
            f'[ -s "$number" ] || code={CARRIER_FAILED}  # no number, no job',
            "exit $code",
        ]
    )


def _cancel(batch: Batch) -> str:
    return f"scancel --quiet --name={batch.name} 2>/dev/null"


def _sbatch(batch: Batch) -> str:
    # Here rather than as lines of the job, so that neither the site's options nor SBATCH_ variables outdo them. Slurm
    # must not start it again by itself: its ticket is gone.
    return " ".join(
        [
            *("sbatch", "--wait", "--parsable", "--no-requeue", f"--job-name={batch.name}"),
            *(f"--nodes={batch.section.nodes}", "--ntasks-per-node=1", "--open-mode=append"),
            shlex.quote(f"--output={str(batch.log).replace('%', '%%')}"),
        ]
    )


def _job(batch: Batch) -> list[str]:
    """What runs on the first node."""
    end = f"{batch.name}-node"
    step = f"srun --nodes={batch.section.nodes} --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --export=ALL"
    return [
        "#!/bin/sh",
        *(f"#SBATCH {option}" for option in batch.section.options),
        *exports(batch.section.environment),  # and not in the part: everybody can read srun's arguments
        f"part=$(cat <<'{end}'",
        *_node(batch),
        *(end, ")"),
        f"head=$({_own_address(batch)}) || exit",
        f'exec {step} sh -c "$part" node "$head"',
    ]


def _node(batch: Batch) -> list[str]:
    """What runs on each node, given the head's address."""
    section = batch.section
    rendezvous = Rendezvous(batch.name, section.nodes, section.workers, f'"[$1]:{batch.port}"')
    command = launcher(rendezvous, batch.python, "$SLURM_NODEID")
    return [
        "set -u",
        "umask 077",
        threads(section.workers),
        f'[ "$SLURM_NODEID" -gt 0 ] && agent= || agent={shlex.quote(str(batch.ticket))}',
        "logs=$(mktemp -d) && trap 'rm -rf \"$logs\"' EXIT || exit 3",
        "trap : TERM  # Slurm tells torchrun too; this must yet tidy up",
        f'{command} -m {WORKER} $((SLURM_NODEID + 1)) - ${{agent:+"$agent"}}',
    ]


def _own_address(batch: Batch) -> str:
    """That by which a node reaches the agent: no name to resolve, and no choice among a machine's many addresses."""
    agent = batch.section.listen
    family = "AF_INET6" if ":" in agent else "AF_INET"
    connect = f"s = socket.socket(socket.{family}, socket.SOCK_DGRAM); s.connect(({json.dumps(agent)}, 9))"
    code = f"import socket; {connect}; print(s.getsockname()[0])"  # datagrams: nothing is sent
    return f"{shlex.quote(batch.python)} -c {shlex.quote(code)}"
