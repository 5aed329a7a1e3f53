import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpctf_secure.errors import UsageError
from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.privacy.accountant import cost_of_integers
from mpctf_secure.privacy.records import poisson_sample, release_of_round


def test_noise_is_enough_for_the_whole_run_and_hardly_more() -> None:
    release = release_of_round(8.0, 1e-5, records=1000, batch_size=64, volume=250, rounds=5)
    assert (release.sampling_rate, release.steps) == (0.064, 4)
    run = replace(release, steps=5 * release.steps)
    assert 7.9 < cost_of_integers([run], 1e-5).epsilon <= 8.0
    assert cost_of_integers([replace(run, noise_multiplier=0.99 * run.noise_multiplier)], 1e-5).epsilon > 8.0


def test_batch_as_large_as_the_data_takes_every_record_in_every_step() -> None:
    release = release_of_round(3.0, 1e-5, records=50, batch_size=64, volume=50, rounds=10)
    assert (release.sampling_rate, release.steps) == (1.0, 1)
    assert release.noise_multiplier == pytest.approx(4.397, abs=0.002)  # of ten releases, in closed form
    assert poisson_sample(Generator(bytes(32)), 50, 1.0) == list(range(50))


def test_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(UsageError, match="no noise reaches epsilon"):
        release_of_round(1e-9, 1e-12, records=50, batch_size=64, volume=50, rounds=10)


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.sampled_from([0.001, 0.3, 0.9]))
def test_sample_has_about_its_rate_and_no_record_twice(seed: bytes, rate: float) -> None:
    found = poisson_sample(Generator(seed), 20_000, rate)
    assert found == sorted(set(found))
    assert len(found) == pytest.approx(20_000 * rate, abs=6 * math.sqrt(20_000 * rate * (1 - rate)))
