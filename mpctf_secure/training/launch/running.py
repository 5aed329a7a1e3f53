"""One start of a training job: its processes, and the socket to its rank 0."""

import contextlib
import math
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training import children, faults
from mpctf_secure.training.channel import Header, JobChannel
from mpctf_secure.training.faults import HOPELESS, Fault
from mpctf_secure.training.launch.endpoint import Endpoint, has_arrived
from mpctf_secure.training.launch.launchers import Launch, log_of

START_SECONDS = 600.0
_POLL_SECONDS = 0.5
_LAST_WORDS_SECONDS = 20.0
_CANCEL_SECONDS = 30.0
_SSH_FAILED = 255


class JobFailedError(Exception):
    """The job is of no use any more; `fault` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Running:
    """A job that has met its agent, until `close`; whatever goes wrong is a JobFailedError, and the job has ended."""

    def __init__(self, endpoint: Endpoint, launches: Callable[[str], Sequence[Launch]], work: Path) -> None:
        """`launches` says what to start, given where rank 0 finds the agent; logs of nodes go to the `work` folder."""
        self._met = False
        with endpoint:
            self._launches = launches(endpoint.agent)
            self._logs = {launch.node: log_of(work, launch.node) for launch in self._launches}
            self._began = {node: log.stat().st_size if log.exists() else 0 for node, log in self._logs.items()}
            self._processes: list[subprocess.Popen[bytes]] = []
            try:
                self._spawn()
                self._connection = self._accept(endpoint)
            except BaseException:
                self._end()
                raise
        self._met = True
        self._channel = JobChannel(self._connection)

    def _spawn(self) -> None:
        for one in self._launches:
            try:
                log = self._logs[one.node]
                self._processes.append(children.spawn(one.argv, log, script=one.script, hold=not one.is_batch))
            except FileNotFoundError as error:
                missing = Fault(FaultCode.NO_START, 0, 0, f"{one.argv[0]}: not installed here", "is it in the PATH?")
                raise JobFailedError(missing) from error

    def send(self, header: Header, body: Vector | None = None) -> None:
        """A request to rank 0."""
        with self._failing():
            self._channel.send(header, body)

    def receive(self, limit: float) -> tuple[dict[str, Any], Vector]:
        """What rank 0 says next; silence for `limit` seconds is a hang."""
        deadline = time.monotonic() + limit
        with self._failing():
            while not has_arrived(self._connection) and not self._wait_for_bytes():
                self._check_running()
                if time.monotonic() > deadline:
                    raise self._failure(_hang(limit))
            return self._channel.receive()

    def close(self) -> None:
        """Hang up, upon which every process exits, and wait for them."""
        self._channel.close()
        self._wait(_LAST_WORDS_SECONDS)
        self._end()

    def _wait_for_bytes(self) -> bool:
        return bool(select.select([self._connection], [], [], _POLL_SECONDS)[0])

    def _end(self) -> None:
        """Of a batch job only `sbatch` is our child: the job itself may run, or wait to."""
        for launch in self._launches:
            if launch.cancel:
                with contextlib.suppress(OSError, subprocess.TimeoutExpired), self._logs[launch.node].open("ab") as log:
                    subprocess.run(launch.cancel, stdout=log, stderr=log, timeout=_CANCEL_SECONDS, check=False)
        children.end(self._processes)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except EnvironmentUnfitError as error:
            raise self._failure() from error

    def _accept(self, endpoint: Endpoint) -> socket.socket:
        queued = any(launch.is_batch for launch in self._launches)
        deadline = math.inf if queued else time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                return endpoint.accept(_POLL_SECONDS)
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
        self._end()
        words = [fault for node, log in self._logs.items() for fault in faults.read(log, self._began[node])]
        words.sort(key=lambda fault: fault.code not in HOPELESS)  # the others only lost their neighbours
        return JobFailedError((words or [otherwise or self._ending(ended)])[0])

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
        if launch.argv[0] == "ssh" and code == _SSH_FAILED:
            return Fault(FaultCode.UNREACHABLE, launch.node, 0, f"ssh: {self._last_line(launch.node)}", self._look())
        if launch.is_batch and not self._met:
            return Fault(FaultCode.NO_START, 0, 0, f"sbatch: {self._last_line(launch.node)}", self._look())
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Fault(FaultCode.KILLED, launch.node, 0, f"the training job {how}", self._look())

    def _last_line(self, node: int) -> str:
        lines = self._logs[node].read_text(errors="replace").splitlines()
        return lines[-1] if lines else "no connection"

    def _look(self) -> str:
        return f"see {', '.join(map(str, self._logs.values()))}"


def _hang(seconds: float) -> Fault:
    return Fault(FaultCode.HANG, 0, 0, f"the training job has made no step for {seconds:.0f} s", "is a node gone?")
