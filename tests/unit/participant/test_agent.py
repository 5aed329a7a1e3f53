"""How a site's agent goes from one run to the next."""

from pathlib import Path

import pytest
from samples import make_contract

from mpctf_secure.config.privacy import ClientFixed, NoNoise, RecordDpSgd, ServerFixed
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.errors import BudgetSpentError, InterruptedRunError, MpctfError, SecurityError, UsageError
from mpctf_secure.participant import agent
from mpctf_secure.participant.agent import VetoError, serve
from mpctf_secure.participant.policy import UnsuitableError
from mpctf_secure.rounds.messages import FaultCode
from mpctf_secure.training.faults import Fault


class OverError(Exception):
    """No more runs."""


class Runs:
    """In the place of an agent: every run ends with an error."""

    roster_is_old = False

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)

    def __call__(self, *_: object) -> "Runs":
        return self

    def run_once(self) -> None:
        raise self._errors.pop(0) if self._errors else OverError


GOES_ON = {
    "a run that does not fit into the budget": (BudgetSpentError("too much", hint="less"), True),
    "a run that does not suit the site's rows": (UnsuitableError("no", hint="yes"), True),
    "a run that is refused": (VetoError("no", hint="yes"), True),
    "a coordinator that went away": (InterruptedRunError("gone", hint="wait"), True),
    "an attack": (SecurityError("forged", hint="ask"), False),
    "a mistake of the site's operator": (UsageError("rows", hint="mend"), False),
}


@pytest.mark.parametrize(("error", "goes_on"), GOES_ON.values(), ids=GOES_ON.keys())
def test_serving_goes_on_after_what_another_run_may_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: MpctfError, goes_on: bool
) -> None:
    """A run with too little noise must not be a way to put a site out of all others."""
    monkeypatch.setattr(agent, "_Agent", Runs(error))
    monkeypatch.setattr(agent.time, "sleep", lambda _: None)
    site = SiteConfig(coordinator="127.0.0.1:1", model=tmp_path, data=tmp_path, work=tmp_path / "work")
    with pytest.raises(OverError if goes_on else type(error)):
        serve(site, None, None, lambda _: None)  # type: ignore[arg-type]


class Told:
    """In the place of a link: what it was asked to say."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.bodies: list[bytes] = []

    def tell(self, label: str, _: bytes, body: bytes) -> None:
        self.labels.append(label)
        self.bodies.append(body)


QUIET = [
    ClientFixed(noise_multiplier=1.0),
    NoNoise(record_dpsgd=RecordDpSgd(epsilon=8)),
    ServerFixed(noise_multiplier=1.0, record_dpsgd=RecordDpSgd(epsilon=8)),
]


@pytest.mark.parametrize("privacy", [NoNoise(), ServerFixed(noise_multiplier=1.0), *QUIET])
@pytest.mark.parametrize("accepted", [False, True])
def test_why_training_fails_is_not_told_where_noise_is_to_hide_even_that(privacy: object, accepted: bool) -> None:
    """Out of memory may mean one long row."""
    mine = object.__new__(agent._Agent)
    mine._record = lambda *_, **__: None
    mine._run_context = bytes(32) if accepted else None
    proposal = make_contract(privacy=privacy)
    link = Told()
    mine._note_fault(link, proposal, Fault(FaultCode.OUT_OF_MEMORY, 1, 0, "a row of 900 tokens", "fewer"), False)
    mine._tell_resources(link, proposal, b"much")
    if privacy in QUIET:
        assert link.bodies == ([] if accepted else [b"it stops"])
    else:
        assert link.labels == (["fault", "resources"] if accepted else ["veto"])
        assert b"out_of_memory" in link.bodies[0]
