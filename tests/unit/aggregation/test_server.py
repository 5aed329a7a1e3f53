import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.aggregation import server
from mpctf_secure.config.strategies import Aggregation, FedAdagrad, FedAdam, FedAvg, FedProx, FedYogi


def by_the_paper(strategy: FedAdam | FedAdagrad, updates: list[float]) -> float:
    """Reddi et al. 2021, algorithm 2, one coordinate in double precision."""
    x, m, v = 0.5, 0.0, strategy.tau**2
    for delta in updates:
        m = strategy.beta1 * m + (1 - strategy.beta1) * delta
        match strategy:
            case FedYogi():
                v = v - (1 - strategy.beta2) * delta**2 * math.copysign(1.0, v - delta**2)
            case FedAdam():
                v = strategy.beta2 * v + (1 - strategy.beta2) * delta**2
            case _:
                v = v + delta**2
        x = x + strategy.server_learning_rate * m / (math.sqrt(v) + strategy.tau)
    return x


def ours(strategy: Aggregation, updates: list[float]) -> float:
    vectors = (np.full(3, 0.5, np.float32), *server.initial_moments(strategy, 3))
    for delta in updates:
        vectors = server.step(strategy, vectors, np.full(3, delta, np.float32))
    assert all(vector.dtype == np.float32 and vector.shape == (3,) for vector in vectors)
    return float(vectors[0][0])


@pytest.mark.parametrize("strategy", [FedAdam(), FedYogi(), FedAdagrad(), FedAdagrad(beta1=0.9), FedAdam(tau=0.1)])
@given(updates=st.lists(st.floats(-0.5, 0.5, width=32).filter(lambda u: abs(u) > 1e-4), min_size=1, max_size=8))
def test_adaptive_steps_are_those_of_the_paper(strategy: FedAdam | FedAdagrad, updates: list[float]) -> None:
    assert ours(strategy, updates) == pytest.approx(by_the_paper(strategy, updates), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("strategy", [FedAvg(server_learning_rate=0.5), FedProx(server_learning_rate=0.5)])
def test_fedavg_and_fedprox_add_the_mean_times_the_rate_and_keep_nothing(strategy: Aggregation) -> None:
    assert ours(strategy, [0.25, -0.5]) == 0.5 + 0.125 - 0.25
    assert server.initial_moments(strategy, 3) == ()


def test_steps_of_vectors_longer_than_a_slab_are_those_of_their_coordinates() -> None:
    size, strategy = 300_000, FedAdam()
    mean = np.linspace(-1, 1, size, dtype=np.float32)
    vectors = (np.zeros(size, np.float32), *server.initial_moments(strategy, size))
    whole = server.step(strategy, vectors, mean)
    tail = server.step(strategy, tuple(vector[-10:] for vector in vectors), mean[-10:])
    assert all(np.array_equal(one[-10:], other) for one, other in zip(whole, tail, strict=True))
