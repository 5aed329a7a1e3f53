"""Last words of a training job's processes, and what becomes of them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpctf_secure.errors import EnvironmentUnfitError, MpctfError, UsageError
from mpctf_secure.rounds.messages import FaultCode

_MARK = "mpctf-fault "
_MOST_LINE = 1 << 16


HOPELESS = frozenset({FaultCode.BAD_DATA, FaultCode.BAD_MODEL, FaultCode.NO_GPU, FaultCode.OUT_OF_MEMORY})
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
        kind = UsageError if self.code == FaultCode.BAD_DATA else EnvironmentUnfitError
        return kind(f"{self.message} (node {self.node}, rank {self.rank})", hint=self.hint)


def tell(code: FaultCode, node: int, rank: int, message: str, hint: str) -> None:
    """Last words, on standard error, which goes to the node's log."""
    content = {"code": code, "node": node, "rank": rank, "message": message, "hint": hint}
    print(_MARK + json.dumps(content), file=sys.stderr, flush=True)


def read(log: Path, start: int) -> Iterator[Fault]:
    """The last words in a log from byte `start` on; lines that are none are passed over."""
    with log.open("rb") as stream:
        stream.seek(start)
        for line in stream.read().splitlines():
            text = line[:_MOST_LINE].decode(errors="replace").strip()
            if text.startswith(_MARK) and (fault := _parse(text.removeprefix(_MARK))):
                yield fault


def _parse(text: str) -> Fault | None:
    try:
        content = json.loads(text)
        code, node, rank = FaultCode(content["code"]), int(content["node"]), int(content["rank"])
        return Fault(code, node, rank, str(content["message"]), str(content["hint"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
