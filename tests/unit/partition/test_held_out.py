from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.partition.held_out import divide

SHARES = st.decimals("0.0001", "0.5", places=4)


@given(SHARES, st.integers(2, 400), st.integers(0, 2**63 - 1), st.sampled_from(["bank-b", "hospital-a"]))
def test_rows_are_trained_on_or_held_out_and_there_are_both(share: Decimal, rows: int, seed: int, name: str) -> None:
    trained, held_out = divide(float(share), rows, seed, name)
    assert sorted(trained + held_out) == list(range(rows))
    assert (trained, held_out) == (sorted(trained), sorted(held_out))
    assert len(held_out) == max(1, int(share * rows))
    assert trained
    assert (trained, held_out) == divide(float(share), rows, seed, name)


@given(st.integers(1, 100))
def test_share_0_holds_nothing_out(rows: int) -> None:
    assert divide(0, rows, 0, "a") == (list(range(rows)), [])


@pytest.mark.parametrize(("share", "rows", "expected"), [(0.29, 100, 29), (0.001, 5, 1), (0.5, 7, 3), (0.1, 99, 9)])
def test_share_is_taken_of_the_decimal_as_it_is_written(share: float, rows: int, expected: int) -> None:
    assert len(divide(share, rows, 0, "a")[1]) == expected


def test_rows_held_out_differ_by_participant_and_seed() -> None:
    one = divide(0.2, 100, 0, "hospital-a")
    assert one != divide(0.2, 100, 0, "bank-b")
    assert one != divide(0.2, 100, 1, "hospital-a")


def test_single_row_leaves_none_to_train_on() -> None:
    assert divide(0.1, 1, 0, "a") == ([], [0])
