"""The key ceremony as operators do it: five homes, the real commands, then runs between the five."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from mpctf_secure.identity.documents import SignedRoster

CLI = [sys.executable, "-m", "mpctf_secure"]
CONFIGS = Path(__file__).parents[2] / "configs"
SITES = ("bank-b", "hospital-a", "insurer-d", "telecom-c")
COORDINATOR = "registry-x"
EVERYBODY = tuple(sorted((*SITES, COORDINATOR)))


class Home:
    """One organisation: its folder, and its operator at the keyboard."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.folder = name, root / name
        self.folder.mkdir(parents=True)
        self.phrase = f"passphrase of {name}"
        self.output = ""

    def popen(self, *arguments: object, **options: object) -> subprocess.Popen[str]:
        reading, writing = os.pipe()
        os.write(writing, self.phrase.encode())
        os.close(writing)
        command = [*CLI, *map(str, arguments)]
        if arguments[0] != "enroll" or arguments[1] in {"init", "request", "renew", "rotate", "sign", "mailbox"}:
            command += ["--passphrase-fd", str(reading)]
        process = subprocess.Popen(
            command, cwd=self.folder, pass_fds=[reading], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, **options,
        )  # fmt: skip
        os.close(reading)
        return process

    def enroll(self, *arguments: object, typed: str = "", code: int = 0) -> str:
        process = self.popen("enroll", *arguments)
        output, _ = process.communicate(typed, timeout=60)
        assert process.returncode == code, output
        self.output += output
        return output

    def take(self, *paths: Path) -> None:
        """Get files by e-mail."""
        for path in paths:
            if path.parent != self.folder:
                shutil.copy(path, self.folder)

    def clear(self) -> None:
        """Put the files of the last ceremony away, as a tidy operator does."""
        for path in (*self.folder.glob("*.request.json"), *self.folder.glob("*.signature.json")):
            path.unlink()

    def path(self, name: str) -> Path:
        return self.folder / name

    def words(self, roster: str) -> str:
        """What this operator reads out."""
        rows = [line.split() for line in self.enroll("show", roster).splitlines()]
        pairs = {int(row[i]): row[i + 1] for row in rows if row[0].isdigit() for i in range(0, len(row), 2)}
        return " ".join(word[:4] for _, word in sorted(pairs.items()))


T = TypeVar("T")


def each(homes: Iterable[Home], act: Callable[[Home], T]) -> dict[str, T]:
    """What everybody does by itself, two at a time."""
    homes = list(homes)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([home.name for home in homes], pool.map(act, homes), strict=True))


def enter(home: Home) -> None:
    home.enroll("init", home.name, *(["--coordinator"] if home.name == COORDINATOR else []))
    home.enroll("request")


def exchange(homes: Iterable[Home], pattern: str) -> None:
    homes = list(homes)
    files = [path for home in homes for path in home.folder.glob(pattern)]
    for home in homes:
        home.take(*files)


def sign_and_install(
    homes: Iterable[Home], version: int, signers: Iterable[Home], proposer: Home | None = None
) -> None:
    homes = list(homes)
    if proposer:
        for home in homes:
            home.take(proposer.path(f"roster-{version}.json"))
    each(signers, lambda home: home.enroll("sign", f"roster-{version}.json"))
    exchange(homes, f"roster-{version}.*.signature.json")

    def install(home: Home) -> None:
        signatures = sorted(path.name for path in home.folder.glob(f"roster-{version}.*.signature.json"))
        home.enroll("verify", f"roster-{version}.json", *signatures)

    each(homes, install)


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Home]:
    """After the genesis ceremony."""
    root = tmp_path_factory.mktemp("organisations")
    homes = {name: Home(root, name) for name in EVERYBODY}
    each(homes.values(), enter)
    exchange(homes.values(), "*.request.json")
    requests = [f"{name}.request.json" for name in EVERYBODY]
    each(homes.values(), lambda home: home.enroll("compare", *requests))  # the words are seen; nobody was heard yet
    words = each(homes.values(), lambda home: home.words("roster-1.json"))

    def hear(home: Home) -> None:
        typed = "".join(words[other] + "\n" for other in EVERYBODY if other != home.name)
        assert "next: mpctf-secure enroll sign" in home.enroll("compare", *requests, typed=typed)

    each(homes.values(), hear)
    sign_and_install(homes.values(), 1, homes.values())
    return homes


def test_everybody_has_the_same_roster(homes: dict[str, Home]) -> None:
    assert len({home.enroll("show", "--format", "json") for home in homes.values()}) == 1
    for name, home in homes.items():
        assert f"signed by {name}" in home.enroll("show")


def test_swapped_key_is_noticed_on_the_telephone(homes: dict[str, Home], tmp_path: Path) -> None:
    """The post gives hospital-a another request of bank-b: what bank-b reads out is not what is expected."""
    attacker, victim = Home(tmp_path, "attacker"), Home(tmp_path, "victim")
    attacker.enroll("init", "bank-b")
    attacker.enroll("request")
    victim.enroll("init", "hospital-a")
    victim.enroll("request")
    victim.take(attacker.path("bank-b.request.json"), homes[COORDINATOR].path(f"{COORDINATOR}.request.json"))
    truth = homes["bank-b"].words("roster-1.json")
    requests = sorted(path.name for path in victim.folder.glob("*.request.json"))
    output = victim.enroll("compare", *requests, typed=f"{truth}\n" * 3, code=4)
    assert "error: bank-b has another roster than you" in output
    output = victim.enroll("sign", "roster-1.json", code=4)
    assert "you have not heard the words of bank-b" in output


def test_files_travel_through_the_mailbox_and_nobody_s_takes_the_place_of_another(
    homes: dict[str, Home], tmp_path: Path
) -> None:
    sender, receiver, post = Home(tmp_path, "utility-e"), Home(tmp_path, "receiver"), homes[COORDINATOR]
    sender.enroll("init", "utility-e")
    sender.enroll("request")
    for home in (sender, receiver):
        home.take(post.path(f"{COORDINATOR}.request.json"))
    process = post.popen("enroll", "mailbox", "127.0.0.2:0")
    try:
        assert process.stdout
        address = process.stdout.readline().split()[2].rstrip(";")
        there = ("--to", address, "--coordinator", f"{COORDINATOR}.request.json")
        assert "sent utility-e.request.json" in sender.enroll("send", "utility-e.request.json", *there)
        assert "fetched utility-e." in receiver.enroll("fetch", *there)
        (fetched,) = receiver.folder.glob("utility-e.*.request.json")
        first = sender.path("utility-e.request.json").read_bytes()
        assert fetched.read_bytes() == first
        sender.enroll("renew", "--days", "30")
        sender.enroll("send", "utility-e.request.json", *there)
        receiver.enroll("fetch", *there)
        assert len(list(receiver.folder.glob("utility-e.*.request.json"))) == 2
        assert fetched.read_bytes() == first
        receiver.take(homes["bank-b"].path("bank-b.request.json"))
        wrong = ("--to", address, "--coordinator", "bank-b.request.json")
        assert "error: no mailbox at" in receiver.enroll("fetch", *wrong, code=3)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.slow
def test_three_begin_rotate_and_take_a_fourth_in(tmp_path: Path) -> None:
    """All by mail in one heap, with everybody's files and a stranger's among them, and globs as in the guide."""
    homes = [Home(tmp_path, name) for name in ("bank-b", "hospital-a", "insurer-d", "registry-x")]
    by_name = {home.name: home for home in homes}
    each(homes, enter)
    agree(homes, homes, "roster-1.json", "*.request.json")

    for home in homes:
        home.clear()
    by_name["bank-b"].enroll("rotate")
    agree(homes, [by_name["bank-b"]], "roster-2.json", "*.request.json")
    assert by_name["bank-b"].path("roster-2.bank-b.old-keys.signature.json").exists()

    fourth = Home(tmp_path, "telecom-c")
    enter(fourth)
    for home in homes:
        home.clear()
    fourth.take(by_name["bank-b"].path("roster-2.signed.json"))
    output = fourth.enroll("verify", "roster-2.signed.json", code=2)  # a mistake of many
    assert "error: roster: you are not in version 2" in output
    assert not fourth.path("keys/rosters").exists()
    by_name["hospital-a"].path("x.signature.json").write_bytes(strangers_vote(fourth))
    agree([*homes, fourth], [fourth], "roster-3.json", "*.request.json", "roster-2.signed.json")
    rosters = {home.enroll("show", "--format", "json") for home in (*homes, fourth)}
    assert len(rosters) == 1

    for home in homes:
        home.clear()
    assert "of 4" not in homes[0].enroll("revoke", "telecom-c")
    sign_and_install(homes, 4, [home for home in homes if home.name != COORDINATOR], homes[0])
    assert "of 3 participants all must sign, bank-b too" in homes[1].enroll("revoke", "bank-b")


def strangers_vote(home: Home) -> bytes:
    """A good signature, of a roster that nobody has seen, by keys that are in none."""
    from mpctf_secure.identity import enrollment, keystore

    roster = keystore.load_document(home.path("roster-2.signed.json"), SignedRoster).roster
    keys = keystore.unseal(home.path("keys"), home.phrase.encode())
    return enrollment.vote(roster, keys, []).encode()


def agree(homes: list[Home], new: list[Home], roster: str, *patterns: str) -> None:
    """Compare on the telephone what is new, sign, verify; every command with the globs of the guide."""
    for pattern in patterns:
        exchange(homes, pattern)

    def files(home: Home) -> list[str]:
        return sorted(path.name for pattern in patterns for path in home.folder.glob(pattern))

    each(homes, lambda home: home.enroll("compare", *files(home)))
    words = each(homes, lambda home: home.words(roster))
    newcomer = {home.name for home in new} if len(new) < len(homes) else set()

    def hear_and_sign(home: Home) -> None:
        heard = [
            n for n in sorted(words) if n != home.name and (not newcomer or n in newcomer or home.name in newcomer)
        ]
        if home.name in newcomer and home.path("keys/rosters").exists():
            heard = []  # it rotates: the others hear it, it knows the others
        home.enroll("compare", *files(home), typed="".join(words[name] + "\n" for name in heard))
        home.enroll("sign", roster)

    each(homes, hear_and_sign)
    exchange(homes, "*.signature.json")

    def install(home: Home) -> None:
        arguments = sorted(path.name for path in home.folder.glob("*.signature.json"))
        before = [] if home.path("keys/rosters").exists() else [path.name for path in home.folder.glob("*.signed.json")]
        home.enroll("verify", *before, roster, *arguments)

    each(homes, install)


@pytest.fixture(scope="module")
def network(homes: dict[str, Home], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Model and data at every site; the coordinator listens on an address of its own."""
    from mpctf_secure.experiments.intents import write_intents
    from mpctf_secure.experiments.tiny_llama import write_tiny_llama
    from mpctf_secure.training.rows import load_rows

    shared = tmp_path_factory.mktemp("shared")
    write_intents(shared, SITES, 2000, 12, 0)
    texts = [m.content for name in SITES for row in load_rows(shared / f"{name}.jsonl") for m in row.messages]
    write_tiny_llama(shared / "model", texts)
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        address = f"127.0.0.2:{free.getsockname()[1]}"
    for name in SITES:
        home = homes[name]
        shutil.copytree(shared / "model", home.path("model"))
        shutil.copy(shared / f"{name}.jsonl", home.path("data.jsonl"))
        site = home.path("site.yaml").read_text()
        home.path("site.yaml").write_text(site.replace("192.0.2.1:8443", address))
    return address


class Run:
    """A coordinator process and its run folder."""

    def __init__(self, homes: dict[str, Home], network: str, names: Iterable[str], **settings: object) -> None:
        lines = [f"run: joint\nparticipants: [{', '.join(names)}]\nlisten: {network}\nmodel: {{base: tiny}}"]
        lines += ["timeouts: {join: 120, stage: 60}", *(f"{key}: {value}" for key, value in settings.items())]
        homes[COORDINATOR].path("run.yaml").write_text("\n".join(lines) + "\n")
        self.process = homes[COORDINATOR].popen("start", "run.yaml")
        assert self.process.stdout
        self.first_line = self.process.stdout.readline()
        self.folder = Path(self.first_line.split()[-1])

    def wait_for(self, kind: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while kind not in [event["event"] for event in self.events()]:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)  # polls a file that another process writes

    def events(self) -> list[dict[str, object]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def report(self) -> dict[str, object]:
        return json.loads((self.folder / "report.json").read_text())

    def end(self, code: int = 0) -> str:
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == code, output
        return output


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for number in (signal.SIGCONT, signal.SIGTERM):
            process.send_signal(number) if process.poll() is None else None
        process.wait(30)


def test_five_organisations_run_rotate_revoke_and_go_on(homes, network, running) -> None:
    first = Run(homes, network, SITES, rounds=1, data="{size: 16}")
    joined = {name: homes[name].popen("join", "site.yaml", "--once") for name in SITES}
    running.extend([first.process, *joined.values()])
    first.wait_for("round_started")
    assert_no_secret_in_processes(homes, running)
    assert "adapter:" in first.end()
    assert [process.wait(30) for process in joined.values()] == [0] * 4

    rotate("bank-b", homes)
    second = Run(homes, network, SITES, rounds=2, data="{size: 1500}")
    joined = {name: homes[name].popen("join", "site.yaml", "--once") for name in SITES}
    running.extend([second.process, *joined.values()])
    second.wait_for("round_started")
    held = [
        joined[name] for name in ("hospital-a", "insurer-d")
    ]  # however fast it is, the run does not end before that
    for process in held:
        process.send_signal(signal.SIGSTOP)
    revoke("telecom-c", homes)
    output, _ = joined["telecom-c"].communicate(timeout=120)
    assert joined["telecom-c"].returncode == 4, output
    # A call that waited, a new call, or a new connection, whichever notices first.
    assert re.search(r"error: coordinator: .*(not in roster version 3|issued by nobody in the roster)", output), output
    # bank-b has roster 3 by now, and comes back into a run that began under roster 2.
    joined["bank-b"].kill()
    joined["bank-b"].wait(30)
    joined["bank-b"] = homes["bank-b"].popen("join", "site.yaml", "--once")
    running.append(joined["bank-b"])
    for process in held:
        process.send_signal(signal.SIGCONT)
    assert "roster version 3 is in force; out of this run: telecom-c" in second.end()
    output, _ = joined["bank-b"].communicate(timeout=240)
    assert joined["bank-b"].returncode == 0, output
    assert second.report()["rounds"][-1]["survivors"] == ["bank-b", "hospital-a", "insurer-d"]

    third = Run(homes, network, SITES, rounds=1)
    assert third.first_line.startswith("error: participants: telecom-c not in roster version 3")
    third.end(2)
    assert_no_secret_in_files(homes)


def rotate(name: str, homes: dict[str, Home]) -> None:
    old = set(homes[name].folder.glob("keys/*.sealed"))
    homes[name].enroll("rotate")

    def look(home: Home) -> None:
        home.take(homes[name].path(f"{name}.request.json"))
        assert f"new keys: {name}" in home.enroll("compare", f"{name}.request.json")

    each(homes.values(), look)
    read_out = homes[name].words("roster-2.json")
    others = [home for home in homes.values() if home.name != name]
    each(others, lambda home: home.enroll("compare", f"{name}.request.json", typed=read_out + "\n"))
    sign_and_install(homes.values(), 2, homes.values())
    new = set(homes[name].folder.glob("keys/*.sealed"))
    assert len(new) == 1
    assert not new & old


def revoke(name: str, homes: dict[str, Home]) -> None:
    homes[COORDINATOR].enroll("revoke", name)
    others = [home for home in homes.values() if home.name != name]
    exchange(others, "roster-3.json")
    sign_and_install(others, 3, [home for home in others if home.name != COORDINATOR])


def secrets_of(homes: dict[str, Home]) -> list[bytes]:
    from mpctf_secure.hazmat import passphrase

    seeds = [
        passphrase.unseal(home.phrase.encode(), path.read_bytes())
        for home in homes.values()
        for path in home.folder.glob("keys/*.sealed")
    ]
    parts = [seed[at : at + 32] for seed in seeds for at in (0, 32, 64)]
    return [*parts, *(part.hex().encode() for part in parts), *(home.phrase.encode() for home in homes.values())]


def assert_no_secret_in_processes(homes: dict[str, Home], processes: Iterable[subprocess.Popen[str]]) -> None:
    shown = b""
    for process in processes:
        folder = Path("/proc") / str(process.pid)
        shown += (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
    assert b"site.yaml" in shown
    assert not [secret for secret in secrets_of(homes) if secret in shown]


def assert_no_secret_in_files(homes: dict[str, Home]) -> None:
    written = b"".join(
        path.read_bytes() for home in homes.values() for path in home.folder.rglob("*") if path.is_file()
    )
    written += "".join(home.output for home in homes.values()).encode()
    assert b"mpctf-secure/sealed/v1" in written
    assert not [secret for secret in secrets_of(homes) if secret in written]


@pytest.mark.skipif(shutil.which("sslscan") is None, reason="sslscan is not installed")
def test_sslscan_finds_tls_1_3_only(homes, network, running) -> None:
    run = Run(homes, network, [name for name in SITES if name != "telecom-c"], rounds=1)
    running.append(run.process)
    run.wait_for("run_started")
    report = subprocess.run(
        ["sslscan", "--no-colour", "--show-certificate", network], capture_output=True, text=True, check=True
    ).stdout
    for version in ("SSLv2", "SSLv3", "TLSv1.0", "TLSv1.1", "TLSv1.2"):
        assert f"{version:10}disabled" in report
    assert "TLSv1.3   enabled" in report
