"""Last words of a training job's processes, and what becomes of them."""

import contextlib
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, UsageError
from mpctf_secure.rounds.messages import FaultCode

_MARK = "mpctf-fault "
_MOST_LINE = 1 << 16
_SIGNALLED = re.compile(rb"rank +: (\d+) \(local_rank: \d+\)\n +exitcode +: -(\d+)")

HOPELESS = frozenset(
    {FaultCode.BAD_DATA, FaultCode.BAD_MODEL, FaultCode.NO_GPU, FaultCode.OUT_OF_MEMORY, FaultCode.DIVERGED}
)
"""The same again would end the same way."""


class Fault(NamedTuple):
    """One process's last words; `node` counts from 1, 0 is the agent's own machine; `rank` over all nodes."""

    code: FaultCode
    node: int
    rank: int
    message: str
    hint: str

    def to_error(self) -> MpctfError:
        """For the site's operator."""
        kind = UsageError if self.code in {FaultCode.BAD_DATA, FaultCode.DIVERGED} else EnvironmentUnfitError
        return kind(f"{self.message} (node {self.node}, rank {self.rank})", hint=self.hint)


class FailedError(Exception):
    """A mistake that the site's operator can mend."""

    def __init__(self, code: FaultCode, error: MpctfError) -> None:
        super().__init__(error.message)
        self.code, self.hint = code, error.hint


@contextlib.contextmanager
def as_fault(code: FaultCode) -> Iterator[None]:
    """A FailedError with this code for an error of ours inside."""
    try:
        yield
    except MpctfError as error:
        raise FailedError(code, error) from error


def tell(fault: Fault) -> None:
    """Last words, on standard error, which goes to the node's log."""
    print(_MARK + json.dumps(fault._asdict()), file=sys.stderr, flush=True)


def read(log: Path, start: int) -> Iterator[Fault]:
    """The last words in a log from byte `start` on; lines that are none are passed over."""
    with log.open("rb") as stream:
        stream.seek(start)
        for line in stream.read().splitlines():
            text = line[:_MOST_LINE].decode(errors="replace").strip()
            if text.startswith(_MARK) and (fault := _parse(text.removeprefix(_MARK))):
                yield fault


def read_signals(log: Path, start: int) -> Iterator[tuple[int, int]]:
    """(rank, signal) of processes of which torchrun says, from byte `start` on, that a signal ended them.

    Without those that torchrun itself has ended then.
    """
    with log.open("rb") as stream:
        stream.seek(start)
        for rank, signum in _SIGNALLED.findall(stream.read()):
            if int(signum) != signal.SIGTERM:
                yield int(rank), int(signum)


def _parse(text: str) -> Fault | None:
    try:
        content = json.loads(text)
        code, node, rank = FaultCode(content["code"]), int(content["node"]), int(content["rank"])
        return Fault(code, node, rank, str(content["message"]), str(content["hint"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
