import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import TENSORS
from samples import make_contract as contract
from sums import COHORT, after, total_of

from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.config.privacy import NoNoise, RecordDpSgd
from mpctf_secure.config.training import Training
from mpctf_secure.errors import DecodeError, SecurityError
from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.outcome import Aggregate, Sum, next_state, read_sum
from mpctf_secure.rounds.state import Survey, initial_state
from mpctf_secure.rounds.terms import grid, round_context


def updates(scale: float = 0.01) -> list[np.ndarray]:
    draws = [Generator(bytes([9, i]) + bytes(30)).uint32(600) / 2**31 - 1 for i in range(4)]
    return [(scale * draw).astype(np.float32) for draw in draws]


def test_adapter_0_has_zero_b_and_a_within_the_kaiming_bound() -> None:
    adapter = initial_adapter(TENSORS, 7)
    assert np.all(adapter[400:] == 0)
    assert 0.09 < np.abs(adapter[:400]).max() <= 0.1
    assert not np.array_equal(adapter, initial_adapter(TENSORS, 8))


def test_next_state_is_the_mean_update_added_and_the_ring_narrows() -> None:
    agreed = contract()
    state = initial_state(agreed)
    assert grid(agreed, state, 4).bits == 32
    following = after(agreed, state, total_of(agreed, state, updates()))
    assert np.allclose(following.adapter - state.adapter, np.mean(updates(), axis=0), atol=1e-7)
    assert grid(agreed, following, 4).bits == 16
    assert grid(agreed, following, 17).bits == 32
    assert all(r == 2.0 ** np.log2(r).round() and r < 1 for r in following.ranges)


def test_tensor_that_has_not_moved_keeps_the_ring_wide() -> None:
    agreed = contract()
    still = [np.where(np.arange(600) < 400, 0, update).astype(np.float32) for update in updates()]
    following = after(agreed, initial_state(agreed), total_of(agreed, initial_state(agreed), still))
    assert following.ranges == (1.0, 1.0)
    assert grid(agreed, following, 4).bits == 32


def test_clipping_in_the_narrow_ring_widens_it_again() -> None:
    agreed = contract()
    state = after(agreed, initial_state(agreed), total_of(agreed, initial_state(agreed), updates(0.0001)))
    wide = after(agreed, state, total_of(agreed, state, updates(0.03)))
    assert wide.ranges == (1.0, 1.0)
    assert grid(agreed, wide, 4).bits == 32


def test_mean_above_the_clip_norm_is_refused() -> None:
    agreed = contract()
    state = initial_state(agreed)
    with pytest.raises(SecurityError, match="above the clip norm") as caught:
        after(agreed, state, total_of(agreed, state, updates(1.0)))
    assert caught.value.culprits == ("coordinator",)


@pytest.mark.parametrize("rows", [0, -1, 41])
def test_sum_with_an_impossible_row_count_is_refused(rows: int) -> None:
    agreed = contract()
    state = initial_state(agreed)
    good = total_of(agreed, state, updates())
    scalars = good.scalars.copy()
    scalars[0] = np.array(rows, np.int64).view(np.uint64)
    with pytest.raises(SecurityError, match="rows"):
        after(agreed, state, Sum(good.lanes, scalars, good.first_cohort, good.survivors))


CHANGES = {
    "round": lambda s: replace(s, round=1),
    "void rounds": lambda s: replace(s, voids=1),
    "who is convicted": lambda s: replace(s, convicted=COHORT[:1]),
    "adapter": lambda s: replace(s, adapter=s.adapter + np.float32(1e-7)),
    "ranges": lambda s: replace(s, ranges=(1.0, 0.5)),
    "moments": lambda s: replace(s, moments=(s.adapter, s.adapter)),
    "survey": lambda s: replace(s, survey=Survey(1, 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_part_of_the_state_enters_its_hash_and_the_context(change) -> None:
    agreed = contract()
    state = initial_state(agreed)
    assert change(state).hash(agreed) != state.hash(agreed)
    assert round_context(agreed, change(state), COHORT).digest() != round_context(agreed, state, COHORT).digest()


@pytest.mark.parametrize("field", ["privacy", "training", "quorum", "seed", "participants", "tensors"])
def test_every_term_of_the_contract_enters_its_hash(field: str) -> None:
    others = {
        "privacy": NoNoise(clip_norm=2.0), "training": Training(learning_rate=0.5), "quorum": 4, "seed": 8,
        "participants": ("a", "b", "c"), "tensors": TENSORS[:1],
    }  # fmt: skip
    assert contract(**{field: others[field]}).hash != contract().hash


@given(st.binary(max_size=100))
def test_any_bytes_are_a_proposal_or_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        Proposal.decode(data)


def test_contract_survives_the_round_trip() -> None:
    assert Contract.decode(contract().encode()) == contract()


PROGRAM = """
import sys; sys.path[:0] = [{tests!r}, {here!r}]
from test_state import *
agreed = contract(); state = initial_state(agreed)
for scale in (0.01, 0.002, 0.03):
    state = after(agreed, state, total_of(agreed, state, updates(scale)))
print(state.hash(agreed).hex())
"""
SETTINGS = {
    "as is": {},
    "an old OpenBLAS kernel": {"OPENBLAS_CORETYPE": "Prescott"},
    "numpy without AVX": {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX"},
}


def test_state_is_bit_identical_on_other_processors() -> None:
    from pathlib import Path

    here = Path(__file__).parent
    program = PROGRAM.format(tests=str(here.parents[1]), here=str(here))
    hashes = set()
    for setting in SETTINGS.values():
        argv = [sys.executable, "-W", "ignore", "-c", program]
        result = subprocess.run(argv, env={**os.environ, **setting}, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        hashes.add(result.stdout)
    assert len(hashes) == 1


def test_sum_that_leads_to_no_number_is_refused() -> None:
    """Large steps on an adapter that is large already: every later round would be lost."""
    agreed = contract()
    state = replace(initial_state(agreed), adapter=np.full(600, 3.4e38, np.float32))
    huge = Aggregate(None, np.full(600, 3e38, np.float32), (1.0, 1.0), 1.0)
    with pytest.raises(SecurityError, match="no number") as caught:
        next_state(agreed, state, huge)
    assert caught.value.culprits == ("coordinator",)


def test_under_noise_on_records_a_sum_tells_neither_rows_nor_loss() -> None:
    agreed = contract(privacy=NoNoise(clip_norm=1.0, record_dpsgd=RecordDpSgd(epsilon=8)))
    state = initial_state(agreed)
    said = read_sum(agreed, state, total_of(agreed, state, updates()))
    assert isinstance(said, Aggregate)
    assert said.summary
    assert (said.summary.rows, said.summary.mean_loss) == (None, None)
    assert np.allclose(said.mean, np.mean(updates(), axis=0), atol=1e-6)
