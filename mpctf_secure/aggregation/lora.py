"""LoRA adapters as one flat float32 vector in canonical order."""

import math
from collections.abc import Mapping, Sequence
from itertools import compress, pairwise

import numpy as np
import numpy.typing as npt

from mpctf_secure.config.strategies import Factors
from mpctf_secure.hazmat.prg import Generator

Vector = npt.NDArray[np.float32]
Schema = Sequence[tuple[str, tuple[int, ...]]]
"""(PEFT state-dict name, shape) of every LoRA tensor, sorted by name: the order of the flat vector."""

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


def moving(schema: Schema, factors: Factors, turn: int) -> tuple[bool, ...]:
    """For each tensor whether it is trained and travels in turn 1, 2, …, void rounds not counted: B moves first, since
    A has no gradient while B is zero.

    Where one factor stands still the mean of the products B·A is the product of the means; with both it is not.
    """
    if factors == "both":
        return (True,) * len(schema)
    suffix = A_SUFFIX if factors == "alternating" and turn % 2 == 0 else B_SUFFIX
    return tuple(name.endswith(suffix) for name, _ in schema)


def pick(flat: Vector, schema: Schema, which: Sequence[bool]) -> Vector:
    """The coordinates of some tensors; `flat` itself where these are all."""
    return flat if all(which) else np.concatenate([flat[:0], *(flat[where] for where in _places(schema, which))])


def put(flat: Vector, schema: Schema, which: Sequence[bool], part: Vector) -> Vector:
    """A vector with these coordinates from `part` and all others from `flat`."""
    if all(which):
        return part
    whole, start = flat.copy(), 0
    for where in _places(schema, which):
        size = where.stop - where.start
        whole[where] = part[start : start + size]
        start += size
    return whole


def _places(schema: Schema, which: Sequence[bool]) -> list[slice]:
    ends = [int(end) for end in np.cumsum([0, *(math.prod(shape) for _, shape in schema)])]
    return [slice(*ends) for ends in compress(pairwise(ends), which)]


def flat_size(schema: Schema) -> int:
    """Length of the flat vector."""
    return sum(math.prod(shape) for _, shape in schema)


def split_flat(flat: Vector, schema: Schema) -> dict[str, Vector]:
    """The tensors of a flat vector, as views; ValueError unless its length is `flat_size`."""
    if flat.shape != (flat_size(schema),):
        raise ValueError(f"the adapter has shape {flat.shape}, the schema needs ({flat_size(schema)},)")
    ends = np.cumsum([math.prod(shape) for _, shape in schema])
    pieces = np.split(flat, ends[:-1])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(schema, pieces, strict=True)}


def join_flat(tensors: Mapping[str, Vector], schema: Schema) -> Vector:
    """The flat vector of a full set of tensors."""
    return np.concatenate([tensors[name].astype(np.float32).ravel() for name, _ in schema])


def initial_adapter(schema: Schema, seed: int) -> Vector:
    """A uniform in ±1/√fan-in, as PEFT's default (Kaiming with a = √5), and B zero: the model starts as the base.

    A function of the contract alone, so that every site has the same one bit by bit whatever its torch does.
    """
    return np.concatenate([_initial(name, shape, seed) for name, shape in schema])


def _initial(name: str, shape: tuple[int, ...], seed: int) -> Vector:
    size = math.prod(shape)
    if name.endswith(B_SUFFIX):
        return np.zeros(size, np.float32)
    unit = Generator.of(seed, "adapter-0", name).uint32(size) / 2**31 - 1
    return (unit / math.sqrt(shape[-1])).astype(np.float32)
