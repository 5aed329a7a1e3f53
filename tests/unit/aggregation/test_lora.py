import numpy as np
import pytest
from samples import TENSORS

from mpctf_secure.aggregation.lora import flat_size, moving, pick, put

SCHEMA = (*TENSORS, ("n.lora_A.weight", (2, 3)), ("n.lora_B.weight", (5, 2)))
A, B = (True, False, True, False), (False, True, False, True)
TURNS = {
    ("both", 1): (True,) * 4,
    ("both", 2): (True,) * 4,
    ("freeze_a", 1): B,
    ("freeze_a", 2): B,
    ("alternating", 1): B,
    ("alternating", 2): A,
    ("alternating", 3): B,
}


@pytest.mark.parametrize(("factors", "turn"), TURNS)
def test_the_factors_that_move_in_a_turn(factors: str, turn: int) -> None:
    assert moving(SCHEMA, factors, turn) == TURNS[factors, turn]


@pytest.mark.parametrize("which", [A, B, (True,) * 4, (False,) * 4])
def test_what_is_put_is_picked_and_the_rest_stays(which: tuple[bool, ...]) -> None:
    flat = np.arange(flat_size(SCHEMA), dtype=np.float32)
    size = pick(flat, SCHEMA, which).size
    part = -np.arange(1, size + 1, dtype=np.float32)
    whole = put(flat, SCHEMA, which, part)
    assert np.array_equal(pick(whole, SCHEMA, which), part)
    still = tuple(not moves for moves in which)
    assert np.array_equal(pick(whole, SCHEMA, still), pick(flat, SCHEMA, still))
    assert np.array_equal(flat, np.arange(flat.size))


def test_with_one_factor_frozen_the_mean_of_products_is_the_product_of_means_and_with_both_it_is_not() -> None:
    draws = np.random.default_rng(1)
    a, b = draws.normal(size=(3, 2, 6)), draws.normal(size=(3, 4, 2))
    frozen = a[0]
    assert np.allclose(np.mean([part @ frozen for part in b], axis=0), b.mean(axis=0) @ frozen)
    assert not np.allclose(np.mean(b @ a, axis=0), b.mean(axis=0) @ a.mean(axis=0), atol=0.1)
