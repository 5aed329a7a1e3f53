import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpctf_secure.errors import SecurityError, UsageError
from mpctf_secure.parallel import ordered_map
from mpctf_secure.secagg import codec
from mpctf_secure.secagg.codec import Grid


def seed(number: int = 0) -> bytes:
    return bytes([number]) * 32


@given(st.integers(2, 100), st.sampled_from([16, 32]))
def test_n_values_at_the_edge_of_the_range_never_wrap(n: int, bits: int) -> None:
    grid = Grid((2,), (0.5,), bits, n)
    lanes, clipped = codec.encode(np.array([9.0, -9.0], np.float32), 1.0, grid, seed())
    total = sum(lanes for _ in range(n)) if n == 1 else np.add.reduce([lanes] * n)
    mean = codec.decode_mean(total.astype(lanes.dtype), n, 1, grid)
    assert np.allclose(mean, [0.5, -0.5])
    assert clipped == [2]


def test_one_more_than_the_grid_allows_wraps() -> None:
    """So the headroom is exactly what is needed."""
    n = 10
    grid = Grid((1,), (1.0,), 16, n)
    assert grid.largest == 3276
    lanes, _ = codec.encode(np.array([1.0], np.float32), 1.0, grid, seed())
    total = np.add.reduce([lanes] * (n + 1)).astype("<u2")
    assert codec.decode_mean(total, n + 1, 1, grid)[0] < 0


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.integers(2, 20))
@settings(max_examples=50)
def test_mean_is_within_one_step_of_the_truth(values: list[float], n: int) -> None:
    grid = Grid((len(values),), (1.0,), 32, n)
    updates = [np.array(values, np.float32) * (1 - i / n) for i in range(n)]
    total = np.add.reduce([codec.encode(u.astype(np.float32), 1.0, grid, seed(i))[0] for i, u in enumerate(updates)])
    mean = codec.decode_mean(total.astype("<u4"), n, 1, grid)
    assert np.abs(mean - np.mean(updates, axis=0)).max() <= 1.0 / grid.largest + 1e-6


def test_weights_multiply_before_rounding_and_divide_out() -> None:
    grid = Grid((3,), (2.0,), 32, 2)
    a, b = np.array([1, -1, 0.5], np.float32), np.array([0, 1, 1], np.float32)
    rows, cap = (10, 40), 40
    lanes = [codec.encode(u, r / cap, grid, seed(r))[0] for u, r in zip((a, b), rows, strict=True)]
    mean = codec.decode_mean((lanes[0] + lanes[1]).astype("<u4"), sum(rows), cap, grid)
    assert np.allclose(mean, (10 * a + 40 * b) / 50, atol=1e-6)


def test_rounding_is_unbiased_and_follows_the_seed() -> None:
    grid = Grid((200_000,), (1.0,), 16, 10)
    update = np.full(200_000, 0.12345, np.float32)
    lanes, _ = codec.encode(update, 1.0, grid, seed())
    again, _ = codec.encode(update, 1.0, grid, seed())
    assert np.array_equal(lanes, again)
    assert abs(lanes.mean() / grid.largest - 0.12345) < 3e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(UsageError, match="tensor 1"):
        codec.encode(np.array([0, bad], np.float32), 1.0, Grid((1, 1), (1.0, 1.0), 32, 3), seed())


def test_slabs_cover_every_coordinate_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "SLAB", 4)
    slabs = Grid((3, 9, 1), (1.0, 2.0, 3.0), 32, 3).slabs()
    covered = [(tensor, i) for slab in slabs for tensor, where in slab for i in range(where.start, where.stop)]
    assert covered == [(0, i) for i in range(3)] + [(1, i) for i in range(3, 12)] + [(2, 12)]
    assert [sum(where.stop - where.start for _, where in slab) for slab in slabs] == [4, 4, 4, 1]


@given(st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=5))
def test_scalars_sum_as_integers(values: list[int]) -> None:
    lanes = codec.encode_scalars(values, 4)
    assert codec.decode_scalars(np.add(np.add(lanes, lanes), np.add(lanes, lanes))) == [4 * v for v in values]


def test_scalar_that_could_overflow_is_refused() -> None:
    with pytest.raises(UsageError, match="scalar 0"):
        codec.encode_scalars([2**62], 4)


@pytest.mark.parametrize(
    ("value", "sign"), [(1e300, 1), (-math.inf, -1), (math.nan, 1), (2.0**61, 1), (-(2.0**61), -1)]
)
def test_scalar_that_only_informs_is_cut_at_the_limit(value: float, sign: int) -> None:
    shown = codec.saturated(value, 4)
    assert shown == sign * codec.scalar_limit(4)
    codec.encode_scalars([shown], 4)
    assert codec.saturated(-2.5e9, 4) == -2_500_000_000


def test_sum_without_weight_is_refused() -> None:
    with pytest.raises(SecurityError, match="no mean"):
        codec.decode_mean(np.zeros(1, "<u4"), 0, 1, Grid((1,), (1.0,), 32, 3))


def test_update_of_another_size_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="shape"):
        codec.encode(np.zeros(2, np.float32), 1.0, Grid((1,), (1.0,), 32, 3), seed())


@pytest.mark.parametrize(("bits", "n"), [(16, 2), (16, 10), (32, 2), (32, 100)])
def test_value_at_the_range_stays_within_the_headroom_for_every_draw(bits: int, n: int, monkeypatch) -> None:
    """max|q| plus a draw just below 1 rounds up to the next float; n times that would wrap."""
    monkeypatch.setattr(codec, "keystream", lambda _seed, _chunk, size: np.full(size, 255, np.uint8))
    grid = Grid((3,), (1.0,), bits, n)
    lanes, clipped = codec.encode(np.array([1, -1, 2], np.float32), 1.0, grid, seed())
    signed = lanes.view(f"<i{lanes.itemsize}").astype(int)
    assert np.abs(signed).max() <= grid.largest
    assert clipped == [1]
    assert n * grid.largest <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [16, 32])
def test_threads_and_slabs_change_nothing(bits: int) -> None:
    grid = Grid((codec.SLAB - 5, 17, codec.SLAB), (0.5, 1.0, 2.0), bits, 3)
    update = np.sin(np.arange(grid.dimension, dtype=np.float32))
    one, many = codec.encode(update, 0.7, grid, seed()), codec.encode(update, 0.7, grid, seed(), ordered_map)
    assert np.array_equal(one[0], many[0])
    assert one[1] == many[1]
    assert one[1][0] > 0
    mean = codec.decode_mean(one[0], 1, 1, grid, ordered_map)
    inside = np.abs(update * 0.7) < 0.5
    assert np.abs(mean[inside] - update[inside] * 0.7).max() <= 2.0 / grid.largest + 1e-6
