"""golang.org/x/mod/sumdb, the code of Go's checksum database, reads what a real run has logged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.harness import RealRun

SOURCE = Path(__file__).parents[1] / "go" / "verify.go"
LIBRARIES = Path("/usr/share/gocode")  # where Debian's golang-golang-x-mod-dev is
needs_go = pytest.mark.skipif(
    not shutil.which("go") or not (LIBRARIES / "src/golang.org/x/mod/sumdb/tlog").is_dir(),
    reason="needs Debian's golang-go and golang-golang-x-mod-dev",
)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("go")
    environment = {**os.environ, "GOPATH": str(LIBRARIES), "GO111MODULE": "off", "GOCACHE": str(folder / "cache")}
    command = ["go", "build", "-o", str(folder / "verify"), str(SOURCE)]
    subprocess.run(command, env=environment, check=True)
    return folder / "verify"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        made = RealRun(tmp_path_factory.mktemp("run"), ["rounds=2"], patch, training=False)
        made.run()
        return made.folder


def prove(*arguments: str) -> dict[str, object]:
    command = [sys.executable, "-m", "mpctf_secure", "audit", "prove", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def check(verifier: Path, folder: Path, proof: object) -> subprocess.CompletedProcess[str]:
    path = folder / "proof.json"
    path.write_text(json.dumps(proof))
    roster = folder / "sites" / "site-1" / "keys" / "rosters" / "1.json"
    command = [str(verifier), str(roster), str(path)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@needs_go
def test_go_checks_checkpoint_cosignatures_and_proofs_of_a_real_run(verifier: Path, folder: Path) -> None:
    for log in (folder / "audit", folder / "sites" / "site-2" / "work" / "runs" / "real-run" / "audit"):
        for leaf in ("0", "4", "10"):
            done = check(verifier, folder, prove(str(log), leaf, "--since", "3"))
            assert done.stdout == "coordinator/run/real-run: 11 leaves, 4 witnesses, 1 proved\n", done.stderr
    (own,) = (folder / "sites" / "site-3" / "keys" / "audit").glob("*/log.jsonl")
    done = check(verifier, folder, prove(str(own.parent), "2"))
    assert done.stdout.startswith("site-3/own/"), done.stderr


@needs_go
def test_go_refuses_what_is_not_so(verifier: Path, folder: Path) -> None:
    honest = prove(str(folder / "audit"), "4", "--since", "3")
    (leaf,) = honest["leaves"]
    lies = [
        {**honest, "leaves": [{**leaf, "leaf": leaf["leaf"].replace('"round":1', '"round":2')}]},
        {**honest, "leaves": [{**leaf, "index": 5}]},
        {**honest, "since": 4},
        {**honest, "root": leaf["inclusion"][0]},
        {**honest, "checkpoint": honest["checkpoint"].replace("\n11\n", "\n12\n")},
        {**honest, "checkpoint": honest["checkpoint"].replace("coordinator/", "site-1/")},
    ]
    assert check(verifier, folder, honest).returncode == 0
    for lie in lies:
        assert check(verifier, folder, lie).returncode == 1
