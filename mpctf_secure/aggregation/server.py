"""The server's step, whatever the strategy: from adapter, moments and mean update to the next adapter and moments.

FedAvg: McMahan et al. 2017. FedAdam, FedYogi and FedAdagrad: Reddi et al. 2021, algorithm 2, on the mean update Δ:
m ← β1·m + (1 − β1)·Δ, then v by strategy, then adapter ← adapter + η·m/(√v + τ). v begins at τ², m at zero; there is no
bias correction, as in the paper.
"""

from collections.abc import Callable

import numpy as np

from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.config.strategies import Adaptive, Aggregation, FedAdagrad, FedYogi

_SLAB = 1 << 18  # coordinates whose temporaries stay in the cache


def initial_moments(strategy: Aggregation, dimension: int) -> tuple[Vector, ...]:
    """What the strategy keeps from round to round, each [d]: m and v, or nothing for FedAvg and FedProx."""
    if not isinstance(strategy, Adaptive):
        return ()
    return np.zeros(dimension, np.float32), np.full(dimension, strategy.tau**2, np.float32)


def step(strategy: Aggregation, vectors: tuple[Vector, ...], mean: Vector) -> tuple[Vector, ...]:
    """Adapter and moments [d] after a round with this mean update [d], each operation rounded to float32 by itself.

    FedProx differs in local training only.
    """
    rate = np.float32(strategy.server_learning_rate)
    if not isinstance(strategy, Adaptive):
        moved = mean * rate
        moved += vectors[0]
        return (moved,)
    adapter, first, second = vectors
    tau, beta1 = np.float32(strategy.tau), np.float32(strategy.beta1)
    new, step_second = tuple(np.empty_like(adapter) for _ in range(3)), _second(strategy)
    for start in range(0, adapter.size, _SLAB):
        where = slice(start, start + _SLAB)
        moved, m, v = (vector[where] for vector in new)
        delta = mean[where]
        m[:] = beta1 * first[where] + (np.float32(1) - beta1) * delta
        v[:] = step_second(second[where], delta * delta)
        moved[:] = adapter[where] + rate * m / (np.sqrt(v) + tau)
    return new


def _second(strategy: Adaptive) -> Callable[[Vector, Vector], Vector]:
    """The next v of the last one and Δ²."""
    if isinstance(strategy, FedAdagrad):
        return np.add
    rest = np.float32(1) - np.float32(strategy.beta2)
    if isinstance(strategy, FedYogi):
        return lambda v, square: v - rest * square * np.sign(v - square)
    return lambda v, square: np.float32(strategy.beta2) * v + rest * square
