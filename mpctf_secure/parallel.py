"""All cores for work in chunks: AES, SHA-256 and numpy release the interpreter's lock, so threads suffice."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

I = TypeVar("I")  # noqa: E741
O = TypeVar("O")  # noqa: E741

CORES = len(os.sched_getaffinity(0))
_AHEAD = 2 * CORES  # results that may wait for their consumer: bounds memory
_pool = ThreadPoolExecutor(CORES, thread_name_prefix="cores")


def ordered_map(function: Callable[[I], O], items: Iterable[I]) -> Iterator[O]:
    """Like `map`, in order, on all cores, a few results ahead of the consumer. `function` may not call this again."""
    waiting: deque[Future[O]] = deque()
    try:
        for item in items:
            waiting.append(_pool.submit(function, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
