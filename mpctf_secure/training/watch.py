"""What the nodes of a training job use: the first process of each takes samples, and the head has them all.

They meet in the store by which the processes found each other, over connections of their own: collectives must not come
from two threads, and lines in a node's log would make it grow for as long as it trains. Whatever hangs, fails or gets
lost here, training goes on.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.monitoring.resources import Resources, Sampler
from mpctf_secure.monitoring.usage import MOST_NODES

_FIRST_SECONDS, _SECONDS = 0.1, 5.0


class Watch:
    """Takes samples of this node, numbered from 1."""

    def __init__(self, node: int, gpus: Collection[int], folder: Path, *, gathers: bool) -> None:
        """Of these GPUs and of the disk of `folder`; `gathers`: those of all other nodes too."""
        self._node, self._gpus, self._folder, self._gathers = node, gpus, folder, gathers
        self._latest: deque[dict[int, str]] = deque(maxlen=1)  # which two threads may use without a lock

    def start(self) -> None:
        """Begin, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def take(self) -> dict[int, str]:
        """The latest sample of each node, once, as JSON; does not wait."""
        return self._latest.pop() if self._latest else {}

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError, EnvironmentUnfitError):  # the store is gone, or the disk
            store = _join_store()
            sampler = Sampler(self._folder)  # here, since the driver may hang already
            sampler.sample()  # rates are since the sample before
            for pause in _pauses():
                time.sleep(pause)
                store.set(_key(self._node), self._sample(sampler).to_json().decode())
                if self._gathers and (found := dict(_gather(store))):
                    self._latest.append(found)

    def _sample(self, sampler: Sampler) -> Resources:
        sample = sampler.sample()
        return replace(sample, gpus=tuple(gpu for gpu in sample.gpus if gpu.index in self._gpus))


def _pauses() -> Iterator[float]:
    """Short at first, so that all nodes are seen when training begins."""
    pause = _FIRST_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, _SECONDS)


def _join_store() -> Any:
    """What torchrun tells every process of; without it there is one process."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()  # type: ignore[attr-defined]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, wait_for_workers=False)  # type: ignore[attr-defined]


def _key(node: int) -> str:
    return f"mpctf-secure/resources/{node}"


def _gather(store: Any) -> Iterator[tuple[int, str]]:
    """Each sample once: what a node has left there long ago is not what it uses."""
    for node in range(1, min(int(os.environ.get("GROUP_WORLD_SIZE", "1")), MOST_NODES) + 1):
        if store.check([_key(node)]):
            yield node, store.get(_key(node)).decode()
            store.delete_key(_key(node))
