import pytest
from samples import make_contract

from mpctf_secure.config.strategies import MaxVolume, MemoryAware
from mpctf_secure.coordinator.agreement import close_contract
from mpctf_secure.errors import UsageError
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import STATED, Facts


def facts(size: int = 0, memory: str = "") -> Facts:
    return Facts(b"p" * 32, b"m" * 32, (("t", (2, 3)),), size, memory)


def closed(data: object, *found: Facts) -> Contract:
    terms = make_contract(data=data).model_dump(include=set(Proposal.model_fields))
    return close_contract(Proposal(**terms), dict(zip("abcd", found, strict=False)))


def test_the_largest_size_that_was_told_is_in_the_contract() -> None:
    assert closed(MaxVolume(), facts(100), facts(500)).largest_size == 500


@pytest.mark.parametrize(("size", "data"), [(0, MaxVolume()), (2**31, MaxVolume()), (100, MemoryAware())])
def test_a_size_that_is_missing_absurd_or_not_asked_for_is_refused(size: int, data: object) -> None:
    with pytest.raises(UsageError, match="b tells a size"):
        closed(data, facts(100 if isinstance(data, MaxVolume) else 0), facts(size))


def test_memory_of_gpus_and_of_processors_is_not_compared() -> None:
    with pytest.raises(UsageError, match="a counts gpu memory and b counts cpu memory") as caught:
        closed(MemoryAware(), facts(memory="gpu"), facts(memory="cpu"))
    assert "memory_gib" in caught.value.hint
    assert closed(MemoryAware(), facts(memory="gpu"), facts(memory=STATED), facts(memory="gpu"))
