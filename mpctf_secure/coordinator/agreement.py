"""From the proposal and what every site says of itself to the contract."""

from collections.abc import Mapping

from mpctf_secure.errors import UsageError
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Facts

_MUST_AGREE = {"package": "version of this program", "base_model_hash": "base model", "tensors": "base model"}


def close_contract(proposal: Proposal, facts: Mapping[str, Facts]) -> Contract:
    """The proposal and the facts that all sites, by name, agree on; UsageError names two that do not."""
    (first, agreed), *others = facts.items()
    for name, found in others:
        for component, what in _MUST_AGREE.items():
            if getattr(found, component) != getattr(agreed, component):
                raise UsageError(f"{first} and {name} differ in {component}", hint=f"every site needs the same {what}")
    return Contract(
        **proposal.model_dump(),
        package=agreed.package.hex(),
        base_model_hash=agreed.base_model_hash.hex(),
        tensors=agreed.tensors,
    )
