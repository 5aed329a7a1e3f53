"""The launchers: from a site's `compute` section to the processes that carry its scripts to its nodes."""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mpctf_secure.config.site import Compute, Node
from mpctf_secure.training.launch.scripts import Place, Rendezvous, node_script, ssh_command


class Launch(NamedTuple):
    """One child of the agent: what to run, the script it reads, and the node it is about (counted from 1)."""

    node: int
    argv: list[str]
    script: str


class Errand(NamedTuple):
    """What all launchers are given: the site's section, the agent's socket, the interpreter, how many GPUs are here."""

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
    return [Launch(1, ["sh", "-s"], node_script(place, rendezvous, errand.python, str(errand.socket)))]


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
        launches.append(Launch(number, argv, script))
    return launches


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


LAUNCHERS: Mapping[str, Callable[[Errand], list[Launch]]] = {"local": local, "ssh": ssh}
