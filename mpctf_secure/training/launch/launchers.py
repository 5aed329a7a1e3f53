"""The launchers: from a site's `compute` section to the processes that carry its scripts to its nodes."""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mpctf_secure.config.site import Compute, Node
from mpctf_secure.training.launch.scripts import Place, Rendezvous, node_script, slurm_script, ssh_command


class Launch(NamedTuple):
    """One child of the agent: what to run, the script it reads, and the node it is about (counted from 1).

    The job ends when the script's input does, unless it is a batch job: that is cancelled by `cancel`, and may wait for
    long before it starts.
    """

    node: int
    argv: list[str]
    script: str
    cancel: list[str] | None = None

    @property
    def is_batch(self) -> bool:
        """Whether somebody else decides when it starts."""
        return self.cancel is not None


class Errand(NamedTuple):
    """What all launchers are given: the site's section, where rank 0 finds the agent, the folder for logs, the
    interpreter, how many GPUs are here."""

    compute: Compute
    agent: str
    work: Path
    python: str
    gpus_here: int


def local(errand: Errand) -> list[Launch]:
    """One node, this machine; all its GPUs where none are named."""
    node = errand.compute.nodes[0]
    everything = () if node.processes else tuple(range(errand.gpus_here))
    place = _place(1, node.model_copy(update={"gpus": node.gpus or everything}))
    rendezvous = Rendezvous(secrets.token_hex(8), 1, f"{node.address}:0")
    return [Launch(1, ["sh", "-s"], node_script(place, rendezvous, errand.python, errand.agent))]


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
        argv = ssh_command(_ssh_options(compute, node), node.address, f"{remote}:{errand.agent}" if first else None)
        script = node_script(_place(number, node), rendezvous, errand.python, remote if first else None)
        launches.append(Launch(number, argv, script))
    return launches


def slurm(errand: Errand) -> list[Launch]:
    """One batch job over all nodes; `sbatch --wait` lives as long as it."""
    settings, name = errand.compute.slurm, f"mpctf-{secrets.token_hex(8)}"
    if settings is None:
        raise ValueError("no slurm section")
    log = log_of(errand.work, 1)
    script = slurm_script(name, settings, errand.compute.rendezvous_port, errand.python, errand.agent, str(log))
    return [Launch(1, ["sbatch", "--wait", "--parsable"], script, ["scancel", f"--name={name}"])]


def log_of(work: Path, node: int) -> Path:
    """Where the output of a node's processes goes."""
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
