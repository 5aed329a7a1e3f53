"""Flower's secure aggregation on the same vectors: run by secagg.py in an environment that has flwr (1.42).

Usage: python flower_peer.py DIMENSION PARTICIPANTS DROPOUTS; prints seconds as JSON. Only Flower's own functions are
timed, in the order in which its client mod (`_collect_masked_vectors`) and its workflow (`unmask_stage`) call them,
without serialisation, and on one thread, which is all they use.
"""

import json
import os
import sys
import time

import numpy as np
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

CLIPPING_RANGE, TARGET_RANGE, MOD_RANGE = 8.0, 1 << 22, 1 << 32  # its workflow's defaults


def client(update: np.ndarray, participants: int) -> list[np.ndarray]:
    """Quantise, add the private mask and one pairwise mask for each other participant."""
    quantized = quantize(parameters_multiply([update], 0.7), CLIPPING_RANGE, TARGET_RANGE)
    vector = factor_combine(1, quantized)
    shapes = [array.shape for array in vector]
    vector = parameters_addition(vector, pseudo_rand_gen(os.urandom(32), MOD_RANGE, shapes))
    for peer in range(participants - 1):
        mask = pseudo_rand_gen(os.urandom(32), MOD_RANGE, shapes)
        vector = (parameters_addition if peer % 2 else parameters_subtraction)(vector, mask)
    return parameters_mod(vector, MOD_RANGE)


def server(masked: list[np.ndarray], participants: int, dropouts: int) -> None:
    """Remove the private masks of the survivors and all pairwise masks of the dropouts from the sum."""
    shapes, survivors = [array.shape for array in masked], participants - dropouts
    for _ in range(survivors):
        masked = parameters_subtraction(masked, pseudo_rand_gen(os.urandom(32), MOD_RANGE, shapes))
    for _ in range(dropouts * (participants - 1)):  # it also removes the masks between two dropouts
        masked = parameters_addition(masked, pseudo_rand_gen(os.urandom(32), MOD_RANGE, shapes))
    dequantize(parameters_mod(masked, MOD_RANGE)[1:], CLIPPING_RANGE, TARGET_RANGE)


def main() -> None:
    """The better of two runs of each end."""
    dimension, participants, dropouts = map(int, sys.argv[1:])
    update = (np.random.default_rng(0).standard_normal(dimension) * 1e-3).astype(np.float32)
    seconds: dict[str, float] = {"client": float("inf"), "server": float("inf")}
    for _ in range(2):
        started = time.perf_counter()
        masked = client(update, participants)
        middle = time.perf_counter()
        server(masked, participants, dropouts)
        took = {"client": middle - started, "server": time.perf_counter() - middle}
        seconds = {end: min(took[end], seconds[end]) for end in took}
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
