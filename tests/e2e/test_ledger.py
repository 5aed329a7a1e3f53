"""What a site engineer meets when rows have changed, a budget is spent, or a ledger was edited."""

import json
from pathlib import Path

import pytest
from e2e.consortium import COORDINATOR, THREE, Consortium, consortium

from mpctf_secure.privacy.ledger import Ledger

CHANGED, SPENT, OTHER = THREE


def begin(joint: Consortium, *flags: str) -> None:
    """A run in which the site with other rows says so."""
    joint.coordinator()
    for name in THREE:
        joint.site(name, flags=flags if name == CHANGED else (), once=True)


def change(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.slow
def test_rows_that_changed_and_budgets_that_are_spent_stop_a_site_with_the_reason(tmp_path: Path) -> None:
    privacy = {"strategy": "none", "record_dpsgd": {"epsilon": 8, "clip_norm": 0.1}}
    with consortium(tmp_path / "joint", THREE, rounds=1, privacy=privacy) as joint:
        begin(joint)
        joint.end_well()
        data = joint.root / "data" / f"{CHANGED}.jsonl"
        data.write_text(data.read_text() * 2)
        begin(joint)
        joint.end(CHANGED, 2)
        assert "\nerror: data: the file has changed since data set data was charged for run " in joint.log(CHANGED)
        assert "\nhint: join --accept-data-change goes on" in joint.log(CHANGED)
        joint.end(COORDINATOR, 5)
        assert "(refuses: it stops" in joint.report()["exit"]["reason"]
        for name in THREE[1:]:
            joint.end(name, 7)

        budget = {"epsilon": 8.1, "delta": 1e-5, "unit": "record"}
        joint.write_site(SPENT, joint.address, policy={"budget": budget})
        begin(joint, "--accept-data-change")
        joint.end(SPENT, 6)
        assert "\nerror: privacy budget of data set data: epsilon of a record would be " in joint.log(SPENT)
        assert "\nhint: mpctf-secure privacy report SITE.yaml" in joint.log(SPENT)
        joint.end(COORDINATOR, 5)
        for name in (CHANGED, OTHER):
            joint.end(name, 7)

        joint.write_site(SPENT, joint.address)
        begin(joint, "--accept-data-change")
        joint.end_well()
        assert joint.site_adapters() == {joint.adapter()}
        first, second = Ledger(joint.root / CHANGED / "keys").charges()
        assert (first.rows, second.rows) == (64, 128)
        assert first.fingerprint != second.fingerprint

        edited = joint.root / OTHER / "keys" / "ledger.jsonl"
        lines = edited.read_text().splitlines(keepends=True)
        edited.write_text(lines[0])
        begin(joint)
        joint.end(OTHER, 4)
        assert f"\nerror: {edited}: 1 lines, ledger.head says 2\nhint: restore it" in (joint.log(OTHER))
        joint.end(COORDINATOR, 5)
        assert json.loads((joint.run_folder / "report.json").read_text())["rounds"] == []
