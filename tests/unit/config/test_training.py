import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.config.training import Bounds, Choice, Training
from mpctf_secure.errors import DecodeError, UsageError

TERMS = Training(batch_size=8, bounds=Bounds(batch_size=(1, 32), learning_rate=(5e-4, 2e-3)))


def test_choice_inside_the_bounds_replaces_the_defaults() -> None:
    effective = TERMS.with_choice(Choice(batch_size=32, learning_rate=5e-4))
    assert (effective.batch_size, effective.learning_rate, effective.local_epochs) == (32, 5e-4, 1)
    assert TERMS.with_choice(Choice()) == TERMS


OUTSIDE = {
    "above": (Choice(batch_size=33), "batch_size: 33 in the site file, and the run file allows 1 to 32"),
    "below": (Choice(learning_rate=1e-4), "learning_rate: 0.0001 in the site file"),
    "a field without bounds": (Choice(max_length=100), "max_length: 100 in the site file, and the run file allows 512"),
}


@pytest.mark.parametrize(("choice", "message"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_choice_outside_the_bounds_names_both_files(choice: Choice, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        TERMS.with_choice(choice)
    assert message in caught.value.message
    assert "training.bounds." in caught.value.hint


def test_a_choice_of_the_default_needs_no_bounds() -> None:
    assert TERMS.with_choice(Choice(max_length=512)) == TERMS


@given(st.binary(max_size=80))
def test_any_bytes_are_a_choice_or_refused(body: bytes) -> None:
    with contextlib.suppress(DecodeError):
        assert Choice.decode(Choice.decode(body).encode()) == Choice.decode(body)
