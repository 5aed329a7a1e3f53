"""The local launcher: one torchrun job for a participant and a run, alive through all rounds."""

import contextlib
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpctf_secure.aggregation.lora import Vector, flat_size
from mpctf_secure.config.run import Lora, Training
from mpctf_secure.config.site import Compute
from mpctf_secure.config.strategies import Aggregation, FedProx
from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, UsageError
from mpctf_secure.rounds.messages import STATED
from mpctf_secure.training import children
from mpctf_secure.training.channel import JobChannel

START_SECONDS = 600.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class JobSpec:
    """What a worker needs before the first round."""

    model: str
    data: str
    lora: dict[str, Any]
    training: dict[str, Any]
    mu: float

    @classmethod
    def of(cls, model: Path, data: Path, lora: Lora, training: Training, aggregation: Aggregation) -> "JobSpec":
        """From the site's paths and the contract's fields."""
        mu = aggregation.mu if isinstance(aggregation, FedProx) else 0.0
        return cls(str(model), str(data), lora.model_dump(mode="json"), training.model_dump(mode="json"), mu)


@dataclass(frozen=True)
class Trained:
    """The outcome of one round: the local adapter [d], mean loss, rows and seconds."""

    adapter: Vector
    loss: float
    rows: int
    tokens: int
    seconds: float


class Job:
    """A running torchrun job. `schema`, `rows`, `truncated`, `hardware`, `memory` [MiB] are what rank 0 reported."""

    def __init__(self, spec: JobSpec, compute: Compute, work: Path) -> None:
        self._log = work / "worker.log"
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="mpctf-"))  # short: sun_path has 108 bytes
            path = Path(folder) / "job.sock"
            listener = undo.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen(1)
            self._process = children.spawn(_torchrun(path), self._log, {"OMP_NUM_THREADS": _threads()})
            try:
                self._channel = JobChannel(self._accept(listener))
                self._channel.send({"spec": asdict(spec)})
                described, _ = self._receive()
            except BaseException:
                children.end([self._process])
                raise
        self.schema = tuple((name, tuple(shape)) for name, shape in described["schema"])
        self.rows, self.truncated = int(described["rows"]), int(described["truncated"])
        self.hardware: dict[str, Any] = described["hardware"]
        self.memory_kind, self.memory = described["memory"]
        if compute.memory_gib is not None:
            self.memory_kind, self.memory = STATED, math.ceil(compute.memory_gib * 1024)

    @property
    def hardware_text(self) -> str:
        """One line on what it runs on."""
        return ", ".join(f"{name} {value}" for name, value in self.hardware.items())

    def zeros(self) -> Vector:
        """An adapter of the job's schema that changes nothing."""
        return np.zeros(flat_size(self.schema), np.float32)

    def train(
        self, adapter: Vector, rows: list[int], names: list[str], progress: Callable[[int, int], None]
    ) -> Trained:
        """Train the tensors `names` from `adapter` on the rows with these indices; `progress` gets (step, steps)."""
        self._channel.send({"rows": rows, "names": names}, adapter)
        while True:
            header, body = self._receive()
            if "loss" in header:
                return Trained(body, header["loss"], header["rows"], header["tokens"], header["seconds"])
            progress(header["step"], header["steps"])

    def close(self) -> None:
        """Hang up, upon which every worker exits, and wait for torchrun."""
        self._channel.close()
        try:
            self._process.wait(children.GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            children.end([self._process])

    def _accept(self, listener: socket.socket) -> socket.socket:
        listener.settimeout(_POLL_SECONDS)
        for _ in range(int(START_SECONDS / _POLL_SECONDS)):
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            if self._process.poll() is not None:
                break
        raise EnvironmentUnfitError("the training job did not start", hint=f"see {self._log}")

    def _receive(self) -> tuple[dict[str, Any], Vector]:
        try:
            header, body = self._channel.receive()
        except EnvironmentUnfitError as error:
            raise EnvironmentUnfitError("the training job ended", hint=f"see {self._log}") from error
        if "error" in header:
            kind: type[MpctfError] = UsageError if header["usage"] else EnvironmentUnfitError
            raise kind(header["error"], hint=header["hint"] or f"see {self._log}")
        return header, body


def _torchrun(path: Path) -> list[str]:
    # IP literals: a host name that does not resolve would hang the rendezvous.
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=1", "--nproc-per-node=1", "--max-restarts=0"),
        *("--log-dir", str(path.parent)),  # its own would stay in /tmp for ever
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *("-m", "mpctf_secure.training.worker", str(path)),
    ]


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
