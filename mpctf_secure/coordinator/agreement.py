"""From the proposal and what every site says of itself to the contract."""

from collections.abc import Mapping

from mpctf_secure.config.strategies import MaxVolume
from mpctf_secure.errors import UsageError
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import STATED, Facts

_MUST_AGREE = {"package": "version of this program", "base_model_hash": "base model", "tensors": "base model"}
_MOST_ROWS = 2**31 - 1


def close_contract(proposal: Proposal, facts: Mapping[str, Facts]) -> Contract:
    """The proposal and the facts that all sites, by name, agree on; UsageError names two that do not."""
    (first, agreed), *others = facts.items()
    _check_sizes(proposal, facts)
    _check_memory(facts)
    for name, found in others:
        for component, what in _MUST_AGREE.items():
            if getattr(found, component) != getattr(agreed, component):
                raise UsageError(f"{first} and {name} differ in {component}", hint=f"every site needs the same {what}")
    return Contract(
        **proposal.model_dump(),
        package=agreed.package.hex(),
        base_model_hash=agreed.base_model_hash.hex(),
        tensors=agreed.tensors,
        largest_size=max(found.size for found in facts.values()),
    )


def _check_sizes(proposal: Proposal, facts: Mapping[str, Facts]) -> None:
    """Only where they are needed, and there of all."""
    needed = isinstance(proposal.data, MaxVolume)
    for name, found in facts.items():
        if not needed <= found.size <= needed * _MOST_ROWS:
            raise UsageError(f"{name} tells a size of {found.size} rows", hint="every site needs the same program")


def _check_memory(facts: Mapping[str, Facts]) -> None:
    """A GPU's memory and a processor's are not the same: sites weigh alike only if all count in the same."""
    kinds = {found.memory: name for name, found in facts.items() if found.memory != STATED}
    if len(kinds) > 1:
        (one, of_one), (other, of_other), *_ = kinds.items()
        raise UsageError(
            f"{of_one} counts {one} memory and {of_other} counts {other} memory",
            hint="one of them states compute.memory_gib in its site file, or the run takes another data.strategy",
        )
