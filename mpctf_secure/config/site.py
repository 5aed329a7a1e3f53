"""The site file: what a participant's operator writes, and what no coordinator may override."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mpctf_secure.config.address import Address
from mpctf_secure.config.base import Frozen
from mpctf_secure.config.privacy import Against
from mpctf_secure.config.strategies import Count
from mpctf_secure.config.training import Choice


def _name_of_false(value: object) -> object:
    """YAML takes `off` for a truth value."""
    return "off" if value is False else value


Sharing = Annotated[Literal["off", "coarse", "exact"], BeforeValidator(_name_of_false)]
"""Coarse: quarters, and powers of two; no names and temperatures of GPUs."""


Unit = Literal["record", "participant"]


class Budget(Frozen):
    """What all runs together may cost a data set; a run that does not fit is refused."""

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Below one over the number of rows."""
    unit: Unit
    """Of what nobody shall learn whether it was there: a row of the data file, or all of them at once."""
    against: Against = "coordinator"
    """Whom the guarantee shall hold against; only participants: the coordinator is trusted to add the noise."""


class Policy(Frozen):
    """Floors of this site; a run below them is refused."""

    allow_pair: bool = False
    """Accept a run of two, in which each learns the other's update by subtraction."""
    allow_clear: bool = False
    """Accept a run without masks, in which the coordinator sees this site's updates."""
    smallest_sum: Annotated[int, Field(ge=2, le=100)] = 2
    """The fewest organisations whose updates may be opened as one sum; the protocol itself asks for 3 and for t."""
    size_step: Annotated[int, Field(ge=0, lt=2**20)] = 100
    """`max_volume` needs the number of this site's rows: it is told rounded up to a multiple; 0 refuses such runs."""
    most_void_rounds: Annotated[int, Field(ge=0)] = 2
    """In each the coordinator may see a sum of updates, say that there was none, and get another without somebody."""
    most_passes: Count = 100
    """How often a round may go over this site's rows: `max_volume` asks the same number of rows of all."""
    largest_clip_norm: Annotated[float, Field(gt=0)] = 100.0
    """Of a run with noise: what one round can take over of this site's update at the most."""
    own_clip_norm: Annotated[float, Field(ge=1e-6)] | None = None
    """To which this site clips its updates where a run would take more of them."""
    budget: Budget | None = None
    """Differential privacy that this site insists on; without it rounds are recorded all the same."""
    record_epsilon: Annotated[float, Field(ge=0.02)] | None = None
    """Of each row in one run: where `record_dpsgd` asks for less noise this site takes more; other runs are refused."""
    share_resources: Sharing = "coarse"
    """What the coordinator hears of each node's CPU, memory, disk, network and GPUs while this site trains."""


def _check_ip(text: str) -> str:
    """The same text; ValueError unless it is an IP literal: a name that does not resolve hangs the rendezvous.

    Without a zone, which may be any text, and is of no use at another node.
    """
    if "%" in text:
        raise ValueError("an address with a zone")
    ipaddress.ip_address(text)
    return text


Port = Annotated[int, Field(ge=1, le=65535)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Node(Frozen):
    """One machine."""

    address: Annotated[str, AfterValidator(_check_ip)] = "127.0.0.1"
    """On the network between the nodes."""
    gpus: tuple[Annotated[int, Field(ge=0, lt=64)], ...] = ()
    """As nvidia-smi numbers them, a process each."""
    processes: Count | None = None
    """Without GPUs: so many processes; one if nothing is said."""
    environment: dict[Variable, str] = Field(default_factory=dict)
    """Such as NCCL_IB_DISABLE, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME."""
    user: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    port: Port = 22
    """Both of ssh."""

    @model_validator(mode="after")
    def _counted_once(self) -> Self:
        if self.gpus and self.processes:
            raise ValueError("gpus and processes: every GPU has one process")
        if len(set(self.gpus)) < len(self.gpus):
            raise ValueError("a GPU is named twice")
        return self

    @property
    def workers(self) -> int:
        """Processes on this node."""
        return len(self.gpus) or self.processes or 1


class Ssh(Frozen):
    """How the agent gets to the nodes."""

    known_hosts: Path
    """Their host keys, as ssh-keyscan prints them and somebody has compared them; no other key is taken."""
    identity: Path | None = None
    """The private key; else what ssh finds."""


class Slurm(Frozen):
    """One Slurm job."""

    nodes: Count = 1
    workers: Count = 1
    """Processes on each node, one for each GPU."""
    options: tuple[Annotated[str, Field(pattern=r"^--?[A-Za-z0-9][^\n]*$")], ...] = ()
    """For sbatch, such as --partition=gpu or --gpus-per-node=4."""
    environment: dict[Variable, str] = Field(default_factory=dict)
    listen: Annotated[str, AfterValidator(_check_ip)]
    """This machine's address that compute nodes can reach: rank 0 dials it over TLS, with a certificate of the job."""


class Compute(Frozen):
    """Where and how this site trains; others hear what `policy.share_resources` says."""

    launcher: Literal["local", "ssh", "slurm"] = "local"
    nodes: tuple[Node, ...] = (Node(),)
    ssh: Ssh | None = None
    slurm: Slurm | None = None
    python: Path | None = None
    """On the nodes; without it the path that runs here."""
    rendezvous_port: Port = 29400
    """On the first of several nodes, for the others."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the base model; auto: bfloat16 where the hardware is fast in it. The adapter is always float32."""
    micro_batch: Count | None = None
    """Rows that a process has in memory at a time; the batch of the contract stays what it is."""
    gradient_checkpointing: bool = False
    """A third more time for much less memory."""
    packing: bool = False
    """The rows of a pass one behind the other instead of padded side by side: for flash attention."""
    attention: Literal["sdpa", "flash"] = "sdpa"
    """Torch's own kernels, or flash-attn where it is installed (CUDA)."""
    sharded: bool = False
    """Divide the base model among the processes (FSDP2), where it does not fit into one."""
    four_bit: bool = False
    """Load the base as 4-bit NF4 (QLoRA); needs the extra gpu, bitsandbytes."""
    memory_gib: Annotated[float, Field(gt=0, le=2**20)] | None = None
    """For `memory_aware`: what this site weighs, instead of what is free where it trains."""

    @model_validator(mode="after")
    def _launcher_has_what_it_needs(self) -> Self:
        if not self.nodes:
            raise ValueError("nodes is empty")
        if self.launcher == "local" and len(self.nodes) > 1:
            raise ValueError("several nodes need launcher: ssh or slurm")
        for name in ("ssh", "slurm"):
            if (self.launcher == name) != (getattr(self, name) is not None):
                raise ValueError(f"launcher: {name} and the section {name} go together")
        if self.launcher == "slurm" and self.nodes != (Node(),):
            raise ValueError("launcher: slurm takes nodes, workers and environment from the section slurm")
        if self.launcher != "ssh" and any(node.user or node.port != Node().port for node in self.nodes):
            raise ValueError("user and port of a node are for launcher: ssh")
        if len({bool(node.gpus) for node in self.nodes}) > 1:
            raise ValueError("some nodes name gpus and others do not: a job trains on GPUs or on processors")
        if self.python and not self.python.is_absolute():
            raise ValueError("python is an absolute path, the same on every node")
        if self.sharded and self.four_bit:
            raise ValueError("sharded and four_bit exclude each other")
        return self


class SiteConfig(Frozen):
    """One participant."""

    coordinator: Address
    """Where to dial out to, as IP literal and port."""
    model: Path
    """Folder of the base model, under the same path on every node."""
    data: Path
    """JSONL, JSON, CSV or Parquet with one conversation or text a row."""
    data_set: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")] = "data"
    """The name under which the privacy ledger knows these rows, whatever becomes of the file."""
    keys: Path = Path("keys")
    """This site's private keys, the roster, and the privacy ledger."""
    work: Path = Path("work")
    """Logs of the training job, and what this site must still know of its runs after a crash."""
    patience: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 600
    """Seconds after which a coordinator that has never answered is given up."""
    training: Choice = Choice()
    """Other settings than the run's defaults, within the bounds that it names."""
    compute: Compute = Compute()
    policy: Policy = Policy()
