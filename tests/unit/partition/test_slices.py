from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.partition.slices import round_slice
from mpctf_secure.partition.trial import split_by_label, split_iid
from mpctf_secure.partition.volumes import fixed_size


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 5))
def test_slices_use_every_row_once_before_any_row_twice(rows: int, size: int, epochs: int) -> None:
    count = fixed_size(size, rows)
    rounds = rows * epochs
    seen = Counter(i for r in range(1, rounds + 1) for i in round_slice(r, count, rows, 0, "a"))
    assert set(seen) == set(range(rows))
    assert max(seen.values()) - min(seen.values()) == 0


def test_slices_differ_by_participant_and_seed_and_can_be_made_again() -> None:
    one = round_slice(2, 20, 100, 0, "hospital-a")
    assert one == round_slice(2, 20, 100, 0, "hospital-a")
    assert one != round_slice(2, 20, 100, 0, "bank-b")
    assert one != round_slice(2, 20, 100, 1, "hospital-a")
    assert not set(one) & set(round_slice(1, 20, 100, 0, "hospital-a"))


@given(st.integers(1, 60), st.integers(2, 6))
def test_iid_split_deals_every_row_once(rows: int, parts: int) -> None:
    divided = split_iid(rows, parts, 0)
    assert sorted(i for part in divided for i in part) == list(range(rows))
    assert max(map(len, divided)) - min(map(len, divided)) <= 1


@given(st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=80), st.integers(2, 6))
def test_label_split_deals_every_row_once_and_everyone_lacks_labels(labels: list[str], parts: int) -> None:
    divided = split_by_label(labels, parts, 0)
    assert sorted(i for part in divided for i in part) == list(range(len(labels)))
    for label in set(labels):
        holders = [part for part in divided if any(labels[i] == label for i in part)]
        assert len(holders) <= max(1, parts // 2)
