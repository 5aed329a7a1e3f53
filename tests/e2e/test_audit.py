"""`mpctf-secure audit` on what a real run has left at the coordinator and at the sites."""

import datetime
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.harness import PHRASE, RealRun

from mpctf_secure.auditlog import own as own_logs
from mpctf_secure.auditlog.entry import Entry
from mpctf_secure.auditlog.events import OfRun, Vetoed
from mpctf_secure.auditlog.note import Note
from mpctf_secure.auditlog.own import OwnLog
from mpctf_secure.auditlog.storage import LOG
from mpctf_secure.cli.audit import prune
from mpctf_secure.config import load
from mpctf_secure.coordinator.audit import RunLog
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import keystore
from mpctf_secure.transport.tls import utc_now

RUN = "real-run"


def audit(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpctf_secure", "audit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with the folders of its sites in it."""
    with pytest.MonkeyPatch.context() as patch:
        made = RealRun(tmp_path_factory.mktemp("run"), ["rounds=2"], patch, training=False)
        made.run()
        for name in made.config.participants.names:
            (made.folder / "sites" / name / "site.yaml").write_text(load.dump(made.site(name, "127.0.0.1:1")))
        return made.folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """One that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def at_site(folder: Path, name: str = "site-1") -> Path:
    return folder / "sites" / name / "work" / "runs" / RUN / "audit"


def test_log_of_a_run_is_verified_at_both_ends_and_against_each_other(finished: Path) -> None:
    roster = finished / "sites" / "site-2" / "keys" / "rosters" / "1.json"
    result = audit("verify", finished / "audit", at_site(finished), "--roster", roster)
    assert result.returncode == 0, result.stderr
    for line in (
        "12 leaves in order, the first 11 as coordinator has signed them",
        "the first 11 witnessed at step 2 by site-1, site-2, site-3, site-4 (3 are needed)",
        "the last 1 are NOT SIGNED: whoever can write the file may have written them",
        "2 of 2 rounds are closed",
        f"no checkpoint contradicts one of {finished / 'audit'}; it has 1 leaves less",
    ):
        assert f"  {line}\n" in result.stdout


def test_programs_get_what_was_found_as_fields(finished: Path) -> None:
    (run,) = json.loads(audit("verify", finished / "audit", "--format", "json").stdout)
    assert {name: run[name] for name in ("origin", "leaves", "signed", "witnessed", "rounds_closed", "exit_code")} == {
        "origin": f"coordinator/run/{RUN}",
        "leaves": 12,
        "signed": 11,
        "witnessed": 11,
        "rounds_closed": 2,
        "exit_code": None,
    }
    assert [(step["number"], step["size"]) for step in run["steps"]] == [(0, 3), (1, 7), (2, 11)]
    assert set(run["steps"][2]["witnesses"]) == {"site-1", "site-2", "site-3", "site-4"}


def test_what_is_wrong_with_one_log_hides_no_other(folder: Path) -> None:
    drop_lines(folder / "audit")
    result = audit("verify", folder / "audit", at_site(folder), "--format", "json")
    assert result.returncode == 4
    spoilt, good = json.loads(result.stdout)
    assert (len(spoilt["doubts"]), good["doubts"], good["witnessed"]) == (1, [], 11)


def test_site_s_own_log_goes_together_with_the_run_s(finished: Path) -> None:
    result = audit("verify", "--site", finished / "sites" / "site-3" / "site.yaml", "--format", "json")
    own, run = json.loads(result.stdout)
    assert own["log"].startswith("site-3/own/")
    assert "nothing contradicts this site's own log" in run["statements"]
    assert own["doubts"] == run["doubts"] == []
    assert own["leaves"] == own["signed"] == 18


def test_own_log_is_verified_by_itself(finished: Path) -> None:
    (log,) = (finished / "sites" / "site-4" / "keys" / "audit").glob("*/log.jsonl")
    roster = finished / "sites" / "site-1" / "keys" / "rosters" / "1.json"
    result = audit("verify", log.parent, "--roster", roster)
    assert "18 leaves in order, 0 of them not signed yet" in result.stdout
    assert "in roster version 1, hash " in result.stdout
    assert "…, that is site-4\n" in result.stdout


def test_what_a_log_says_is_shown_and_handed_on(finished: Path) -> None:
    shown = audit("show", finished / "audit", "--kind", "sum_published").stdout.splitlines()
    assert len(shown) == 2
    assert "survivors site-1, site-2, site-3, site-4" in shown[0]
    whole = json.loads(audit("show", finished / "audit", "--format", "json").stdout)
    lines = [json.loads(line) for line in audit("export", finished / "audit").stdout.splitlines()]
    assert lines == [{"run": RUN, **leaf} for leaf in whole]
    cef = audit("export", finished / "audit", "--format", "cef").stdout.splitlines()
    assert len(cef) == len(whole)
    assert cef[0].startswith("CEF:0|mpctf-secure|audit log|0.1.0|run_opened|run opened|1|rt=")
    ocsf = [json.loads(line) for line in audit("export", finished / "audit", "--format", "ocsf").stdout.splitlines()]
    assert [event["metadata"]["sequence"] for event in ocsf] == list(range(len(whole)))


def test_evidence_of_a_site_is_in_one_archive_and_checks_there(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "evidence.zip"
    result = audit("pack", finished / "sites" / "site-1" / "site.yaml", RUN, target)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(target) as archive:
        archive.extractall(tmp_path / "pack")
    pack = tmp_path / "pack"
    assert audit("verify", pack / "run").returncode == 0
    kinds = [
        json.loads(one["leaf"])["kind"] for one in json.loads((pack / "own" / "proofs.json").read_text())["leaves"]
    ]
    of_a_round = ["joined", "charged", "uploaded", "confirmed", "released", "heard", "cosigned"]
    assert kinds == ["run_accepted", "cosigned", *of_a_round, *of_a_round, "run_done"]
    assert json.loads((pack / "privacy.json").read_text())[0]["runs"][0]["releases"] == 2
    assert "3 of 4 participants make a quorum" in (pack / "README.md").read_text()
    again = audit("pack", finished / "sites" / "site-1" / "site.yaml", RUN, target)
    assert (again.returncode, again.stderr.splitlines()[0]) == (2, f"error: {target}: exists already")


def test_proof_convinces_whoever_has_a_roster_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    roster = finished / "sites" / "site-2" / "keys" / "rosters" / "1.json"
    path = tmp_path / "proof.json"
    path.write_text(audit("prove", finished / "audit", 4, "--since", 3).stdout)
    (found,) = json.loads(audit("verify", path, "--roster", roster, "--format", "json").stdout)
    assert found["origin"] == f"coordinator/run/{RUN}"
    assert (found["signed"], set(found["witnesses"])) == (11, {"site-1", "site-2", "site-3", "site-4"})
    lines = (finished / "audit" / LOG).read_text().splitlines()
    assert f"leaf 4 is in it: {lines[4]}" in found["statements"]
    path.write_text(path.read_text().replace("attempt", "atempt"))
    result = audit("verify", path, "--roster", roster)
    assert result.returncode == 4
    assert f"error: {path}: inclusion proof of leaf 4 does not lead to the root" in result.stderr
    (own,) = (finished / "sites" / "site-4" / "keys" / "audit").glob("*/log.jsonl")
    path.write_text(audit("prove", own.parent, 1).stdout)
    assert "site-4 has signed a log of 18 leaves\n" in audit("verify", path, "--roster", roster).stdout


def edit(old: bytes, new: bytes, path: str = LOG) -> Callable[[Path], None]:
    def change(log: Path) -> None:
        content = (log / path).read_bytes()
        assert old in content
        (log / path).write_bytes(content.replace(old, new, 1))

    return change


def swap_lines(log: Path) -> None:
    lines = (log / LOG).read_bytes().splitlines(keepends=True)
    lines[1], lines[2] = lines[2], lines[1]
    (log / LOG).write_bytes(b"".join(lines))


def drop_lines(log: Path) -> None:
    lines = (log / LOG).read_bytes().splitlines(keepends=True)
    (log / LOG).write_bytes(b"".join(lines[:8]))


TAMPERED = {
    "a leaf is edited": (edit(b'"survivors":["site-1"', b'"survivors":["site-9"'), "was changed"),
    "leaves change places": (swap_lines, "after a leaf of"),
    "leaves are dropped": (drop_lines, "cut off"),
    "the contract is another": (edit(b'"rounds":2', b'"rounds":3', "contract.json"), "another contract_hash"),
    "the roster is another": (edit(b'"version":1', b'"version":2', "rosters/1.json"), "roster"),
    "a certificate is another's": (
        lambda log: (log / "certificates" / "1").write_bytes((log / "certificates" / "2").read_bytes()),
        "certificate of step 1",
    ),
    "a checkpoint is forged": (edit(b"\n7\n", b"\n8\n", "steps/1"), "not valid"),
    "a certificate is no number's": (
        lambda log: (log / "certificates" / "1").write_bytes(b"x"),
        "certificate of step 1",
    ),
    "the log is empty": (lambda log: (log / LOG).write_bytes(b""), "the log is empty"),
}


@pytest.mark.parametrize(("change", "why"), TAMPERED.values(), ids=TAMPERED.keys())
def test_whoever_changes_the_log_is_found_out(folder: Path, change: Callable[[Path], None], why: str) -> None:
    change(folder / "audit")
    result = audit("verify", folder / "audit")
    assert result.returncode == 4
    assert " leaves in order" not in result.stdout
    first, hint = result.stderr.splitlines()
    assert first.startswith(f"error: {folder / 'audit'}: ")
    assert why in first
    assert hint.startswith("hint: ")


def forge(folder: Path, target: Path) -> RunLog:
    """Another log of the same run, as whoever has the coordinator's log key can write it: site-2 has refused."""
    home = folder / "sites" / "coordinator" / "keys"
    forged = RunLog(target, keystore.load_roster(home), RUN, utc_now)
    for line in (folder / "audit" / LOG).read_bytes().splitlines()[:3]:
        forged._log.append(Entry.decode(line, OfRun).event)
    forged._log.append(Vetoed(participant="site-2"))
    forged.keep((folder / "audit" / "contract.json").read_bytes(), keystore.roster_files(home, 1))
    return forged


def stolen(folder: Path) -> SigningKey:
    return keystore.unseal(folder / "sites" / "coordinator" / "keys", PHRASE).log


def test_thief_of_the_log_key_cannot_write_another_past(folder: Path) -> None:
    """It makes a whole log and signs it, but has no cosignatures; and any site's copy convicts the key."""
    forge(folder, folder / "forged").checkpoint(0, stolen(folder))
    assert "no step was witnessed" in audit("verify", folder / "forged" / "audit").stdout
    result = audit("verify", folder / "forged" / "audit", at_site(folder), cwd=folder)
    assert result.returncode == 4
    (evidence,) = folder.glob("fork-*.json")
    assert f"{evidence.name} convicts coordinator" in result.stderr
    roster = folder / "sites" / "coordinator" / "keys" / "rosters" / "1.json"
    judged = audit("verify", evidence, "--roster", roster)
    assert judged.returncode == 0
    assert "…, that is coordinator\n" in judged.stdout


def test_rewritten_log_without_its_steps_contradicts_any_site_s(folder: Path) -> None:
    """No two checkpoints of one step show it; but no log has both."""
    forge(folder, folder / "forged").close(stolen(folder))
    result = audit("verify", at_site(folder), at_site(folder, "site-2"), folder / "forged" / "audit", cwd=folder)
    assert result.returncode == 4
    assert "has another history: its first 4 leaves, which were signed, are others" in result.stderr


def test_copy_that_was_put_in_another_s_place_is_not_what_the_site_has_cosigned(folder: Path) -> None:
    site_file(folder)
    shutil.rmtree(at_site(folder))
    forge(folder, folder / "forged").close(stolen(folder))
    shutil.move(folder / "forged" / "audit", at_site(folder))
    result = audit("verify", "--site", folder / "sites" / "site-1" / "site.yaml")
    assert result.returncode == 4
    assert "step 1: this site has cosigned 7 leaves" in result.stdout


def test_copy_that_is_lost_or_spoilt_hides_no_other(folder: Path) -> None:
    site_file(folder)
    other = at_site(folder).parents[1] / "other-run" / "audit"
    shutil.copytree(at_site(folder), other)
    (other / LOG).write_bytes(b"spoilt\n")
    empty = at_site(folder).parents[1] / "third-run" / "audit"
    empty.mkdir(parents=True)
    (empty / LOG).touch()
    found = json.loads(audit("verify", "--site", folder / "sites/site-1/site.yaml", "--format", "json").stdout)
    assert [len(one["doubts"]) for one in found] == [0, 1, 0, 0]
    assert found[-1]["statements"] == ["nothing is there"]


def cut_own(home: Path) -> None:
    (path,) = (home / "keys" / "audit").glob("*/log.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))


def cut_ledger(home: Path) -> None:
    for name in ("ledger.jsonl", "ledger.head"):
        (home / "keys" / name).unlink()


OWN_CHANGED = {
    "the own log has lost its end": (cut_own, "cut off"),
    "the ledger is an older one": (cut_ledger, "the privacy ledger is not the one that was charged"),
}


@pytest.mark.parametrize(("change", "why"), OWN_CHANGED.values(), ids=OWN_CHANGED.keys())
def test_site_that_changes_its_own_record_is_found_out(folder: Path, change: Callable[[Path], None], why: str) -> None:
    home = folder / "sites" / "site-1"
    site_file(folder)
    assert audit("verify", "--site", home / "site.yaml").returncode == 0
    change(home)
    result = audit("verify", "--site", home / "site.yaml")
    assert result.returncode == 4
    assert why in result.stderr


def test_own_log_that_nobody_has_signed_is_nobody_s(folder: Path) -> None:
    """Anybody can write one under a key that is public."""
    (log,) = (folder / "sites" / "site-4" / "keys" / "audit").glob("*/log.jsonl")
    (log.parent / "checkpoint").unlink()
    edit(b'"attempt":1', b'"attempt":2')(log.parent)
    result = audit("verify", log.parent)
    assert result.returncode == 4
    assert "nothing of it is signed: whoever can write the file may have written it" in result.stderr


def test_own_log_under_another_s_name_is_refused(finished: Path, tmp_path: Path) -> None:
    keys = keystore.unseal(finished / "sites" / "site-4" / "keys", PHRASE)
    OwnLog(tmp_path, "site-3", keys.identity.public, keys.log.public, utc_now).sign(keys.log)
    (log,) = (tmp_path / "audit").glob("*/log.jsonl")
    assert audit("verify", log.parent).returncode == 0
    roster = finished / "sites" / "site-1" / "keys" / "rosters" / "1.json"
    result = audit("verify", log.parent, "--roster", roster)
    assert (result.returncode, "site-3 does not have its key in the given roster" in result.stderr) == (4, True)


def test_evidence_that_a_site_has_is_not_passed_over(folder: Path) -> None:
    site_file(folder)
    forge(folder, folder / "forged").checkpoint(0, stolen(folder))
    assert audit("verify", folder / "forged" / "audit", at_site(folder), cwd=folder).returncode == 4
    (evidence,) = folder.glob("fork-*.json")
    shutil.copy(evidence, at_site(folder) / "fork.json")
    result = audit("verify", "--site", folder / "sites" / "site-1" / "site.yaml")
    assert (result.returncode, "the coordinator has signed two histories" in result.stderr) == (4, True)


def test_what_is_no_file_or_no_roster_is_an_error_and_no_crash(folder: Path, tmp_path: Path) -> None:
    (folder / "audit" / "steps" / "3").mkdir()
    roster = folder / "sites" / "site-1" / "keys" / "rosters" / "1.json"
    assert audit("verify", folder / "audit", "--roster", roster).returncode == 0
    content = json.loads(roster.read_text())
    content["roster"]["members"] = [one for one in content["roster"]["members"] if one["role"] == "participant"]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    result = audit("verify", folder / "audit", "--roster", bad)
    assert (result.returncode, len(result.stderr.splitlines())) == (4, 2), result.stderr
    assert f"error: {bad}: " in result.stderr


def site_file(folder: Path) -> None:
    """site.yaml of a copied folder names the copy."""
    path = folder / "sites" / "site-1" / "site.yaml"
    home = path.parent
    text = path.read_text()
    for name in ("keys", "work"):
        line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
        text = text.replace(line, f"{name}: {home / name}")
    path.write_text(text)


def test_old_logs_go_and_what_they_ended_with_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_file(folder)
    home = folder / "sites" / "site-1"
    OwnLog(home / "keys", "site-1", bytes(32), SigningKey(b"2" * 32).public, utc_now)
    first, second = (record.key.name for record in own_logs.verified(home / "keys"))
    arguments = ("prune", "--keys", home / "keys", "--runs", home / "work" / "runs", "--older-than", 200)
    assert audit(*arguments).stdout == ""
    later = utc_now() + datetime.timedelta(days=201)
    monkeypatch.setattr(prune, "utc_now", lambda: later)
    assert list(prune.prune_logs(home / "keys", home / "work" / "runs", 200)) == [
        first,
        second,
        f"coordinator/run/{RUN}",
    ]
    assert not at_site(folder).exists()
    (left,) = own_logs.verified(home / "keys")
    assert left.history.find("pruned", first)
    assert left.history.find("pruned", second)
    assert audit("prune", "--keys", home / "keys", "--older-than", 10).returncode == 2
    assert audit("prune", "--keys", home, "--older-than", 200).returncode in {2, 3}


def test_prune_names_the_log_that_is_spoilt(folder: Path) -> None:
    site_file(folder)
    (at_site(folder) / LOG).write_bytes(b"spoilt\n")
    home = folder / "sites" / "site-1"
    result = audit("prune", "--keys", home / "keys", "--runs", home / "work" / "runs", "--older-than", 200)
    assert (result.returncode, result.stderr.startswith(f"error: {at_site(folder)}: leaf 0: ")) == (4, True)


def test_pack_of_a_site_whose_own_log_was_never_signed_is_an_error(folder: Path) -> None:
    site_file(folder)
    home = folder / "sites" / "site-1"
    (log,) = (home / "keys" / "audit").glob("*/log.jsonl")
    (log.parent / "checkpoint").unlink()
    result = audit("pack", home / "site.yaml", RUN, folder / "evidence.zip")
    assert (result.returncode, "0 of 18 leaves are signed" in result.stderr) == (2, True), result.stderr
    assert not (folder / "evidence.zip").exists()


def remove(*names: str) -> Callable[[Path], None]:
    def change(log: Path) -> None:
        for name in names:
            path = log / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def forge_unsigned(log: Path) -> None:
    """With nothing beside it that says otherwise, anybody can write a log."""
    remove("checkpoint", "witnessed", "steps", "certificates", "contract.json")(log)
    edit(b'"survivors":["site-1",', b'"survivors":[')(log)


REMOVED = {
    "the contract": (remove("contract.json"), "contract.json is missing"),
    "the certificates": (remove("certificates"), "the certificate of step 1 is missing"),
    "the last certificate that was signed for": (
        remove("certificates/1", "certificates/2"),
        "the certificate of step 1 is missing",
    ),
    "the rosters": (remove("rosters"), "no roster beside the log"),
    "everything that is signed": (forge_unsigned, "contract.json is missing"),
}


@pytest.mark.parametrize(("change", "why"), REMOVED.values(), ids=REMOVED.keys())
def test_evidence_that_was_removed_is_missed(folder: Path, change: Callable[[Path], None], why: str) -> None:
    change(folder / "audit")
    result = audit("verify", folder / "audit")
    assert result.returncode == 4
    assert why in result.stderr


def test_forged_cosignature_is_found(folder: Path) -> None:
    path = folder / "audit" / "witnessed"
    note = Note.decode(path.read_bytes())
    line = note.lines[2]
    spoilt = replace(line, signature=line.signature[:-1] + bytes([line.signature[-1] ^ 1]))
    path.write_bytes(replace(note, lines=(*note.lines[:2], spoilt)).encode())
    result = audit("verify", folder / "audit")
    assert (result.returncode, "signature is not valid" in result.stderr) == (4, True)


def test_site_misses_a_copy_and_an_own_log_that_are_gone(folder: Path) -> None:
    site_file(folder)
    home = folder / "sites" / "site-1"
    shutil.rmtree(at_site(folder))
    result = audit("verify", "--site", home / "site.yaml")
    assert (result.returncode, "this site has cosigned it; it is gone" in result.stderr) == (4, True)
    at_site(folder).mkdir()
    (home / "keys" / "audit" / "current").write_bytes(b"\xff\0")
    assert audit("verify", "--site", home / "site.yaml").returncode == 3
    (home / "keys" / "audit" / "current").unlink()
    result = audit("verify", "--site", home / "site.yaml")
    assert (result.returncode, "the own log is gone" in result.stderr) == (4, True)


WRONG = {
    "nothing": (("verify",), 2, "name an audit folder"),
    "no such folder": (("verify", "no-such"), 2, "no-such: no log.jsonl here"),
    "a folder that is none": (("verify", "."), 2, "no log.jsonl here"),
    "a file that is no evidence": (("verify", __file__), 2, "neither a proof nor evidence"),
    "no such roster": (("verify", "{audit}", "--roster", "no-such.json"), 3, "no-such.json"),
    "a leaf that is not there": (("prove", "{audit}", "99"), 2, "not 100"),
    "a size that is not there": (("prove", "{audit}", "1", "--since", "99"), 2, "not 99"),
    "no such log": (("show", "no-such"), 2, "no-such"),
    "no such kind": (("show", "{audit}", "--kind", "dropuot"), 2, "no dropuot in"),
    "no such format": (("export", "{audit}", "--format", "pdf"), 2, "pdf"),
    "no such run": (("pack", "{site}", "no-run", "x.zip"), 2, "no log of a run no-run"),
    "a proof by itself": (("verify", "{proof}"), 2, "a proof is checked with the keys of a roster"),
    "a log against itself": (("verify", "{audit}", "{audit}/../audit"), 2, "named twice"),
    "no such runs": (("prune", "--keys", "{keys}", "--older-than", "183", "--runs", "none"), 2, "none: no such folder"),
    "no such keys": (("prune", "--keys", "none", "--older-than", "183"), 3, "none: no keys here"),
    "no such site": (("verify", "--site", "no-site.yaml"), 2, "no-site.yaml"),
}


@pytest.mark.parametrize(("arguments", "code", "why"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_gets_one_line_and_what_to_do(
    finished: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, why: str
) -> None:
    site, proof = finished / "sites" / "site-1", tmp_path / "proof.json"
    proof.write_text(audit("prove", finished / "audit", 1).stdout)
    names = {"audit": finished / "audit", "site": site / "site.yaml", "keys": site / "keys", "proof": proof}
    result = audit(*(argument.format(**names) for argument in arguments))
    assert result.returncode == code, result.stderr
    first, hint = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert why in first
    assert hint.startswith("hint: ")
