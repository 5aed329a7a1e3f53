"""What participants' nodes use, by their own account: in short for the screen, over a run for the report."""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

_GIB = 1 << 30
Fields = dict[str, Any]
"""Of a `resources` event, or of one of its GPUs."""


def in_short(nodes: Sequence[Fields]) -> str:
    """The last events of one participant's nodes: mean use, memory of all together, the hottest GPU."""
    gpus = [gpu for node in nodes for gpu in node["gpus"]]
    count = [f"{len(nodes)} nodes"] if len(nodes) > 1 else []
    parts = [*count, f"cpu {_percent(fmean(_known(nodes, 'cpu')))}", f"ram {_memory(nodes)}"]
    return "  ".join(parts + ([_gpus(gpus)] if gpus else []))


def _gpus(gpus: Sequence[Fields]) -> str:
    parts = [f"gpu{gpus[0]['index']}" if len(gpus) == 1 else f"{len(gpus)} gpus"]
    if _known(gpus, "memory_total"):
        parts.append(_memory(gpus))
    if uses := _known(gpus, "use"):
        parts.append(_percent(fmean(uses)))
    if temperatures := _known(gpus, "temperature"):
        parts.append(f"{max(temperatures)} °C")
    return " ".join(parts)


def _known(parts: Sequence[Fields], name: str) -> list[Any]:
    return [part[name] for part in parts if part[name] is not None]


def _memory(parts: Sequence[Fields]) -> str:
    used, total = (_gib(sum(_known(parts, name))) for name in ("memory_used", "memory_total"))
    return f"{used}/{total} GiB"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2g}" if size < 10 * _GIB else f"{size / _GIB:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def over_the_run(events: Path) -> dict[str, list[Fields]]:
    """By participant, a record of each node: read from the run's events, so that no earlier process is forgotten."""
    found = defaultdict[str, defaultdict[int, _Totals]](lambda: defaultdict(_Totals))
    for event in _read(events):
        found[event["participant"]][event["node"]].add(event)
    return {
        name: [{"node": node, **totals.to_dict()} for node, totals in sorted(nodes.items())]
        for name, nodes in sorted(found.items())
    }


def _read(events: Path) -> Iterator[Fields]:
    """One line at a time: a week's events are many, and most are of another kind."""
    with events.open("rb") as lines:
        for line in lines:
            if b'"event": "resources"' in line:
                yield json.loads(line)


@dataclass
class _Totals:
    """Of one node's events."""

    samples: int = 0
    cpu: float = 0.0
    memory: int = 0
    gpu_samples: int = 0
    gpu_use: float = 0.0
    gpu_memory: int = 0
    disk_free: float = math.inf
    sent: int = 0
    received: int = 0

    def add(self, fields: Fields) -> None:
        """One event more."""
        uses = _known(fields["gpus"], "use")
        self.samples += 1
        self.cpu += fields["cpu"]
        self.memory = max(self.memory, fields["memory_used"])
        self.gpu_samples += len(uses)
        self.gpu_use += sum(uses)
        self.gpu_memory = max([self.gpu_memory, *_known(fields["gpus"], "memory_used")])
        self.disk_free = min(self.disk_free, fields["disk_free"])
        self.sent, self.received = max(self.sent, fields["sent"]), max(self.received, fields["received"])

    def to_dict(self) -> Fields:
        """Mean use, most memory of the node and of one of its GPUs (None where no GPU tells), least disk [bytes], and
        the most that its network carried [bytes/s].
        """
        return {
            "samples": self.samples,
            "cpu_mean": round(self.cpu / self.samples, 3),
            "memory_used_max": self.memory,
            "gpu_use_mean": round(self.gpu_use / self.gpu_samples, 3) if self.gpu_samples else None,
            "gpu_memory_used_max": self.gpu_memory or None,
            "disk_free_min": self.disk_free,
            "sent_max": self.sent,
            "received_max": self.received,
        }
