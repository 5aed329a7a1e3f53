"""The generated scripts, pure: what a node's shell reads, and what sbatch gets. Nothing secret is in them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpctf_secure.training.children import OFFLINE

_JOIN_SECONDS = 300


@dataclass(frozen=True)
class Place:
    """One node's part: its number from 1, its address, its GPUs, its processes, the variables that its user set."""

    number: int
    address: str
    gpus: tuple[int, ...]
    workers: int
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes meet: an id nobody else has, how many they are, address and port on the first."""

    id: str
    nodes: int
    endpoint: str


def node_script(place: Place, rendezvous: Rendezvous, python: str, agent: str | None) -> str:
    """For `sh -s`; `agent` is where rank 0 finds the agent, on the first node only.

    It is one group: a shell that reads its script from a pipe must have read all of it before it runs a line.
    """
    return "\n".join(
        [
            "{",
            f"# node {place.number} of {rendezvous.nodes}, {place.address}",
            "set -u",
            "umask 077",
            *_exports(place),
            f"logs=$(mktemp -d) && trap 'rm -rf \"$logs\"{_removal(agent)}' EXIT || exit 3",
            "exec 3<&0 </dev/null",
            f"{_torchrun(place, rendezvous, python)} {_worker(place, agent)} &",
            "job=$!",
            "# Whoever started this holds its input open: when that ends, so does the job.",
            "{ read -r _ <&3; kill -TERM $job; } 2>/dev/null &",
            "watch=$!",
            "trap 'kill -TERM $job' TERM INT HUP",
            "trap : PIPE  # the shell tells of killed jobs, maybe to a connection that is gone, and must yet tidy up",
            "exec 3<&-",
            "wait $job; code=$?",
            "kill $watch 2>/dev/null",
            "exit $code",
            "}",
            "",
        ]
    )


def _removal(agent: str | None) -> str:
    return f"; rm -f {shlex.quote(agent)}" if agent else ""


def _exports(place: Place) -> list[str]:
    shown = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, place.gpus))}
    variables = {**OFFLINE, **shown, **place.environment}
    threads = f"$(( $(nproc) / {place.workers} > 0 ? $(nproc) / {place.workers} : 1 ))"
    return [
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]


def _torchrun(place: Place, rendezvous: Rendezvous, python: str) -> str:
    # IP literals: a host name that does not resolve would hang the rendezvous. Only the agent starts a job again.
    return " ".join(
        [
            *(shlex.quote(python), "-m", "torch.distributed.run", '--log-dir "$logs"'),
            *(f"--nnodes={rendezvous.nodes}", f"--nproc-per-node={place.workers}", "--max-restarts=0"),
            *("--rdzv-backend=c10d", f"--rdzv-id={rendezvous.id}", f"--rdzv-endpoint={rendezvous.endpoint}"),
            *(f"--rdzv-conf=join_timeout={_JOIN_SECONDS}", f"--local-addr={place.address}"),
        ]
    )


def _worker(place: Place, agent: str | None) -> str:
    # Not by name: torchrun would take an abbreviation of one of its own options for that.
    gpus = ",".join(map(str, place.gpus)) or "-"
    return f"-m mpctf_secure.training.worker {place.number} {gpus} {shlex.quote(agent) if agent else ''}".rstrip()


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
