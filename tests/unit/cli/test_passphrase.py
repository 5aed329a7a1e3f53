import os
from pathlib import Path

import pytest

from mpctf_secure.cli import passphrase
from mpctf_secure.errors import UsageError


def descriptor(content: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


def at_terminal(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    answers = iter(typed)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("getpass.getpass", lambda _: next(answers))


def test_descriptor_gives_its_one_line() -> None:
    assert passphrase.read(descriptor(b"correct horse battery\n")) == b"correct horse battery"
    assert passphrase.read(descriptor(b"no newline")) == b"no newline"


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 1025, b"two\nlines\n"])
def test_no_line_or_a_huge_one_is_refused(content: bytes) -> None:
    with pytest.raises(UsageError, match=r"--passphrase-fd .*: not 1 to 1024 bytes"):
        passphrase.read(descriptor(content))


def test_closed_descriptor_is_refused() -> None:
    with pytest.raises(UsageError, match="Bad file descriptor"):
        passphrase.read(987)


def test_systemd_credential_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / passphrase.CREDENTIAL).write_bytes(b"from systemd\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert passphrase.read(None) == b"from systemd"


def test_without_terminal_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: PTH123, SIM115
    with pytest.raises(UsageError, match="no passphrase") as caught:
        passphrase.read(None)
    assert "--passphrase-fd" in caught.value.hint


def test_new_passphrase_is_typed_twice_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    at_terminal(monkeypatch, "long enough for all", "long enough for all")
    assert passphrase.read(None, new=True) == b"long enough for all"
    at_terminal(monkeypatch, "long enough for all", "long enough for ale")
    with pytest.raises(UsageError, match="differ"):
        passphrase.read(None, new=True)
    at_terminal(monkeypatch, "short", "short")
    with pytest.raises(UsageError, match="shorter than 12"):
        passphrase.read(None, new=True)
    with pytest.raises(UsageError, match="shorter than 12"):
        passphrase.read(descriptor(b"short\n"), new=True)
    at_terminal(monkeypatch, "short")
    assert passphrase.read(None) == b"short"
