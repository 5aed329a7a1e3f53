"""What a site checks before it agrees to a run: pure, every refusal says which floor is broken."""

from mpctf_secure.config.privacy import NoNoise
from mpctf_secure.config.site import Compute, Policy
from mpctf_secure.config.strategies import Data, MaxVolume
from mpctf_secure.config.training import Training
from mpctf_secure.errors import COORDINATOR, SecurityError, UsageError
from mpctf_secure.identity.roster import Roster
from mpctf_secure.partition.volumes import max_volume
from mpctf_secure.rounds.contract import Contract, Proposal
from mpctf_secure.rounds.messages import Facts
from mpctf_secure.rounds.terms import check_noise
from mpctf_secure.secagg.parameters import check_terms, floor


class UnsuitableError(UsageError):
    """Terms that do not suit this site's rows or settings, as another run's may."""


def check_proposal(proposal: Proposal, policy: Policy, roster: Roster, name: str) -> None:
    """1. It is about my roster; 2. I am in it and all of it is enrolled; 3. no floor of mine or the protocol breaks."""
    if bytes.fromhex(proposal.roster_hash) != roster.hash:
        raise SecurityError("proposal is about another roster than mine", culprits=[COORDINATOR])
    enrolled = {str(member.name) for member in roster.participants}
    named = proposal.participants
    if name not in named or len(set(named)) != len(named) or not set(named) <= enrolled:
        raise SecurityError("proposal does not name me, or names somebody not in the roster", culprits=[COORDINATOR])
    try:
        check_terms(
            len(named),
            colluders=proposal.colluders,
            quorum=proposal.quorum,
            allow_pair=proposal.allow_pair and policy.allow_pair,
        )
    except UsageError as error:
        hint = "a pair also needs policy.allow_pair: true in the site file"
        raise SecurityError(f"proposal: {error.message}", hint=hint, culprits=[COORDINATOR]) from error
    if not (proposal.secure or policy.allow_clear):
        raise SecurityError(
            "proposal: secagg.secure is false, so that the coordinator would see this site's updates",
            hint="secure: true in the run file; for an experiment policy.allow_clear: true in the site file",
            culprits=[COORDINATOR],
        )
    _check_noise(proposal, policy)
    _check_budget(proposal, policy)
    least = floor(proposal.quorum, proposal.colluders)
    if least < policy.smallest_sum:
        raise SecurityError(
            f"proposal: a sum of {least} could be opened, this site's policy.smallest_sum is {policy.smallest_sum}",
            hint="a higher quorum in the run file; for a pair, policy.smallest_sum: 2 in the site file",
        )
    if isinstance(proposal.data, MaxVolume) and not policy.size_step:
        raise SecurityError(
            "proposal: data.strategy max_volume needs this site's number of rows, and policy.size_step is 0",
            hint="another strategy in the run file, or a step in the site file",
        )
    if proposal.void_rounds > policy.most_void_rounds:
        raise SecurityError(
            f"proposal: {proposal.void_rounds} void rounds, this site's policy.most_void_rounds is "
            f"{policy.most_void_rounds}",
            hint="secagg.void_rounds in the run file, or the site file",
            culprits=[COORDINATOR],
        )


def _check_noise(proposal: Proposal, policy: Policy) -> None:
    try:
        check_noise(proposal)
    except UsageError as error:
        raise SecurityError(f"proposal: {error.message}", hint=error.hint, culprits=[COORDINATOR]) from error
    privacy = proposal.privacy
    if not isinstance(privacy, NoNoise) and privacy.highest_clip_norm > policy.largest_clip_norm:
        raise SecurityError(
            f"proposal: a clip norm of {privacy.highest_clip_norm:g}, this site's policy.largest_clip_norm is "
            f"{policy.largest_clip_norm:g}",
            hint="privacy in the run file, or the site file",
            culprits=[COORDINATOR],
        )


def _check_budget(proposal: Proposal, policy: Policy) -> None:
    """No run without noise that protects what the budget is about, against whom it is to hold."""
    privacy, budget = proposal.privacy, policy.budget
    if policy.record_epsilon and not privacy.record_dpsgd:
        raise SecurityError(
            "proposal: no privacy.record_dpsgd, and this site has a policy.record_epsilon",
            hint="privacy in the run file, or the site file",
            culprits=[COORDINATOR],
        )
    if budget is None or (budget.unit == "record" and privacy.record_dpsgd):
        return
    if isinstance(privacy, NoNoise):
        lacks = "adds no noise to a participant's update"
    elif budget.against == "coordinator" and not privacy.holds_against_coordinator:
        lacks = "leaves the noise to the coordinator"
    else:
        return
    others = "client_fixed or client_adaptive" + ", or privacy.record_dpsgd," * (budget.unit == "record")
    raise SecurityError(
        f"proposal: privacy.strategy {privacy.strategy} {lacks}, and this site has a policy.budget of unit "
        f"{budget.unit}",
        hint=f"{others} in the run file, or the site file",
        culprits=[COORDINATOR],
    )


def check_packing(proposal: Proposal, compute: Compute) -> None:
    """UnsuitableError where records could not be told apart."""
    if proposal.privacy.record_dpsgd and compute.packing:
        raise UnsuitableError(
            "compute.packing: packed rows have no gradients of their own, which privacy.record_dpsgd needs",
            hint="packing: false in the site file",
        )


def told_size(data: Data, policy: Policy, rows: int) -> int:
    """How many rows this site says it has: the next multiple of its policy's step; 0 where nobody needs to know."""
    return -(-rows // policy.size_step) * policy.size_step if isinstance(data, MaxVolume) else 0


def check_contract(contract: Contract, proposal: Proposal, facts: Facts) -> None:
    """The contract is the proposal that I checked plus the facts that I found."""
    if contract.model_dump(include=set(Proposal.model_fields)) != proposal.model_dump():
        raise SecurityError("contract differs from the proposal", culprits=[COORDINATOR])
    if bytes.fromhex(contract.package) != facts.package:
        raise SecurityError(
            "contract names another version of this program than mine",
            hint="install the others' version, also in the middle of a run",
            culprits=[COORDINATOR],
        )
    if bytes.fromhex(contract.base_model_hash) != facts.base_model.whole or contract.tensors != facts.tensors:
        raise SecurityError("contract names another base model than mine", culprits=[COORDINATOR])
    if contract.largest_size < facts.size:
        raise SecurityError("contract names a largest size below mine", culprits=[COORDINATOR])


def check_volume(contract: Contract, training: Training, policy: Policy, rows: int) -> None:
    """No round asks more of my rows than I bear; `training` is what this site trains with."""
    largest = isinstance(contract.data, MaxVolume) * max_volume(contract.largest_size, contract.training_rounds)
    passes = -(-max(largest, rows) * training.local_epochs // rows)
    if passes > policy.most_passes:
        raise SecurityError(
            f"contract: a round goes over this site's rows {passes} times, its policy.most_passes is "
            f"{policy.most_passes}",
            hint="fewer epochs, more rounds or another data.strategy in the run file, or the site file",
        )
