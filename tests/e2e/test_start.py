"""`mpctf-secure start` and `join` as a user meets them: real processes, exit codes, and nothing left behind."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from e2e.consortium import processes_of

CONFIGS = Path(__file__).parents[2] / "configs"
CLI = [sys.executable, "-m", "mpctf_secure"]
START = [*CLI, "start", str(CONFIGS / "smoke.yaml"), "--set", "participants.local=3"]


def run_cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    runs = tmp_path_factory.mktemp("runs")
    result = run_cli("start", CONFIGS / "smoke.yaml", "--compare", "alone", "--runs", runs)
    assert result.returncode == 0, result.stderr + result.stdout
    return result, next(runs.iterdir())


def test_run_folder_holds_all_that_was_promised(smoke) -> None:
    _, folder = smoke
    report = json.loads((folder / "report.json").read_text())
    assert report["exit"] == {"code": 0, "reason": "done"}
    assert [r["survivors"] for r in report["rounds"]] == [[f"site-{i}" for i in range(1, 5)]] * 2
    assert set(report["held_out_accuracy"]) == {"base", "federated", *(f"site-{i} alone" for i in range(1, 5))}
    assert report["privacy"]["statement"].startswith("no differential privacy")
    page = (folder / "privacy.md").read_text()
    assert page.startswith(f"# Privacy of run {report['run_id']}\n")
    assert "No differential privacy" in page
    assert report["rounds"][0]["bytes_up"]["site-1"] > 4 * 10_000
    assert (folder / "config.yaml").read_text().startswith(f"contract_hash: {report['contract_hash']}")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("round_finished") == 2
    assert kinds[-1] == "run_ended"


def test_a_sites_job_is_started_once_and_lives_through_all_rounds(smoke) -> None:
    _, folder = smoke
    for number in range(1, 5):
        lines = (folder / "sites" / f"site-{number}" / "work" / "events.jsonl").read_text().splitlines()
        kinds = [json.loads(line)["event"] for line in lines]
        assert (kinds.count("job_started"), kinds.count("round_trained")) == (1, 2)


def test_nodes_of_every_site_are_watched_exactly_at_home_and_coarsely_by_the_coordinator(smoke) -> None:
    result, folder = smoke
    sites = [f"site-{i}" for i in range(1, 5)]
    told = resources_in(folder / "events.jsonl")
    assert sorted({(event["participant"], event["node"]) for event in told}) == [(name, 1) for name in sites]
    for event in told:
        assert event["cpu"] in {0, 0.25, 0.5, 0.75, 1}
        assert event["memory_used"].bit_count() == event["memory_total"].bit_count() == 1
    for first in {event["participant"]: event for event in reversed(told)}.values():
        kept = resources_in(folder / "sites" / first["participant"] / "work" / "events.jsonl")[0]
        assert 0 < kept["memory_used"] < first["memory_used"]
    report = json.loads((folder / "report.json").read_text())["resources"]
    assert {name: [record["node"] for record in nodes] for name, nodes in report.items()} == {n: [1] for n in sites}
    assert all(nodes[0]["memory_used_max"] > 0 and 0 <= nodes[0]["cpu_mean"] <= 1 for nodes in report.values())
    assert "GiB" not in result.stdout


def resources_in(events: Path) -> list[dict[str, Any]]:
    found = map(json.loads, events.read_text().splitlines())
    return [event for event in found if event["event"] == "resources"]


def test_output_says_what_happened(smoke) -> None:
    result, folder = smoke
    for phrase in ("ephemeral local ceremony", "no differential privacy", str(folder / "adapter"), "federated"):
        assert phrase in result.stdout


def test_peft_loads_the_adapter_and_it_is_the_one_of_the_report(smoke) -> None:
    import hashlib

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, folder = smoke
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = base(torch.arange(8)[None]).logits.detach().clone()
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert not torch.equal(model(torch.arange(8)[None]).logits, before)
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == json.loads((folder / "report.json").read_text())["adapter_sha256"]
    assert str(folder) not in (folder / "adapter" / "adapter_config.json").read_text()


def test_no_process_and_no_private_key_is_left(smoke) -> None:
    _, folder = smoke
    assert processes_of(folder) == []
    assert not [*folder.rglob("*.key"), *folder.rglob("*.sealed")]


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted_run_ends_with_exit_7_and_no_child_and_resume_goes_on_to_its_end(tmp_path: Path, stop: int) -> None:
    runs = tmp_path / "runs"
    process = subprocess.Popen([*START, "--runs", str(runs)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = ""
    while "joined" not in output:
        output += process.stdout.readline()
    folder = next(runs.iterdir())
    keys = list(folder.rglob("*.sealed"))
    assert len(keys) == 4
    assert all(stat.S_IMODE(key.stat().st_mode) == 0o600 for key in keys)
    secrets = [*(key.read_bytes() for key in keys), (folder / "passphrase").read_bytes()]
    process.send_signal(stop)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert processes_of(folder) == []
    assert json.loads((folder / "report.json").read_text())["exit"]["code"] == 7
    assert not (folder / "adapter").exists()
    listed = run_cli("runs", "list", "--runs", runs)
    assert listed.stdout.startswith(f"interrupted {folder.name}  round 0 of 2")

    if stop == signal.SIGINT:
        assert list(folder.glob("sites/*/keys/*.sealed"))
        run_cli("runs", "stop", folder.name, "--runs", runs)
        assert not list(folder.glob("sites/*/keys/*.sealed"))
        return
    resumed = run_cli("runs", "resume", folder.name, "--runs", runs, "--format", "json")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert json.loads(resumed.stdout)["exit"]["code"] == 0  # the report is all of standard output
    assert (folder / "adapter").exists()
    again = run_cli("runs", "resume", folder.name, "--runs", runs)
    assert again.returncode == 2
    assert "its keys are destroyed" in again.stderr
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    written += (output + rest + resumed.stdout + resumed.stderr).encode()
    assert not any(secret in written or secret.hex().encode() in written for secret in secrets)


def test_run_is_stopped_for_good_while_it_runs_and_while_it_does_not(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = subprocess.Popen([*START, "--set", "rounds=20", "--runs", str(runs)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "joined" not in process.stdout.readline():
        pass
    folder = next(runs.iterdir())
    assert run_cli("runs", "list", "--runs", runs).stdout.startswith("running")
    assert "within seconds" in run_cli("runs", "stop", folder.name, "--runs", runs).stdout
    process.communicate(timeout=60)
    assert process.returncode == 7
    assert processes_of(folder) == []
    assert not list(folder.glob("sites/*/keys/*.sealed"))
    shown = run_cli("runs", "show", folder.name, "--runs", runs)
    assert shown.stdout.startswith(f"{folder.name}: stopped: stopped by its operator")
    ended = run_cli("runs", "stop", folder.name, "--runs", runs)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {folder.name} has ended: stopped by its operator")
    (runs / "spoilt").mkdir()
    (runs / "spoilt" / "plan.json").write_text("{")
    listed = run_cli("runs", "list", "--runs", runs).stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["stopped", folder.name], ["damaged", "spoilt"]]
    shutil.rmtree(runs / "spoilt")
    nothing = run_cli("runs", "show", "nothing", "--runs", runs)
    assert (nothing.returncode, nothing.stderr.splitlines()[1]) == (2, f"hint: there are: {folder.name}")


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # polls processes and files of others, which nobody notifies us of


def test_children_end_when_start_is_killed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    process = subprocess.Popen([*START, "--runs", str(runs)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "joined" not in process.stdout.readline():
        pass
    folder = next(runs.iterdir())
    assert processes_of(folder)
    process.kill()
    process.wait()
    wait_until(lambda: processes_of(folder) == [])


def test_mistake_that_shows_when_a_local_participant_starts_is_the_commands_own(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    result = run_cli(*START[3:], "--runs", runs, "--set", "model.lora.target_modules=[no_such_layer]")
    assert result.returncode == 3
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: site-")
    assert "target_modules" in error
    assert "all-linear" in hint
    assert processes_of(next(runs.iterdir())) == []


def test_run_below_its_quorum_ends_with_exit_5_and_names_who_is_missing(tmp_path: Path) -> None:
    """One of three participants is killed in training; of three all are needed."""
    runs = tmp_path / "runs"
    process = subprocess.Popen(
        [*START, "--runs", str(runs), "--set", "data.size=4000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    folder = Path(process.stdout.readline().split()[-1])
    wait_until(lambda: '"round_started"' in read(folder / "events.jsonl"))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0")
        if b"join" in words and str(folder / "sites" / "site-1").encode() in b" ".join(words):
            os.kill(int(path.parent.name), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 5
    assert errors.startswith("error: round 1: ")
    assert errors.splitlines()[0].endswith("lost: site-1")
    report = json.loads((folder / "report.json").read_text())
    assert report["culprits"] == ["site-1"]
    assert "killed by signal 9" in str(report["rounds"][0]["dropouts"])
    assert processes_of(folder) == []


def test_coordinator_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import mpctf_secure.cli.start, mpctf_secure.cli.app; "
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


GOOD = """\
participants: {local: 4, data: "builtin:intents"}
model: {base: "builtin:tiny-llama"}
"""

BAD_FILES = {
    "an unknown key, with the right name as hint": (
        GOOD + "round: 3\n", 2, "run.yaml, line 3: round is not a known field", "did you mean rounds?"),
    "a cohort below the quorum": (GOOD + "quorum: 5\n", 2, "quorum: 5 is outside [3, 4]", "quorum"),
    "more colluders than a cohort bears": (
        GOOD + "secagg: {colluders: 3}\n", 2, "secagg.colluders: 3 is outside [1, 2]", "colluders"),
    "two participants without consent": (
        GOOD.replace("local: 4", "local: 2"), 2, "learn each other's update", "allow_pair"),
    "a missing model": (
        GOOD.replace("builtin:tiny-llama", "no-such-model"), 3, "no model 'no-such-model'", "make demo"),
    "missing data": (
        GOOD.replace("builtin:intents", "no/{participant}.jsonl"), 2, "no/site-1.jsonl: No such file", "data file"),
    "one data file for all and no split": (GOOD.replace("builtin:intents", "all.jsonl"), 2, "needs split", "all.jsonl"),
    "a built-in that does not exist": (
        GOOD.replace("builtin:intents", "builtin:intent"), 2, "there is no builtin:intent", "builtin:intents"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "code", "error", "hint"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_run_file_is_one_error_line_and_one_hint(
    tmp_path: Path, text: str, code: int, error: str, hint: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    result = run_cli("start", "run.yaml", cwd=tmp_path)
    lines = result.stderr.splitlines()
    assert result.returncode == code, result.stderr
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert error in lines[0]
    assert hint in lines[1]


def test_data_row_that_is_not_json_is_named_before_anything_starts(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    for name in range(1, 5):
        (tmp_path / f"site-{name}.jsonl").write_text(f"{good}\n" * 3)
    (tmp_path / "site-2.jsonl").write_text(f"{good}\n{{not json\n")
    (tmp_path / "run.yaml").write_text(GOOD.replace("builtin:intents", "{participant}.jsonl"))
    result = run_cli("start", "run.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "site-2.jsonl, row 2: not JSON" in result.stderr.splitlines()[0]
    assert list((tmp_path / "runs").iterdir()) == []


def test_busy_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = run_cli("start", CONFIGS / "smoke.yaml", "--set", f"listen={address}", "--runs", tmp_path)
    assert result.returncode == 3
    lines = [line for line in result.stderr.splitlines() if not line.startswith("E")]
    assert lines[0] == f"error: cannot listen on {address}"
    assert lines[1].startswith("hint: is the address one of this machine's")
    assert not [*tmp_path.rglob("*.key"), *tmp_path.rglob("*.sealed")]
