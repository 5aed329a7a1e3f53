"""A real run: everything the coordinator received holds no update, no count and no loss, and yet the sum is exact."""

from pathlib import Path

import numpy as np
import pytest
from e2e.harness import Outcome, RealRun, published

ROUNDS = 2


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        return RealRun(tmp_path_factory.mktemp("run"), [], patch).run()


def bits_of(outcome: Outcome, round_number: int) -> int:
    return outcome.coordinator.ledger.rounds[round_number - 1].ring_bits


def bfloat16(update: np.ndarray) -> np.ndarray:
    return (update.astype("<f4").view("<u4") >> 16).astype("<u2")


def assert_reveals_nothing(outcome: Outcome, received: bytes, masked: dict[tuple[str, int], np.ndarray]) -> None:
    """No window of an update in any of its forms, no pair (count, loss), no correlation."""
    for (_, _), given in outcome.inputs.items():
        forms = [given.update.astype("<f4"), bfloat16(given.update), given.lanes]
        for form in forms:
            raw = form[np.flatnonzero(form)[:1][0] :].tobytes()
            for start in range(0, len(raw) - 16, len(raw) // 50):
                window = raw[start : start + 16]
                assert len(set(window)) < 4 or window not in received
        assert given.scalars[:2].tobytes() not in received
        assert given.scalars[1:2].tobytes() not in received
    for key, vector in masked.items():
        for given in outcome.inputs.values():
            if vector.size == given.update.size:
                correlation = np.corrcoef(vector.astype(np.float64), given.update.astype(np.float64))[0, 1]
                assert abs(correlation) < 5 / np.sqrt(vector.size), key


def masked_vectors(outcome: Outcome) -> dict[tuple[str, int], np.ndarray]:
    kinds = {number: f"<i{bits_of(outcome, number) // 8}" for number in range(1, ROUNDS + 1)}
    # ctx first, then the vector's chunks, the scalar block and the signed digest.
    return {
        key: np.frombuffer(b"".join(pieces[1:-2]), kinds[key[1]]) for key, pieces in outcome.recorder.uploads.items()
    }


def test_sum_is_exact(outcome: Outcome) -> None:
    for number in range(1, ROUNDS + 1):
        lanes, scalars = published(outcome, number, bits_of(outcome, number))
        given = [value for (_, r), value in outcome.inputs.items() if r == number]
        assert len(given) == 4
        assert np.array_equal(lanes, np.sum([one.lanes for one in given], axis=0, dtype=lanes.dtype))
        assert np.array_equal(scalars, np.sum([one.scalars for one in given], axis=0, dtype=scalars.dtype))


def test_second_round_uses_the_16_bit_ring(outcome: Outcome) -> None:
    assert [bits_of(outcome, number) for number in (1, 2)] == [32, 16]


def test_nothing_received_reveals_an_update_a_count_or_a_loss(outcome: Outcome) -> None:
    masked = masked_vectors(outcome)
    assert len(masked) == 4 * ROUNDS
    assert_reveals_nothing(outcome, b"".join(outcome.recorder.received), masked)


def test_the_same_check_fails_without_masks(outcome: Outcome) -> None:
    received = b"".join(outcome.recorder.received)
    one = next(iter(outcome.inputs.values()))
    with pytest.raises(AssertionError):
        assert_reveals_nothing(outcome, received + one.lanes.tobytes(), {})
    with pytest.raises(AssertionError):
        assert_reveals_nothing(outcome, received + one.scalars.tobytes(), {})
    with pytest.raises(AssertionError):
        assert_reveals_nothing(outcome, received, {("x", 1): one.lanes.view("<i4")})


def test_mean_that_is_applied_is_the_weighted_mean_of_the_updates(outcome: Outcome) -> None:
    means = [
        np.mean([value.update for (_, r), value in outcome.inputs.items() if r == number], axis=0)
        for number in range(1, ROUNDS + 1)
    ]
    start = outcome.contract
    from mpctf_secure.rounds.state import initial_state

    expected = initial_state(start).adapter + np.sum(means, axis=0)
    assert np.linalg.norm(outcome.state.adapter - expected) < 2e-3 * np.linalg.norm(np.sum(means, axis=0))


def test_four_participants_of_four_are_reported(outcome: Outcome) -> None:
    names = [f"site-{i}" for i in range(1, 5)]
    assert all(record.survivors == names and not record.dropouts for record in outcome.coordinator.ledger.rounds)
    assert Path(outcome.folder / "spool").exists()
