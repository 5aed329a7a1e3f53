import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.partition.volumes import fixed_size, max_volume, memory_aware, percentage

SIZES = st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=2, max_size=12)
ROUNDS = st.integers(1, 50)


def aware(sites: list[tuple[int, int]], rounds: int) -> list[int]:
    total, products = sum(rows for rows, _ in sites), sum(rows * memory for rows, memory in sites)
    return [memory_aware(rows, memory, total, products, rounds) for rows, memory in sites]


def test_on_the_papers_setting_every_strategy_gives_500_rows() -> None:
    sites, rounds = [(5000, 80 * 1024), (5000, 80 * 1024)], 10
    assert [fixed_size(500, rows) for rows, _ in sites] == [500, 500]
    assert [percentage(0.1, rows) for rows, _ in sites] == [500, 500]
    assert max_volume(max(rows for rows, _ in sites), rounds) == 500
    assert aware(sites, rounds) == [500, 500]


UNEVEN = {
    "equal memory: in proportion to rows": ([(100, 16), (300, 16)], 4, [25, 75]),
    "equal rows: in proportion to memory": ([(100, 8), (100, 24)], 2, [25, 75]),
    "rows and memory multiply": ([(100, 10), (200, 20)], 1, [60, 200]),
    "nobody gets more than it has": ([(10, 1000), (1000, 1)], 2, [10, 46]),
    "nobody gets less than one": ([(1, 1), (10**6, 10**6)], 10, [1, 100000]),
    "halves are rounded up": ([(1, 1), (2, 1)], 2, [1, 1]),
}


@pytest.mark.parametrize(("sites", "rounds", "expected"), UNEVEN.values(), ids=UNEVEN.keys())
def test_memory_aware_shares_on_uneven_sites(sites: list[tuple[int, int]], rounds: int, expected: list[int]) -> None:
    assert aware(sites, rounds) == expected


@given(SIZES, ROUNDS)
def test_memory_aware_shares_add_up_to_what_a_round_has(sites: list[tuple[int, int]], rounds: int) -> None:
    shares = aware(sites, rounds)
    assert all(1 <= share <= rows for share, (rows, _) in zip(shares, sites, strict=True))
    assert sum(shares) <= sum(rows for rows, _ in sites) / rounds + len(sites)


def test_memory_aware_rounds_to_the_nearest() -> None:
    assert [memory_aware(100, m, 200, 100 * 16, 4) for m in (8, 9, 10)] == [25, 28, 31]


@pytest.mark.parametrize(("share", "rows", "expected"), [(0.29, 100, 29), (0.001, 5, 1), (1.0, 7, 7), (0.1, 99, 9)])
def test_percentage_is_taken_of_the_decimal_as_it_is_written(share: float, rows: int, expected: int) -> None:
    assert percentage(share, rows) == expected


@given(st.integers(1, 10**6), ROUNDS)
def test_max_volume_uses_up_the_largest_data_set_in_the_rounds_there_are(largest: int, rounds: int) -> None:
    count = max_volume(largest, rounds)
    assert count * rounds >= largest > (count - 1) * rounds
