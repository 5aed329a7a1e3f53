"""Every kind of leaf, and where it is told."""

from pathlib import Path
from typing import Any, get_args

import pytest

import mpctf_secure
from mpctf_secure.auditlog.events import OfRun
from mpctf_secure.auditlog.own_events import OfOrganisation
from mpctf_secure.monitoring.events import COORDINATOR_KINDS

PACKAGE = Path(mpctf_secure.__file__).parent
OF_RUN = {
    "run_opened": "coordinator/audit.py",
    "process_started": "coordinator/audit.py",
    "contract_closed": "coordinator/runtime.py",
    "step_witnessed": "coordinator/runtime.py",
    "attempt_opened": "coordinator/ledger.py",
    "attempt_failed": "coordinator/runtime.py",
    "sum_published": "coordinator/ledger.py",
    "round_void": "coordinator/runtime.py",
    "round_closed": "coordinator/runtime.py",
    "dropout": "coordinator/ledger.py",
    "refused": "coordinator/notices.py",
    "veto": "coordinator/notices.py",
    "banned": "coordinator/reception.py",
    "roster_changed": "cli/start.py",
    "model_exported": "cli/start.py",
    "run_interrupted": "cli/start.py",
    "run_ended": "coordinator/ledger.py",
    "clock_set": "auditlog/storage.py",
    "log_recovered": "auditlog/storage.py",
}
OF_ORGANISATION = {
    "log_begun": "auditlog/own.py",
    "keys_opened": "cli/join.py",
    "keys_drawn": "cli/enroll.py",
    "requested": "cli/enroll.py",
    "roster_signed": "cli/enroll.py",
    "roster_installed": "cli/enroll.py",
    "run_accepted": "participant/agent.py",
    "run_refused": "participant/agent.py",
    "joined": "participant/witness.py",
    "charged": "participant/agent.py",
    "uploaded": "participant/witness.py",
    "confirmed": "participant/witness.py",
    "released": "participant/witness.py",
    "heard": "participant/witness.py",
    "cosigned": "participant/witness.py",
    "run_done": "participant/agent.py",
    "run_kept": "cli/start.py",
    "pruned": "cli/audit/prune.py",
    "clock_set": "auditlog/storage.py",
    "log_recovered": "auditlog/storage.py",
}
SECRET = {"update", "loss", "mean_loss", "rows", "reason", "hint", "prompt", "key", "address", "person", "content"}


def kinds(union: Any) -> dict[str, type]:
    return {leaf.model_fields["kind"].default: leaf for leaf in get_args(union)}


@pytest.mark.parametrize(("union", "told"), [(OfRun, OF_RUN), (OfOrganisation, OF_ORGANISATION)])
def test_every_kind_of_leaf_is_told_where_it_is_said_to_be(union: Any, told: dict[str, str]) -> None:
    assert kinds(union).keys() == told.keys()
    for kind, leaf in kinds(union).items():
        source = (PACKAGE / told[kind]).read_text()
        assert f'"{kind}"' in source or f"{leaf.__name__}(" in source, kind


def test_what_is_told_of_a_run_passes_the_one_function_that_people_s_events_pass() -> None:
    assert kinds(OfRun).keys() - {"clock_set", "log_recovered"} <= COORDINATOR_KINDS


def test_no_leaf_has_a_field_for_what_must_be_in_no_log() -> None:
    for union in (OfRun, OfOrganisation):
        for leaf in kinds(union).values():
            assert not SECRET & leaf.model_fields.keys(), leaf  # type: ignore[attr-defined]
