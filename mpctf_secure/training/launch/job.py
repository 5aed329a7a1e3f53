"""A participant's training job through all rounds: started again, with the round's inputs, if it dies or hangs."""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mpctf_secure.aggregation.lora import Vector, flat_size
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import DecodeError
from mpctf_secure.monitoring.resources import Resources, Sampler
from mpctf_secure.privacy.records import Samples
from mpctf_secure.rounds.messages import STATED, FaultCode
from mpctf_secure.training.faults import HOPELESS, Fault
from mpctf_secure.training.launch import endpoint
from mpctf_secure.training.launch.endpoint import START_SECONDS
from mpctf_secure.training.launch.launchers import launches
from mpctf_secure.training.launch.running import JobFailedError, Running
from mpctf_secure.training.spec import JobSpec

FIRST_STEP_SECONDS = 600.0
_MOST_RESTARTS = 2  # of one round
_LEAST_SILENCE, _STEPS_OF_SILENCE = 120.0, 20
_REMEMBERED_STEPS = 50

T = TypeVar("T")
OnResources = Callable[[dict[int, Resources]], None]
"""Called while it trains with new samples of its nodes, by their numbers."""
OnFault = Callable[[Fault, bool], None]
"""Called with each fault, and whether the job is started again."""


@dataclass(frozen=True)
class HeldOut:
    """Mean losses over the held-out rows in nats per answer token: of the adapter that the round began with, and of the
    one that is sent, which is that after `sent_step`."""

    loss_before: float
    loss_after: float
    sent_step: int


@dataclass(frozen=True)
class Trained:
    """The outcome of one round: the local adapter [d], mean loss, rows and seconds; more where rows are held out."""

    adapter: Vector
    loss: float
    rows: int
    tokens: int
    seconds: float
    held_out: HeldOut | None = None

    @property
    def is_finite(self) -> bool:
        """Whether losses and adapter are numbers."""
        losses = [self.loss, *((self.held_out.loss_before, self.held_out.loss_after) if self.held_out else ())]
        return all(map(math.isfinite, losses)) and bool(np.isfinite(self.adapter).all())


class Job:
    """`schema`, `rows`, `held_out`, `truncated`, `hardware` and `memory` [MiB] are what rank 0 reported."""

    def __init__(
        self,
        spec: JobSpec,
        site: SiteConfig,
        on_fault: OnFault = lambda *_: None,
        on_resources: OnResources = lambda _: None,
    ) -> None:
        """MpctfError where it cannot be started: for people to mend, so it is tried once."""
        self._spec, self._site = spec, site
        self._on_fault, self._on_resources = on_fault, on_resources
        self._step_seconds: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._running: Running | None = None
        described = self._insisting(self._start, restarts=0)
        self.schema = tuple((name, tuple(shape)) for name, shape in described["schema"])
        self.rows, self.held_out = int(described["rows"]), int(described["held_out"])
        self.truncated = int(described["truncated"])
        self.hardware: dict[str, Any] = described["hardware"]
        self.memory_kind, self.memory = described["memory"]
        if site.compute.memory_gib is not None:
            self.memory_kind, self.memory = STATED, math.ceil(site.compute.memory_gib * 1024)

    @property
    def hardware_text(self) -> str:
        """One line on what it runs on."""
        return ", ".join(f"{name} {value}" for name, value in self.hardware.items())

    def zeros(self) -> Vector:
        """An adapter of the job's schema that changes nothing."""
        return np.zeros(flat_size(self.schema), np.float32)

    def train(
        self, adapter: Vector, work: list[int] | Samples, names: list[str], progress: Callable[[int, int], None]
    ) -> Trained:
        """Train the tensors `names` from `adapter`; `progress` gets (step, steps).

        On the rows with these indices, or on samples of all, with noise.
        MpctfError where it fails for good.
        """
        return self._insisting(lambda: self._train(adapter, work, names, progress), _MOST_RESTARTS)

    def check_finite(self, trained: Trained) -> None:
        """UsageError, and a fault, for an outcome that is not a number."""
        if not trained.is_finite:
            message = "the local loss or adapter is not a number"
            fault = Fault(FaultCode.DIVERGED, 1, 0, message, "lower training.learning_rate")
            self._on_fault(fault, False)
            raise fault.to_error()

    def close(self) -> None:
        """End the job."""
        if self._running:
            self._running.close()

    def _insisting(self, work: Callable[[], T], restarts: int) -> T:
        """The result of `work`, tried again where that may help."""
        while True:
            try:
                return work()
            except JobFailedError as error:
                self._running = None
                again = restarts > 0 and error.fault.code not in HOPELESS
                self._on_fault(error.fault, again)
                if not again:
                    raise error.fault.to_error() from error
                restarts -= 1

    def _start(self) -> dict[str, Any]:
        compute, work = self._site.compute, self._site.work
        meeting = endpoint.tls(compute.slurm.listen, work) if compute.slurm else endpoint.unix()
        self._running = Running(lambda path: launches(compute, path, gpus_here()), meeting, work)
        self._running.send({"spec": self._spec.model_dump(mode="json")})
        return self._running.receive(START_SECONDS)[0]

    def _train(
        self, adapter: Vector, work: list[int] | Samples, names: list[str], progress: Callable[[int, int], None]
    ) -> Trained:
        if self._running is None:
            self._start()
        running = self._running
        assert running is not None  # noqa: S101
        request = (
            {"samples": work.encode(), "secret": work.secret.hex()} if isinstance(work, Samples) else {"rows": work}
        )
        running.send({"names": names, **request}, adapter)
        limit = FIRST_STEP_SECONDS
        while True:
            began = time.monotonic()
            header, body = running.receive(limit)
            if "loss" in header:
                held_out = header.pop("held_out", None)
                return Trained(body, **header, held_out=held_out and HeldOut(**held_out))
            if "step" in header:  # and not one of the signs of life while held-out rows are measured
                self._step_seconds.append(time.monotonic() - began)
                limit = max(_LEAST_SILENCE, _STEPS_OF_SILENCE * statistics.median(self._step_seconds))
                progress(header["step"], header["steps"])
            if samples := _read(header["resources"]):
                self._on_resources(samples)


def _read(samples: Mapping[str, str]) -> dict[int, Resources]:
    """By node; without those whose program may be of another version."""
    found = dict[int, Resources]()
    for node, text in samples.items():
        with contextlib.suppress(DecodeError):
            found[int(node)] = Resources.from_json(text.encode())
    return found


def gpus_here() -> int:
    """How many GPUs this machine has."""
    return len(Sampler(Path("/")).sample().gpus)
