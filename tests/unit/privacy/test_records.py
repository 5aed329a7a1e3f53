import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpctf_secure.privacy.accountant import Release
from mpctf_secure.privacy.records import Samples, sampling_rate


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.sampled_from([0.001, 0.3, 0.9]))
def test_sample_has_about_its_rate_and_no_record_twice(secret: bytes, rate: float) -> None:
    [found] = Samples(Release(1.0, rate), secret).draw(20_000)
    assert found == sorted(set(found))
    assert len(found) == pytest.approx(20_000 * rate, abs=6 * math.sqrt(20_000 * rate * (1 - rate)))


def test_batch_as_large_as_the_data_takes_every_record_in_every_step() -> None:
    assert sampling_rate(64, 50) == 1
    assert Samples(Release(1.0, 1.0, 2), bytes(32)).draw(50) == [list(range(50))] * 2


def test_samples_follow_from_the_secret_and_have_their_rate() -> None:
    release = Release(1.0, 0.05, 40)
    first, again, other = (Samples(release, secret).draw(2000) for secret in (bytes(32), bytes(32), b"\1" * 32))
    assert first == again != other
    sizes = [len(step) for step in first]
    assert len(set(sizes)) > 5
    assert sum(sizes) == pytest.approx(40 * 100, abs=5 * math.sqrt(40 * 2000 * 0.05 * 0.95))
    assert len({record for step in first for record in step}) > 1600  # 0.87 of them are expected
    assert len({tuple(step) for step in first}) == 40


def test_secret_is_neither_shown_nor_told() -> None:
    samples = Samples(Release(1.0), b"\xab" * 32)
    assert "secret" not in repr(samples)
    assert repr(samples.secret)[2:-1] not in repr(samples)
    assert Samples.decode(samples.encode()) == Samples(Release(1.0))
