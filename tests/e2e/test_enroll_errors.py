"""What goes wrong in a ceremony: one error line, one hint, the exit code, nothing written."""

import datetime
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

from mpctf_secure.config import load
from mpctf_secure.config.site import SiteConfig
from mpctf_secure.hazmat.passphrase import LIGHT
from mpctf_secure.identity import ceremony, enrollment, keystore
from mpctf_secure.identity.documents import Organisation, Request
from mpctf_secure.ids import ParticipantName

PHRASE = b"a passphrase of the test"
NAMES = ("bank-b", "hospital-a", "registry-x")


def cli(folder: Path, *arguments: str, phrase: bytes = PHRASE) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "mpctf_secure", *arguments],
        cwd=folder,
        input=phrase,
        capture_output=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """bank-b with keys and a request, no roster."""
    folder = tmp_path / "home"
    folder.mkdir()
    keystore.create(folder / "keys", Organisation(name="bank-b", role="participant"), PHRASE, LIGHT)
    assert cli(folder, "enroll", "request", "--passphrase-fd", "0").returncode == 0
    return folder


@pytest.fixture
def enrolled(tmp_path: Path) -> Path:
    """bank-b with a roster of three."""
    hold(tmp_path, datetime.datetime.now(datetime.UTC))
    return tmp_path / "bank-b"


def hold(root: Path, now: datetime.datetime) -> None:
    ceremony.hold({ParticipantName(n): root / n / "keys" for n in NAMES}, ParticipantName("registry-x"), now, PHRASE)


def expect(result: subprocess.CompletedProcess[bytes], code: int, error: str, hint: str) -> None:
    lines = result.stderr.decode().splitlines()
    assert result.returncode == code, result.stderr
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"], lines
    assert error in lines[0]
    assert hint in lines[1]


WITHOUT_ROSTER: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "a name that is none": (
        ("enroll", "init", "Bank B", "--keys", "k2", "--passphrase-fd", "0"), 2, "'Bank B'", "hyphens"),
    "keys that are there already": (
        ("enroll", "init", "bank-b", "--passphrase-fd", "0"), 2, "keys: exists already", "--keys"),
    "no keys": (
        ("enroll", "request", "--keys", "none", "--passphrase-fd", "0"), 3, "none: no keys here", "enroll init"),
    "a second request": (
        ("enroll", "request", "--passphrase-fd", "0"), 2, "bank-b.request.json: exists already", "enroll renew"),
    "a request where a roster is due": (
        ("enroll", "sign", "bank-b.request.json", "--passphrase-fd", "0"), 4, "not a roster: type", "right file"),
    "a rotation before there is a roster": (
        ("enroll", "rotate", "--passphrase-fd", "0"), 2, "no roster is installed", "enroll verify"),
    "a mailbox at a participant": (
        ("enroll", "mailbox", "127.0.0.1:0", "--passphrase-fd", "0"), 2, "bank-b is no coordinator", "known to all"),
    "a descriptor that cannot be": (
        ("enroll", "renew", "--passphrase-fd", "-1"), 2, "Invalid value for '--passphrase-fd'", "enroll renew --help"),
    "no request among the files": (
        ("enroll", "compare", "roster.json"), 2, "roster.json: no such file", "check the name"),
    "a roster too small": (("enroll", "compare", "bank-b.request.json"), 4, "at least two participants", ""),
    "nothing installed to show": (("enroll", "show"), 2, "no roster is installed", "enroll verify"),
    "nothing installed to revoke from": (("enroll", "revoke", "bank-b"), 2, "no roster is installed", "enroll verify"),
    "a mailbox at a port that is none": (
        ("enroll", "mailbox", "127.0.0.1:99999", "--passphrase-fd", "0"), 2, "127.0.0.1:99999: not an IP", "8444"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "error", "hint"), WITHOUT_ROSTER.values(), ids=WITHOUT_ROSTER.keys())
def test_mistake_before_there_is_a_roster(
    home: Path, arguments: tuple[str, ...], code: int, error: str, hint: str
) -> None:
    before = sorted(path for path in home.rglob("*") if path.name != "mailbox")
    expect(cli(home, *arguments), code, error, hint)
    assert sorted(path for path in home.rglob("*") if path.name != "mailbox") == before


def test_short_passphrase_makes_no_keys(tmp_path: Path) -> None:
    result = cli(tmp_path, "enroll", "init", "bank-b", "--passphrase-fd", "0", phrase=b"eleven char")
    expect(result, 2, "shorter than 12", "five random words")
    assert list(tmp_path.iterdir()) == []


def flip(data: bytes) -> bytes:
    return data.replace(b'"nonce":"', b'"nonce":"f', 1)[: len(data)]


SPOILT: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "0 bytes": (lambda data: b"", "not a file of the ceremony"),
    "not UTF-8": (lambda data: b"\xff" + data, "not a file of the ceremony"),
    "a key twice": (lambda data: data.replace(b'"box"', b'"name":"bank-c","box"', 1), "not in canonical form"),
    "a changed name": (lambda data: data.replace(b'"bank-b"', b'"bank-c"'), "request of bank-c: identity key"),
    "longer than a document may be": (lambda data: data + b" " * (2 << 20), "larger than"),
}


@pytest.mark.parametrize(("spoil", "error"), SPOILT.values(), ids=SPOILT.keys())
def test_spoilt_file_is_named_and_nothing_is_written(home: Path, spoil: Callable[[bytes], bytes], error: str) -> None:
    path = home / "bank-b.request.json"
    path.write_bytes(spoil(path.read_bytes()))
    before = sorted(home.rglob("*"))
    expect(cli(home, "enroll", "compare", path.name), 4, error, "")
    assert sorted(home.rglob("*")) == before


def test_file_of_a_gigabyte_is_refused_at_once(home: Path) -> None:
    with (home / "huge.json").open("wb") as stream:
        stream.truncate(1 << 30)
    expect(cli(home, "enroll", "show", "huge.json"), 4, "huge.json: not a file of the ceremony", "attachment")


def test_wrong_passphrase_is_said_and_nothing_is_signed(enrolled: Path) -> None:
    expect(cli(enrolled, "enroll", "renew", "--passphrase-fd", "0", phrase=b"wrong"), 4, "wrong passphrase", "")
    assert not list(enrolled.glob("*.json"))


def test_unfinished_ceremony_says_whose_signature_is_missing(enrolled: Path, tmp_path: Path) -> None:
    assert cli(enrolled, "enroll", "revoke", "hospital-a").returncode == 4  # two participants are the least
    assert cli(enrolled, "enroll", "renew", "--passphrase-fd", "0").returncode == 0
    assert cli(enrolled, "enroll", "compare", "bank-b.request.json").returncode == 0
    expect(cli(enrolled, "enroll", "verify", "roster-2.json"), 4, "0 participants of version 1 have signed", "")
    assert cli(enrolled, "enroll", "sign", "roster-2.json", "--passphrase-fd", "0").returncode == 0
    files = [path.name for path in enrolled.glob("roster-2*.json")]
    expect(cli(enrolled, "enroll", "verify", *files), 4, "1 participants of version 1 have signed, 2 are needed", "")


def test_expired_roster_stops_join_and_start(tmp_path: Path) -> None:
    hold(tmp_path, datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=31))
    site = SiteConfig(coordinator="127.0.0.1:9", model=Path("model"), data=Path("data.jsonl"))
    (tmp_path / "bank-b" / "site.yaml").write_text(load.dump(site))
    run = "participants: [bank-b, hospital-a]\nmodel: {base: x}\nsecagg: {allow_pair: true}\n"
    (tmp_path / "registry-x" / "run.yaml").write_text(run)
    for name, command in (("bank-b", ("join", "site.yaml")), ("registry-x", ("start", "run.yaml"))):
        result = cli(tmp_path / name, *command, "--passphrase-fd", "0")
        expect(result, 4, "roster version 1 expired on", "enroll re")


def test_run_file_with_strangers_or_with_a_participant_s_keys_is_refused(enrolled: Path, tmp_path: Path) -> None:
    for folder in (enrolled, tmp_path / "registry-x"):
        (folder / "run.yaml").write_text("participants: [bank-b, hospital-a, nobody]\nmodel: {base: x}\n")
    result = cli(tmp_path / "registry-x", "start", "run.yaml", "--passphrase-fd", "0")
    expect(result, 2, "nobody not in roster version 1", "hospital-a")
    result = cli(enrolled, "start", "run.yaml", "--passphrase-fd", "0")
    expect(result, 2, "keys of bank-b, who is no coordinator", "starts runs")
    expect(cli(enrolled, "start", "run.yaml", "--compare", "alone"), 2, "--compare", "local")


def test_rotation_under_way_is_not_undone_by_a_request_nor_taken_up_again(enrolled: Path) -> None:
    """After a break-in the pending keys may be the thief's too, and a request of the old ones looks like a renewal."""
    assert cli(enrolled, "enroll", "rotate", "--passphrase-fd", "0").returncode == 0
    before = (enrolled / "bank-b.request.json").read_bytes()
    for command in ("rotate", "renew"):
        result = cli(enrolled, "enroll", command, "--passphrase-fd", "0")
        expect(result, 2, "a rotation to these keys is not finished", "remove")
    assert (enrolled / "bank-b.request.json").read_bytes() == before


def test_another_roster_of_the_version_is_not_overwritten_by_revoke(tmp_path: Path) -> None:
    names = (*NAMES, "insurer-d", "telecom-c")
    folders = {ParticipantName(name): tmp_path / name / "keys" for name in names}
    ceremony.hold(folders, ParticipantName("registry-x"), datetime.datetime.now(datetime.UTC), PHRASE)
    home = tmp_path / "bank-b"
    assert cli(home, "enroll", "revoke", "insurer-d").returncode == 0
    assert cli(home, "enroll", "revoke", "insurer-d").returncode == 0
    expect(cli(home, "enroll", "revoke", "telecom-c"), 2, "roster-2.json: another roster of this version", "remove")


TYPED = {
    "a word too few": (lambda w: w[:-1], "23 words instead of 24; once more"),
    "a word of no list": (lambda w: ["xyzzy", *w[1:]], "word 1 is none of the list: xyzzy; once more"),
    "two words in each other's place": (lambda w: [w[1], w[0], *w[2:]], "these are not the words of hospital-a"),
}


@pytest.mark.parametrize(("change", "answer"), TYPED.values(), ids=TYPED.keys())
def test_typing_error_is_no_alarm(enrolled: Path, change: Callable[[list[str]], list[str]], answer: str) -> None:
    other = enrolled.parent / "hospital-a"
    assert cli(other, "enroll", "rotate", "--passphrase-fd", "0").returncode == 0
    request = shutil.copy(other / "hospital-a.request.json", enrolled)
    roster = enrollment.next_roster(
        keystore.installed(enrolled / "keys").roster, [keystore.load_document(Path(request), Request)]
    )
    words = list(enrollment.words(roster, "hospital-a"))
    typed = "\n".join([" ".join(change(words)), " ".join(words), ""]).encode()
    result = cli(enrolled, "enroll", "compare", "hospital-a.request.json", phrase=typed)
    assert result.returncode == 0
    assert answer in result.stdout.decode()
    assert "hospital-a has the same roster" in result.stdout.decode()
    own = " ".join(enrollment.words(roster, "bank-b"))
    (enrolled / "keys" / "compared.json").unlink()
    result = cli(enrolled, "enroll", "compare", "hospital-a.request.json", phrase=own.encode())
    assert "these are your own words" in result.stdout.decode()


def test_interrupted_comparison_keeps_what_was_heard_and_ends_with_7(enrolled: Path) -> None:
    other = enrolled.parent / "hospital-a"
    assert cli(other, "enroll", "rotate", "--passphrase-fd", "0").returncode == 0
    shutil.copy(other / "hospital-a.request.json", enrolled)
    arguments = ["-m", "mpctf_secure", "enroll", "compare", "hospital-a.request.json"]
    with pexpect.spawn(sys.executable, arguments, cwd=str(enrolled), encoding="utf-8", timeout=30) as terminal:
        terminal.expect_exact("hospital-a: ")
        terminal.sendintr()
        terminal.expect_exact("error: interrupted")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 7


def test_passphrase_is_asked_for_at_a_terminal_and_not_shown(tmp_path: Path) -> None:
    arguments = ["-m", "mpctf_secure", "enroll", "init", "bank-b"]
    with pexpect.spawn(sys.executable, arguments, cwd=str(tmp_path), encoding="utf-8", timeout=30) as terminal:
        terminal.logfile_read = shown = io.StringIO()
        for prompt in ("passphrase of the keys: ", "the same again: "):
            terminal.expect_exact(prompt)
            terminal.sendline(PHRASE.decode())
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0, shown.getvalue()
    assert PHRASE.decode() not in shown.getvalue()
    assert "next: mpctf-secure enroll request" in shown.getvalue()
    assert keystore.unseal(tmp_path / "keys", PHRASE)
    assert (tmp_path / "site.yaml").read_text().count("keys: keys") == 1
