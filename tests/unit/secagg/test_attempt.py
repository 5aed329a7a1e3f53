import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator import STAGES, Attempt

from mpctf_secure.errors import ParticipationError
from mpctf_secure.hazmat.prg import CHUNK_BYTES
from mpctf_secure.quorum import default_colluders
from mpctf_secure.secagg.parameters import floor, threshold

SURVIVABLE = {
    "three of three survive": Attempt(3),
    "four of four survive": Attempt(4),
    "three of four: one never advertises": Attempt(4, drops={0: "advertise"}),
    "three of four: one drops before sharing keys": Attempt(4, drops={1: "share"}),
    "three of four: one drops after sharing keys": Attempt(4, drops={2: "upload"}),
    "three of four: one drops after masked input": Attempt(4, drops={3: "confirm"}),
    "three of four: one drops before unmask": Attempt(4, drops={0: "release"}),
    "seven of ten: one drops at each of three stages": Attempt(10, drops={1: "share", 4: "upload", 8: "release"}),
    "a pair, both survive": Attempt(2),
    "16-bit lanes with a dropout": Attempt(4, bits=16, drops={2: "upload"}),
}


@pytest.mark.parametrize("attempt", SURVIVABLE.values(), ids=SURVIVABLE.keys())
def test_sum_is_exact(attempt: Attempt) -> None:
    lanes, scalars = attempt.run()
    expected_lanes, expected_scalars = attempt.plain()
    assert np.array_equal(lanes, expected_lanes)
    assert np.array_equal(scalars, expected_scalars)


@given(st.data())
@settings(max_examples=40)
def test_sum_is_exact_for_any_cohort_and_any_bearable_dropouts(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 14))
    bearable = n - floor(n, default_colluders(n))
    gone = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=bearable))
    drops = {i: data.draw(st.sampled_from(STAGES)) for i in gone}
    attempt = Attempt(n, bits=data.draw(st.sampled_from([16, 32])), drops=drops, dimension=data.draw(st.integers(1, 9)))
    lanes, scalars = attempt.run()
    assert np.array_equal(lanes, attempt.plain()[0])
    assert np.array_equal(scalars, attempt.plain()[1])


@pytest.mark.parametrize("n", [31, pytest.param(100, marks=pytest.mark.slow)])
def test_sum_is_exact_in_large_cohorts_with_as_many_dropouts_as_they_bear(n: int) -> None:
    bearable = n - floor(n, default_colluders(n))
    drops = {i: STAGES[i % len(STAGES)] for i in range(bearable)}
    attempt = Attempt(n, bits=16, dimension=3, drops=drops)
    lanes, scalars = attempt.run()
    assert np.array_equal(lanes, attempt.plain()[0])
    assert np.array_equal(scalars, attempt.plain()[1])


@pytest.mark.slow
def test_hundred_participants_33_dropouts_and_a_million_coordinates() -> None:
    """The malicious threshold: c = 33, t = 67. All 33 drop after share keys, so 33·67 pair masks must come off."""
    attempt = Attempt(100, bits=32, dimension=1_000_000, drops=dict.fromkeys(range(33), "upload"))
    assert (attempt.context.threshold, attempt.context.floor) == (67, 67)
    lanes, scalars = attempt.run()
    assert np.array_equal(lanes, attempt.plain()[0])
    assert np.array_equal(scalars, attempt.plain()[1])


@pytest.mark.parametrize("stage", STAGES)
def test_one_dropout_too_many_ends_the_attempt_and_names_who_is_missing(stage: str) -> None:
    attempt = Attempt(4, drops={1: stage, 2: stage})
    with pytest.raises(ParticipationError) as caught:
        attempt.run()
    missing = {attempt.clients[i].me.hex() for i in (1, 2)}
    assert set(caught.value.culprits) == missing


def test_sum_is_exact_over_several_chunks() -> None:
    dimension = CHUNK_BYTES // 4 + 3
    attempt = Attempt(3, dimension=dimension)
    assert np.array_equal(attempt.run()[0], attempt.plain()[0])
    sizes = [len(chunk) for chunk in next(iter(attempt.uploads.values()))]
    assert sizes == attempt.context.layout.sizes == [CHUNK_BYTES, 12, 32]


def test_repeated_message_changes_nothing_and_a_different_one_is_refused() -> None:
    attempt = Attempt(3)
    advert = attempt.clients[0].advertise()
    attempt.server.accept_advert(advert)
    attempt.server.accept_advert(advert)
    assert attempt.server.received == {attempt.clients[0].me}


@pytest.mark.parametrize(
    ("n", "colluders", "expected_threshold", "expected_floor"),
    [(3, 1, 3, 3), (4, 1, 3, 3), (10, 3, 7, 7), (100, 33, 67, 67), (2, 0, 2, 2)],
)
def test_thresholds_of_the_design(n: int, colluders: int, expected_threshold: int, expected_floor: int) -> None:
    assert default_colluders(n) == colluders
    assert threshold(n, colluders) == expected_threshold
    assert floor(n, colluders) == expected_floor
    assert 2 * threshold(n, colluders) > n + colluders
