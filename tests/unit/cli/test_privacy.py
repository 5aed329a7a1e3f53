import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpctf_secure.privacy.accountant import Release
from mpctf_secure.privacy.ledger import Charge, Ledger


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpctf_secure", "privacy", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_noise_for_a_guarantee_is_shown_for_records_and_participants() -> None:
    result = plan("--rows", 5000, "--rounds", 10, "--epsilon", 8, "--format", "json")
    record, participant = json.loads(result.stdout)
    assert (record["unit"], participant["unit"]) == ("record", "participant")
    assert participant["noise_multiplier"] == pytest.approx(1.899, rel=5e-4)
    assert participant["delta"] == 1e-5
    assert record["sampling_rate"] == 64 / 5000
    assert record["noise_multiplier"] < participant["noise_multiplier"]
    assert all(7.9 < entry["epsilon"] <= 8 for entry in (record, participant))
    assert "times as long as the clipped mean of 4 updates" in participant["warnings"][0]


def test_the_papers_noise_is_called_what_it_is() -> None:
    result = plan("--rows", 5000, "--rounds", 10, "--noise-multiplier", 1e-4)
    assert "participant  noise multiplier 0.0001: epsilon 5.001e+08 at delta 1e-05" in result.stdout
    assert result.stdout.count("NO MEANINGFUL GUARANTEE") == 2
    assert result.stderr == ""


BAD = {
    "delta above one over the rows": (("--epsilon", 8, "--delta", 0.01), "delta: 0.01 is outside (0, 1/5000)"),
    "no number": (("--epsilon", "nan"), "--epsilon: nan is outside"),
    "no noise": (("--noise-multiplier", 0), "--noise-multiplier: 0.0 is outside"),
    "neither": ((), "name --epsilon or --noise-multiplier"),
    "both": (("--epsilon", 8, "--noise-multiplier", 1), "name --epsilon or --noise-multiplier"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_planned_is_refused(arguments: tuple[object, ...], message: str) -> None:
    result = plan("--rows", 5000, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "\nhint: " in result.stderr


SITE = """
coordinator: 127.0.0.1:8443
model: model
data: data.jsonl
data_set: notes
policy: {budget: {epsilon: 8, delta: 1.0e-5, unit: participant}}
"""


def charge(number: int, **changes: object) -> Charge:
    terms = {
        "data_set": "notes",
        "run": f"joint-{number}",
        "against": "coordinator",
        "noise_multiplier": 4.0,
        "colluders": 1,
        "rows": 200,
    }
    hashes = {"fingerprint": "aa" * 32, "contract": "bb" * 32, "content": f"{number:064x}"}
    return Charge(round=number, **{**terms, **hashes, **changes})


def report(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "keys").mkdir(exist_ok=True)
    (folder / "site.yaml").write_text(SITE)
    command = [sys.executable, "-m", "mpctf_secure", "privacy", "report", str(folder / "site.yaml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_report_says_what_was_spent_on_which_runs_and_what_is_left(tmp_path: Path) -> None:
    assert "nothing was ever charged" in report(tmp_path).stdout
    for number in (1, 2):
        Ledger(tmp_path / "keys").charge(charge(number), None)
    lines = [line.strip() for line in report(tmp_path).stdout.splitlines()]
    assert lines[0] == "data set notes, 200 rows"
    whom = "against the coordinator, with as many participants as each run says"
    assert lines[1].startswith(f"a row, {whom}: epsilon 2.94")
    assert lines[3].startswith(f"all rows together, {whom}: epsilon 1.3")
    assert "budget: epsilon 8 at delta 1e-05 of all rows together against the coordinator, 6.6" in " ".join(lines)
    on_updates = "noise multiplier 4 on updates, against the coordinator and 1 of the participants"
    assert f"run joint-2: 1 rounds, {on_updates}" in lines
    assert any(line.startswith("not covered: ") for line in lines)
    assert any(line.startswith("computed with mpctf-secure ") and "opacus 1." in line for line in lines)
    (found,) = json.loads(report(tmp_path, "--format", "json").stdout)
    assert (found["charges"], found["delta"]) == (2, 1e-5)
    assert len({entry["epsilon"] for entry in found["spent"] if entry["unit"] == "record"}) == 1


def test_delta_with_which_a_row_may_be_published_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    Ledger(tmp_path / "keys").charge(charge(1), None)
    for delta in ("0.005", "0", "nan"):
        result = report(tmp_path, "--delta", delta)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: data set notes: --delta: {delta} is outside (0, 1/200)\nhint: ")


def test_noise_on_records_is_reported_with_its_samples(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    noise = Release(1.0, 0.05, 10)
    Ledger(tmp_path / "keys").charge(charge(1, against="nobody", noise_multiplier=None, dpsgd=noise), None)
    lines = report(tmp_path).stdout.splitlines()
    assert "  run joint-1: 1 rounds, 1 on records in each of 10 steps a round, sampled at a rate of 0.05" in lines
    assert any("a row, against participants" in line and "epsilon" in line for line in lines)
    assert any("all rows together" in line and "NO GUARANTEE (run joint-1 has no noise" in line for line in lines)


def test_noise_that_the_coordinator_knew_is_reported_as_none_against_it(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    Ledger(tmp_path / "keys").charge(charge(1, against="participants"), None)
    (found,) = json.loads(report(tmp_path, "--format", "json").stdout)
    costs = {(entry["unit"], entry["against"]): entry["epsilon"] for entry in found["spent"]}
    assert costs["participant", "coordinator"] is None
    assert costs["participant", "participants"] < 1
    assert "NO GUARANTEE" in found["statements"][0]
    assert "0 is left" in " ".join(found["statements"])


def test_edited_ledger_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    Ledger(tmp_path / "keys").charge(charge(1), None)
    path = tmp_path / "keys" / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"4.0", b"9.0"))
    result = report(tmp_path)
    assert result.returncode == 4
    assert result.stderr.startswith(f"error: {path}: ")
    assert "\nhint: restore it" in result.stderr
