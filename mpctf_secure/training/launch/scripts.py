"""The generated scripts, pure: what a node's shell reads. Nothing secret is in them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpctf_secure.config.site import Node
from mpctf_secure.training.children import OFFLINE

WORKER = "mpctf_secure.training.worker"
CARRIER_FAILED = 255
"""Exit code of ssh where it gets nowhere, and of what submits a job that Slurm does not take."""
_JOIN_SECONDS = 300
_GRACE_SECONDS = 3
"""Less than whoever ends this shell leaves it."""
_OF_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rendezvous:
    """Where processes meet: an id nobody else has, how many nodes, how many processes on this one, who listens."""

    id: str
    nodes: int
    workers: int
    endpoint: str
    """[IP]:port of the first of several nodes, as shell text."""


def node_script(number: int, node: Node, rendezvous: Rendezvous, python: str, agent: str | None) -> str:
    """For `sh -s` on the node with this number, from 1; `agent` is where rank 0 finds the agent, on the first only."""
    gpus = ",".join(map(str, node.gpus))
    removal = f"; rm -f {shlex.quote(agent)}" if agent else ""
    command = f"{launcher(rendezvous, python, str(number - 1))} -m {WORKER} {number} {gpus or '-'}"
    return grouped(
        [
            f"# node {number} of {rendezvous.nodes}, {node.address}",
            *exports({"CUDA_VISIBLE_DEVICES": gpus, **node.environment}),
            threads(rendezvous.workers),
            f"logs=$(mktemp -d) && trap 'rm -rf \"$logs\"{removal}' EXIT || exit 3",
            *held(f"{command} {shlex.quote(agent)}" if agent else command),
            "exit $code",
        ]
    )


def grouped(lines: Sequence[str]) -> str:
    """One group: a shell that reads its script from a pipe must have read all of it before it runs a line."""
    return "\n".join(["{", "set -u", "umask 077", *lines, "}", ""])


def held(command: str, document: Sequence[str] = ()) -> list[str]:
    """Runs a command, with a here-document if need be, while whoever started the script holds its input open; then
    `code` is its exit code."""
    return [
        "exec 3<&0 </dev/null",
        f"{command} &",
        *document,
        "job=$!",
        "# Whoever started this holds its input open: when that ends, so does the job.",
        f"finish() {{ kill -TERM $job; sleep {_GRACE_SECONDS}; kill -KILL $job; }} >/dev/null 2>&1",
        "{ trap '' TERM INT HUP; read -r _ <&3; finish; } 2>/dev/null &",
        "watch=$!",
        "trap 'finish &' TERM INT HUP",
        "trap : PIPE  # the shell tells of killed jobs, maybe to a connection that is gone, and must yet tidy up",
        "exec 3<&-",
        "while wait $job; code=$?; kill -0 $job 2>/dev/null; do :; done  # a trap ends `wait`, and not the job",
        "kill -KILL $watch 2>/dev/null",
    ]


def exports(variables: Mapping[str, str]) -> list[str]:
    """A node's environment: what is fixed, and the variables that its user set."""
    everything = {**OFFLINE, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **variables}
    return [f"export {name}={shlex.quote(value)}" for name, value in everything.items()]


def threads(workers: int) -> str:
    """A node's cores divided among so many processes, unless somebody said else."""
    each = f"$(( $(nproc) / {workers} > 0 ? $(nproc) / {workers} : 1 ))"
    return f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{each}}}"'


def launcher(rendezvous: Rendezvous, python: str, number: str) -> str:
    """What starts the processes of the node with this number, shell text, from 0: torchrun unless there is but one.

    On one node they meet in a file in `$logs`, on several at a TCPStore, and not by torchrun's c10d over TCP: it
    unpickles what it finds in a store that takes entries from whoever can connect. Only the agent starts a job again.
    """
    if (rendezvous.nodes, rendezvous.workers) == (1, 1):
        inherited = " ".join(f"-u {name}" for name in _OF_TORCHRUN)  # of a job that this one is started in
        return f"env {inherited} {shlex.quote(python)} -u"
    if rendezvous.nodes == 1:
        where = '--rdzv-backend=c10d --rdzv-conf=store_type=file --rdzv-endpoint="$logs/meeting" --local-addr=127.0.0.1'
    else:
        where = f"--rdzv-backend=static --rdzv-conf=timeout={_JOIN_SECONDS} --rdzv-endpoint={rendezvous.endpoint}"
    return (
        f'{shlex.quote(python)} -m torch.distributed.run --log-dir "$logs"'
        f" --nnodes={rendezvous.nodes} --node-rank={number} --nproc-per-node={rendezvous.workers}"
        f" --max-restarts=0 --rdzv-id={rendezvous.id} {where}"
    )


def ssh_command(options: Sequence[str], host: str, forwarded: str | None) -> list[str]:
    """What carries a script to a node: no password, no host key but the pinned ones, nothing inherited from a
    connection that somebody shares."""
    fixed = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "GlobalKnownHostsFile": "/dev/null",
        "UpdateHostKeys": "no",
        "ControlPath": "none",
        "ForwardAgent": "no",
        "ExitOnForwardFailure": "yes",
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "4",
    }
    settings = [part for name, value in fixed.items() for part in ("-o", f"{name}={value}")]
    forward = ["-R", forwarded] if forwarded else []
    return ["ssh", "-T", *settings, *options, *forward, host, "sh", "-s"]
