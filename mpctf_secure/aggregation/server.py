"""The server's step, whatever the strategy: from adapter, moments and mean update to the next adapter and moments."""

from mpctf_secure.aggregation import adaptive, fedavg
from mpctf_secure.aggregation.lora import Vector
from mpctf_secure.config.strategies import Adaptive, Aggregation


def initial_moments(aggregation: Aggregation, dimension: int) -> tuple[Vector, ...]:
    """What the strategy keeps from round to round, each [d]; nothing for FedAvg and FedProx."""
    return adaptive.initial_moments(aggregation, dimension) if isinstance(aggregation, Adaptive) else ()


def step(aggregation: Aggregation, vectors: tuple[Vector, ...], mean: Vector) -> tuple[Vector, ...]:
    """Adapter and moments [d] after a round with this mean update [d]. FedProx differs in local training only."""
    if isinstance(aggregation, Adaptive):
        return adaptive.step(aggregation, vectors, mean)
    return (fedavg.step(vectors[0], mean, aggregation.server_learning_rate),)
