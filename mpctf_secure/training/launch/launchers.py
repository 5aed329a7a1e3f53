"""The launchers: from a site's `compute` section to the processes that carry its scripts to its nodes."""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mpctf_secure.config.site import Compute, Node
from mpctf_secure.training.launch.batch import Batch, submission
from mpctf_secure.training.launch.scripts import Place, Rendezvous, node_script, ssh_command


class Launch(NamedTuple):
    """One child of the agent: what to run, the script it reads, the node it is about (counted from 1).

    Exit code CARRIER_FAILED means that `carrier` did not get the script to its node; its last line says why.
    """

    node: int
    argv: list[str]
    script: str
    carrier: str


class Errand(NamedTuple):
    """What all launchers are given: the site's section, the path of the agent's endpoint, the interpreter, how many
    GPUs are here."""

    compute: Compute
    socket: Path
    python: str
    gpus_here: int


def local(errand: Errand) -> list[Launch]:
    """One node, this machine; all its GPUs where none are named."""
    node = errand.compute.nodes[0]
    everything = () if node.processes else tuple(range(errand.gpus_here))
    place = _place(1, node.model_copy(update={"gpus": node.gpus or everything}))
    rendezvous = Rendezvous(secrets.token_hex(8), 1, f"{node.address}:0")
    return [Launch(1, ["sh", "-s"], node_script(place, rendezvous, errand.python, str(errand.socket)), "sh")]


def ssh(errand: Errand) -> list[Launch]:
    """A connection to each node; the agent's socket is forwarded to the first."""
    compute = errand.compute
    rendezvous = Rendezvous(
        secrets.token_hex(8), len(compute.nodes), f"{compute.nodes[0].address}:{compute.rendezvous_port}"
    )
    remote = f"/tmp/mpctf-{secrets.token_hex(16)}.sock"  # noqa: S108  # nobody can have made a name of 128 random bits
    launches = []
    for number, node in enumerate(compute.nodes, 1):
        first = number == 1
        argv = ssh_command(_ssh_options(compute, node), node.address, f"{remote}:{errand.socket}" if first else None)
        script = node_script(_place(number, node), rendezvous, errand.python, remote if first else None)
        launches.append(Launch(number, argv, script, "ssh"))
    return launches


def slurm(errand: Errand) -> list[Launch]:
    """One job on nodes that Slurm chooses; the child lives as long as the job does."""
    section = errand.compute.slurm
    if section is None:
        raise ValueError("no slurm section")
    batch = Batch(
        name=f"mpctf-{secrets.token_hex(8)}",
        section=section,
        port=errand.compute.rendezvous_port,
        python=errand.python,
        ticket=errand.socket,
        log=log_of(errand.socket.parent, 1),
    )
    return [Launch(1, ["sh", "-s"], submission(batch), "sbatch")]


def log_of(work: Path, node: int) -> Path:
    """Where a node's output goes; for slurm, that of all nodes to the first's."""
    return work / f"worker-{node}.log"


def _ssh_options(compute: Compute, node: Node) -> list[str]:
    if compute.ssh is None:
        raise ValueError("no ssh section")
    identity = compute.ssh.identity
    return [
        *("-o", f'UserKnownHostsFile="{compute.ssh.known_hosts}"', "-p", str(node.port)),
        *(("-l", node.user) if node.user else ()),
        *(("-o", "IdentitiesOnly=yes", "-i", str(identity)) if identity else ()),
    ]


def _place(number: int, node: Node) -> Place:
    return Place(number, node.address, node.gpus, node.workers, node.environment)


LAUNCHERS: Mapping[str, Callable[[Errand], list[Launch]]] = {"local": local, "ssh": ssh, "slurm": slurm}
