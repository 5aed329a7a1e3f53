"""From the proposal and what every site says of itself to the contract."""

from collections.abc import Mapping

from mpctf_secure.config.strategies import MOST_COUNT, MaxVolume
from mpctf_secure.errors import UsageError
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import STATED, Facts


def close_contract(proposal: Proposal, facts: Mapping[str, Facts]) -> Contract:
    """The proposal and the facts that all sites, by name, agree on; UsageError names two that do not."""
    (first, agreed), *others = facts.items()
    _check_sizes(proposal, facts)
    _check_memory(facts)
    for name, found in others:
        mine, theirs = _components(agreed), _components(found)
        if differing := [component for component, value in mine.items() if theirs[component] != value]:
            raise UsageError(
                f"{first} and {name} differ in {' and '.join(differing)}; base model {proposal.base_model}",
                hint="every site needs the same",
            )
    return Contract(
        **proposal.model_dump(),
        package=agreed.package.hex(),
        base_model_hash=agreed.base_model.whole.hex(),
        tensors=agreed.tensors,
        largest_size=max(found.size for found in facts.values()),
    )


def _components(facts: Facts) -> dict[str, object]:
    """What all sites must have alike."""
    return {
        "the version of this program": facts.package,
        "the base model's config": facts.base_model.config,
        "the base model's tokenizer or chat template": facts.base_model.tokenizer,
        "the base model's weights": facts.base_model.weights,
        "the adapter's tensors": facts.tensors,
    }


def _check_sizes(proposal: Proposal, facts: Mapping[str, Facts]) -> None:
    """Only where they are needed, and there of all."""
    needed = isinstance(proposal.data, MaxVolume)
    for name, found in facts.items():
        if not needed <= found.size <= needed * MOST_COUNT:
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
