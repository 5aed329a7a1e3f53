"""What doctor finds, each with something to mend."""

import datetime
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mpctf_secure.config.site import Compute, Node, SiteConfig, Ssh
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.identity import ceremony
from mpctf_secure.ids import ParticipantName
from mpctf_secure.participant import checks
from mpctf_secure.participant.checks import CHECKS, TRIAL, Finding, examine
from mpctf_secure.privacy.ledger import Charge, Ledger

NAMES = ("bank-b", "coordinator", "hospital-a")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_intents(folder, ("bank-b", "hospital-a"), 16, 4, 0)
    write_tiny_llama(folder / "model", ["a text of some words"])
    return folder


@pytest.fixture
def site(tmp_path: Path, material: Path) -> SiteConfig:
    hold(tmp_path, datetime.datetime.now(datetime.UTC))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = tmp_path / "bank-b" / "keys"
    return SiteConfig(
        coordinator=f"127.0.0.1:{port}",
        model=material / "model",
        data=material / "bank-b.jsonl",
        keys=keys,
        work=tmp_path / "work",
    )


def hold(home: Path, now: datetime.datetime) -> None:
    folders = {ParticipantName(name): home / name / "keys" for name in NAMES}
    ceremony.hold(folders, ParticipantName("coordinator"), now, b"x")


def found(site: SiteConfig) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(CHECKS, site)}


def test_healthy_site_lacks_only_a_coordinator_which_listens_during_runs(site: SiteConfig) -> None:
    findings = found(site)
    assert not [name for name, finding in findings.items() if finding.state == "fail"]
    assert findings["coordinator"].state == "warn"
    assert "nothing listens" in findings["coordinator"].text
    assert findings["data"].text.startswith("16 rows")


def spoil_sealed(site: SiteConfig) -> None:
    (path,) = site.keys.glob("*.sealed")
    path.write_bytes(path.read_bytes()[:-1])


def expire(site: SiteConfig) -> None:
    hold(site.keys.parent.parent / "old", datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=40))
    site.keys.rename(site.keys.parent / "fresh")
    (site.keys.parent.parent / "old" / "bank-b" / "keys").rename(site.keys)


def from_the_future(site: SiteConfig) -> None:
    hold(site.keys.parent.parent / "new", datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=2))
    site.keys.rename(site.keys.parent / "fresh")
    (site.keys.parent.parent / "new" / "bank-b" / "keys").rename(site.keys)


def charge(site: SiteConfig) -> Path:
    """A round on other rows than the site has now."""
    Ledger(site.keys).charge(
        Charge(
            data_set="data", fingerprint="aa" * 32, rows=9, run="joint-1", contract="bb" * 32, round=1,
            content="cc" * 32, against="nobody", colluders=1,
        ), None,
    )  # fmt: skip
    return site.keys / "ledger.jsonl"


def test_rows_that_the_ledger_does_not_know_are_warned_of(site: SiteConfig) -> None:
    assert found(site)["ledger"].text == "0 rounds were charged to data set data"
    charge(site)
    finding = found(site)["ledger"]
    assert (finding.state, finding.text) == (
        "warn", "data: the file has changed since data set data was charged for run joint-1")  # fmt: skip
    assert "--accept-data-change" in finding.mend


TROUBLES = {
    "an edited ledger": (
        lambda s: charge(s).write_text("{}\n"), "ledger", 4, "line 1: ", "restore it"),
    "a loose mode": (lambda s: (s.keys / "organisation.json").chmod(0o644), "file modes", 4, "mode 0644", "chmod go="),
    "a damaged key file": (spoil_sealed, "keys", 4, "damaged", ""),
    "no keys": (lambda s: [p.unlink() for p in s.keys.glob("*.sealed")], "keys", 3, "no sealed keys", "enroll init"),
    "no roster": (lambda s: (s.keys / "rosters" / "1.json").unlink(), "roster", 3, "no roster is installed", "verify"),
    "an expired roster": (expire, "roster", 4, "expired on", "enroll renew"),
    "a slow clock": (from_the_future, "clock", 3, "before the roster was made", "time service"),
    "keys of somebody else": (
        lambda s: [p.unlink() for p in s.keys.glob("*.sealed")]
        or [p.rename(s.keys / p.name) for p in (s.keys.parent.parent / "hospital-a" / "keys").glob("*.sealed")],
        "roster", 4, "is not yours", "another way"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "check", "code", "text", "mend"), TROUBLES.values(), ids=TROUBLES.keys())
def test_trouble_is_found_with_how_to_mend_it(
    site: SiteConfig, spoil, check: str, code: int, text: str, mend: str
) -> None:
    spoil(site)
    finding = found(site)[check]
    assert (finding.state, finding.code) == ("fail", code)
    assert text in finding.text
    assert mend in finding.mend


EVERYBODY = ("chmod o=", "lets everybody in")


def test_rows_and_logs_that_everybody_may_read_are_warned_of(site: SiteConfig, tmp_path: Path) -> None:
    own = site.model_copy(update={"data": tmp_path / "own.jsonl"})
    own.data.write_text('{"text": "x"}\n')
    own.work.mkdir(mode=0o700)
    own.data.chmod(0o600)
    for path in (own.data, own.work):
        path.chmod(0o755)
        finding = found(own)["file modes"]
        assert finding.state == "warn"
        assert EVERYBODY[1] in finding.text
        assert finding.mend == f"{EVERYBODY[0]} {path}"
        path.chmod(0o700)
    assert found(own)["file modes"].state == "ok"


COMPUTES = {
    "a GPU that is not there": (Compute(nodes=(Node(gpus=(63,)),)), "GPU"),
    "host keys that are nowhere": (
        Compute(launcher="ssh", ssh=Ssh(known_hosts=Path("/nowhere/hosts"))), "/nowhere/hosts"),
}  # fmt: skip


@pytest.mark.parametrize(("compute", "text"), COMPUTES.values(), ids=COMPUTES.keys())
def test_what_a_compute_section_names_and_is_not_there_is_found(site: SiteConfig, compute: Compute, text: str) -> None:
    finding = found(site.model_copy(update={"compute": compute}))["compute"]
    assert (finding.state, finding.code) == ("fail", 3)
    assert text in finding.text


def test_rows_are_not_blamed_for_a_missing_model(site: SiteConfig, tmp_path: Path) -> None:
    assert found(site.model_copy(update={"model": tmp_path / "m"}))["data"].state == "warn"


def test_missing_model_data_and_work_folder_are_named(site: SiteConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    elsewhere = site.model_copy(
        update={"model": tmp_path / "m", "data": tmp_path / "d.jsonl", "work": tmp_path / "file" / "work"}
    )
    findings = found(elsewhere)
    for check, path in (("model", "m"), ("data", "d.jsonl"), ("work folder", "file/work")):
        assert findings[check].state == "fail"
        assert str(tmp_path / path) in findings[check].text
        assert findings[check].mend


def test_something_else_at_the_port_is_not_taken_for_the_coordinator(site: SiteConfig) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        other = site.model_copy(update={"coordinator": f"127.0.0.1:{listener.getsockname()[1]}"})
        finding = found(other)["coordinator"]
    assert finding.state == "fail"


def test_roster_that_ends_soon_and_little_room_are_warnings(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_EXPIRES_SOON", datetime.timedelta(days=60))
    monkeypatch.setattr(checks, "_LEAST_FREE", 1 << 60)
    findings = found(site)
    assert (findings["roster"].state, findings["work folder"].state) == ("warn", "warn")
    assert "renew" in findings["roster"].mend


def test_trial_trains_one_step(site: SiteConfig) -> None:
    finding = next(one for one in examine({"training": TRIAL["training"]}, site))
    assert finding.state == "ok", finding
    assert finding.text.startswith("8 rows, ")


def test_command_prints_every_finding_and_exits_with_the_first_failure(site: SiteConfig, tmp_path: Path) -> None:
    from mpctf_secure.config import load

    path = tmp_path / "site.yaml"
    path.write_text(load.dump(site))
    command = [sys.executable, "-m", "mpctf_secure", "doctor", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=False)
    assert text.returncode == 0, text.stderr
    assert "warn  coordinator: 127.0.0.1:" in text.stdout
    assert "      mend: " in text.stdout
    site.data.unlink()
    told = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert {finding["check"] for finding in json.loads(told.stdout)} == CHECKS.keys()
