from dataclasses import replace

import pytest
from samples import make_contract

from mpctf_secure.config.strategies import FixedSize, MaxVolume, MemoryAware
from mpctf_secure.coordinator.agreement import close_contract
from mpctf_secure.errors import UsageError
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import STATED, Facts, ModelHashes

MODEL = ModelHashes(b"c" * 32, b"t" * 32, b"w" * 32)


def facts(size: int = 0, memory: str = "", **changes: object) -> Facts:
    return replace(Facts(b"p" * 32, MODEL, (("t", (2, 3)),), size, memory), **changes)


def closed(data: object, *found: Facts) -> Contract:
    terms = make_contract(data=data).model_dump(include=set(Proposal.model_fields))
    return close_contract(Proposal(**terms), dict(zip("abcd", found, strict=False)))


def test_the_largest_size_that_was_told_is_in_the_contract() -> None:
    assert closed(MaxVolume(), facts(100), facts(500)).largest_size == 500


@pytest.mark.parametrize(("size", "data"), [(0, MaxVolume()), (2**31, MaxVolume()), (100, MemoryAware())])
def test_a_size_that_is_missing_absurd_or_not_asked_for_is_refused(size: int, data: object) -> None:
    with pytest.raises(UsageError, match="b tells a size"):
        closed(data, facts(100 if isinstance(data, MaxVolume) else 0), facts(size))


DIFFERENCES = {
    "the version of this program": {"package": b"q" * 32},
    "the base model's tokenizer or chat template": {"base_model": MODEL._replace(tokenizer=b"u" * 32)},
    "the base model's config and the base model's weights": {
        "base_model": ModelHashes(b"d" * 32, b"t" * 32, b"x" * 32)
    },
    "the adapter's tensors": {"tensors": (("t", (2, 4)),)},
}


@pytest.mark.parametrize(("what", "changes"), DIFFERENCES.items())
def test_two_sites_that_differ_are_named_and_so_is_what_they_differ_in(what: str, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"^a and c differ in {what}; base model "):
        closed(FixedSize(), facts(), facts(), facts(**changes))


def test_facts_survive_the_round_trip() -> None:
    assert Facts.decode(facts(3, "gpu").encode()) == facts(3, "gpu")


def test_memory_of_gpus_and_of_processors_is_not_compared() -> None:
    with pytest.raises(UsageError, match="a counts gpu memory and b counts cpu memory") as caught:
        closed(MemoryAware(), facts(memory="gpu"), facts(memory="cpu"))
    assert "memory_gib" in caught.value.hint
    assert closed(MemoryAware(), facts(memory="gpu"), facts(memory=STATED), facts(memory="gpu"))
