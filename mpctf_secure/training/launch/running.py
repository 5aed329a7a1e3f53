"""One start of a training job: its processes, and the connection to its rank 0."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training import children, faults
from mpctf_secure.training.channel import Header, JobChannel
from mpctf_secure.training.faults import HOPELESS, Fault
from mpctf_secure.training.launch.endpoint import Endpoint, wait_readable
from mpctf_secure.training.launch.launchers import Launch, log_of
from mpctf_secure.training.launch.scripts import CARRIER_FAILED

_POLL_SECONDS = 0.5
_LAST_WORDS_SECONDS = 20.0
_TRANSFER_SECONDS = 300.0  # without a byte: a process that hangs between two rounds takes none


class JobFailedError(Exception):
    """The job is of no use any more; `fault` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Running:
    """A job that has met its agent, until `close`; whatever goes wrong is a JobFailedError, and the job has ended."""

    def __init__(
        self, launches: Callable[[Path], Sequence[Launch]], meeting: AbstractContextManager[Endpoint], work: Path
    ) -> None:
        """`launches` says what to start, given the path of the endpoint; logs of nodes go to the `work` folder."""
        with meeting as endpoint:
            self._launches = launches(endpoint.path)
            self._logs = {launch.node: log_of(work, launch.node) for launch in self._launches}
            self._began = {node: log.stat().st_size if log.exists() else 0 for node, log in self._logs.items()}
            self._processes = [
                children.spawn(one.argv, self._logs[one.node], script=one.script) for one in self._launches
            ]
            self._met = False
            try:
                self._connection = self._accept(endpoint)
            except BaseException:
                children.end(self._processes)
                raise
        self._connection.settimeout(_TRANSFER_SECONDS)
        self._channel, self._met = JobChannel(self._connection), True

    def send(self, header: Header, body: Vector | None = None) -> None:
        """A request to rank 0."""
        with self._failing():
            self._channel.send(header, body)

    def receive(self, limit: float) -> tuple[dict[str, Any], Vector]:
        """What rank 0 says next; silence for `limit` seconds is a hang."""
        deadline = time.monotonic() + limit
        with self._failing():
            while not wait_readable(self._connection, _POLL_SECONDS):
                self._check_running()
                if time.monotonic() > deadline:
                    raise self._failure(self._hang(limit))
            return self._channel.receive()

    def close(self) -> None:
        """Hang up, upon which every process exits, and wait for them."""
        self._channel.close()
        self._wait(_LAST_WORDS_SECONDS)
        children.end(self._processes)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise self._failure(self._hang(_TRANSFER_SECONDS)) from error
        except EnvironmentUnfitError as error:
            raise self._failure() from error

    def _accept(self, endpoint: Endpoint) -> socket.socket:
        deadline = time.monotonic() + endpoint.patience
        while time.monotonic() < deadline:
            if connection := endpoint.accept(_POLL_SECONDS):
                return connection
            self._check_running()
        raise self._failure(Fault(FaultCode.NO_START, 0, 0, "the training job did not start", self._look()))

    def _check_running(self) -> None:
        if any(process.poll() is not None for process in self._processes):
            raise self._failure()

    def _failure(self, otherwise: Fault | None = None) -> JobFailedError:
        """End what is left of the job, and find out why: by its last words, or by how its processes ended."""
        if otherwise is None:
            self._await_end(_LAST_WORDS_SECONDS)
        ended = next(
            ((one, p.returncode) for one, p in zip(self._launches, self._processes, strict=True) if p.poll()), None
        )
        children.end(self._processes)
        words = [fault for node, log in self._logs.items() for fault in faults.read(log, self._began[node])]
        words.sort(key=lambda fault: fault.code not in HOPELESS)
        # A process that lost a neighbour says so; the neighbour, if it was killed, says nothing.
        own = [fault for fault in words if fault.code != FaultCode.KILLED]
        return JobFailedError((own or self._signalled() or words or [otherwise or self._ending(ended)])[0])

    def _signalled(self) -> list[Fault]:
        found = []
        for node, log in self._logs.items():
            for rank, signum in faults.read_signals(log, self._began[node]):
                message = f"a process of the training job was killed by signal {signum}"
                found.append(Fault(FaultCode.KILLED, node, rank, message, self._after(signum)))
        return found

    def _await_end(self, seconds: float) -> None:
        """Until one has ended by itself, for its node has all its last words then, or so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.poll() is None for process in self._processes):
            time.sleep(_POLL_SECONDS)

    def _wait(self, seconds: float) -> None:
        """Until all have ended by themselves, or so long."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _ending(self, ended: tuple[Launch, int] | None) -> Fault:
        if ended is None:
            return Fault(FaultCode.KILLED, 1, 0, "the training job hung up", self._look())
        launch, code = ended
        if code == CARRIER_FAILED:
            line = self._last_line(launch.node).removeprefix(f"{launch.carrier}: ")
            return Fault(FaultCode.UNREACHABLE, launch.node, 0, f"{launch.carrier}: {line}", self._look())
        if not self._met:
            meeting = (
                "; do the nodes reach each other at rendezvous_port of the first?" if len(self._launches) > 1 else ""
            )
            line = f"ended before it began, with exit code {code}: {self._last_line(launch.node)}"
            return Fault(FaultCode.NO_START, launch.node, 0, f"the training job {line}", f"{self._look()}{meeting}")
        signum = -code if code < 0 else code - 128 if code > 128 else 0
        how = f"was killed by signal {signum}" if signum else f"ended with exit code {code}"
        return Fault(FaultCode.KILLED, launch.node, 0, f"the training job {how}", self._after(signum))

    def _after(self, signum: int) -> str:
        full = "; was main memory full?" if signum == signal.SIGKILL else ""
        return f"{self._look()}{full}"

    def _last_line(self, node: int) -> str:
        lines = self._logs[node].read_text(errors="replace").splitlines()
        return lines[-1] if lines else "no connection"

    def _look(self) -> str:
        return f"see {', '.join(map(str, self._logs.values()))}"

    def _hang(self, seconds: float) -> Fault:
        message = f"the training job has said nothing for {seconds:.0f} s"
        return Fault(FaultCode.HANG, 0, 0, message, f"is a node gone? {self._look()}")
