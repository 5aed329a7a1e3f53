"""FedAvg (McMahan et al. 2017) on the mean update."""

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]


def step(adapter: Vector, mean_update: Vector, server_learning_rate: float) -> Vector:
    """adapter + η·mean [d] in float32, one multiplication and one addition for each coordinate."""
    moved = mean_update * np.float32(server_learning_rate)
    moved += adapter
    return moved
