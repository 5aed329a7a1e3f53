"""How far the product of two mean factors is from the mean of the products, through a few random projections.

With both LoRA factors averaged the sum of the sites' updates says nothing of mean(B·A). But xᵀ·B·A·y is linear in the
product: its mean over the sites is that of the mean product. For x, y of random signs E[(xᵀ·M·y)²] = ‖M‖², Frobenius.
"""

import math
from collections.abc import Sequence

import numpy as np

from mpctf_secure.aggregation.lora import A_SUFFIX, B_SUFFIX, Schema, Vector, split_flat
from mpctf_secure.hazmat.prg import Generator

PROJECTIONS = 8


def project(flat: Vector, schema: Schema, seed: int) -> list[float]:
    """Σ xᵀ·B·A·y over all modules, for each of the projections that belong to `seed`."""
    tensors = split_flat(flat, schema)
    total = np.zeros(PROJECTIONS)
    for name, a in tensors.items():
        b = tensors.get(name.removesuffix(A_SUFFIX) + B_SUFFIX)
        if name.endswith(A_SUFFIX) and b is not None:
            left = _signs(seed, f"{name}/x", b.shape[0]) @ b
            right = _signs(seed, f"{name}/y", a.shape[1]) @ a.T
            total += (left * right).sum(axis=1)
    return [float(value) for value in total]


def _signs(seed: int, name: str, size: int) -> Vector:
    """±1 [projections, size]."""
    draws = Generator.of(seed, "bias", name).uint32(PROJECTIONS * size)
    signs: Vector = np.where(draws & 1, np.float32(1), np.float32(-1)).reshape(PROJECTIONS, size)
    return signs


def share(mean_of_products: Sequence[float], product_of_means: Sequence[float], before: Sequence[float]) -> float:
    """The difference of the first two, as a share of how far the mean of products has moved from `before`."""
    moved = math.dist(mean_of_products, before)
    return math.dist(mean_of_products, product_of_means) / moved if moved else 0.0
