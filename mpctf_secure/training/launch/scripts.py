"""The generated scripts, pure: what a node's shell reads. Nothing secret is in them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpctf_secure.training.children import OFFLINE

WORKER = "mpctf_secure.training.worker"
CARRIER_FAILED = 255
"""Exit code of ssh where it gets nowhere, and of what submits a job that Slurm does not take."""
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
    """For `sh -s`; `agent` is where rank 0 finds the agent, on the first node only."""
    shown = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, place.gpus))}
    command = torchrun(rendezvous, python, place.workers, place.address, "true" if place.number == 1 else "false")
    return grouped(
        [
            f"# node {place.number} of {rendezvous.nodes}, {place.address}",
            *exports(place.workers, {**shown, **place.environment}),
            f"logs=$(mktemp -d) && trap 'rm -rf \"$logs\"{_removal(agent)}' EXIT || exit 3",
            *held(f"{command} {_worker(place, agent)}"),
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
        "{ read -r _ <&3; kill -TERM $job; } 2>/dev/null &",
        "watch=$!",
        "trap 'kill -TERM $job' TERM INT HUP",
        "trap : PIPE  # the shell tells of killed jobs, maybe to a connection that is gone, and must yet tidy up",
        "exec 3<&-",
        "wait $job; code=$?",
        "kill $watch 2>/dev/null",
    ]


def exports(workers: int, variables: Mapping[str, str]) -> list[str]:
    """A node's environment: its cores divided among so many processes unless somebody said else, and the variables."""
    threads = f"$(( $(nproc) / {workers} > 0 ? $(nproc) / {workers} : 1 ))"
    everything = {**OFFLINE, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **variables}
    return [
        f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}"',
        *(f"export {name}={shlex.quote(value)}" for name, value in everything.items()),
    ]


def torchrun(rendezvous: Rendezvous, python: str, workers: int, address: str, head: str) -> str:
    """One node's part of the job; address, head (true or false) and the endpoint are shell text. Needs `$logs`."""
    # IP literals: a host name that does not resolve would hang the rendezvous. Only the agent starts a job again. Left
    # to guess who is the head, a machine with several networks takes itself for none, and nobody keeps the store.
    return " ".join(
        [
            *(shlex.quote(python), "-m", "torch.distributed.run", '--log-dir "$logs"'),
            *(f"--nnodes={rendezvous.nodes}", f"--nproc-per-node={workers}", "--max-restarts=0"),
            *("--rdzv-backend=c10d", f"--rdzv-id={rendezvous.id}", f"--rdzv-endpoint={rendezvous.endpoint}"),
            *(f"--rdzv-conf=join_timeout={_JOIN_SECONDS},is_host={head}", f"--local-addr={address}"),
        ]
    )


def _removal(agent: str | None) -> str:
    return f"; rm -f {shlex.quote(agent)}" if agent else ""


def _worker(place: Place, agent: str | None) -> str:
    # Not by name: torchrun would take an abbreviation of one of its own options for that.
    gpus = ",".join(map(str, place.gpus)) or "-"
    return f"-m {WORKER} {place.number} {gpus} {shlex.quote(agent) if agent else ''}".rstrip()


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
