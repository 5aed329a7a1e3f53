"""The launchers: from a site's `compute` section to the processes that carry its scripts to its nodes."""

import secrets
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from mpctf_secure.config.site import Compute, Node, Ssh
from mpctf_secure.training.launch.batch import Batch, submission
from mpctf_secure.training.launch.scripts import Rendezvous, node_script, ssh_command


class Launch(NamedTuple):
    """One child of the agent: what to run, the script it reads, the node it is about (counted from 1).

    Exit code CARRIER_FAILED means that `carrier` did not get the script to its node; its last line says why.
    """

    node: int
    argv: list[str]
    script: str
    carrier: str


def launches(compute: Compute, agent: Path, gpus_here: int) -> list[Launch]:
    """What is started for a `compute` section; `agent` is the path of the agent's endpoint, for slurm of a ticket."""
    python, job = str(compute.python or sys.executable), f"mpctf-{secrets.token_hex(8)}"
    if compute.slurm:
        batch = Batch(job, compute.slurm, compute.rendezvous_port, python, agent, log_of(agent.parent, 1))
        return [Launch(1, ["sh", "-s"], submission(batch), "sbatch")]
    if compute.ssh:
        return _over_ssh(compute, compute.ssh, agent, python, job)
    node = compute.nodes[0]
    everything = () if node.processes else tuple(range(gpus_here))
    node = node.model_copy(update={"gpus": node.gpus or everything})
    return [Launch(1, ["sh", "-s"], node_script(1, node, _rendezvous(compute, node, job), python, str(agent)), "sh")]


def _over_ssh(compute: Compute, ssh: Ssh, agent: Path, python: str, job: str) -> list[Launch]:
    """A connection to each node; the agent's socket is forwarded to the first."""
    remote = f"/tmp/mpctf-{secrets.token_hex(16)}.sock"  # noqa: S108  # nobody can have made a name of 128 random bits
    launches = []
    for number, node in enumerate(compute.nodes, 1):
        first = number == 1
        argv = ssh_command(_ssh_options(ssh, node), node.address, f"{remote}:{agent}" if first else None)
        script = node_script(number, node, _rendezvous(compute, node, job), python, remote if first else None)
        launches.append(Launch(number, argv, script, "ssh"))
    return launches


def log_of(work: Path, node: int) -> Path:
    """Where a node's output goes; for slurm, that of all nodes to the first's."""
    return work / f"worker-{node}.log"


def _rendezvous(compute: Compute, node: Node, job: str) -> Rendezvous:
    endpoint = shlex.quote(f"[{compute.nodes[0].address}]:{compute.rendezvous_port}")
    return Rendezvous(job, len(compute.nodes), node.workers, endpoint)


def _ssh_options(ssh: Ssh, node: Node) -> list[str]:
    return [
        *("-o", f'UserKnownHostsFile="{ssh.known_hosts}"', "-p", str(node.port)),
        *(("-l", node.user) if node.user else ()),
        *(("-o", "IdentitiesOnly=yes", "-i", str(ssh.identity)) if ssh.identity else ()),
    ]
