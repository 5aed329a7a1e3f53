import datetime
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.coordinator import mailbox
from mpctf_secure.coordinator.mailbox import Folder, file_name
from mpctf_secure.errors import DecodeError, EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import Request
from mpctf_secure.identity.keys import Keys

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def request(name: str) -> Request:
    keys = Keys.of(b"".join(sha256(f"{name}/{use}".encode()) for use in range(3)))
    return enrollment.make_request(
        keys, name, "participant", NOW, NOW + datetime.timedelta(days=9), bytes(32), bytes(32)
    )


def test_files_come_back_once_and_under_names_from_their_content(tmp_path: Path) -> None:
    folder, files = Folder(tmp_path / "m"), [request(name).encode() for name in ("bank-b", "hospital-a")]
    for data in (*files, *files):
        folder.put(data)
    assert sorted(folder.files()) == sorted(files)
    assert sorted(map(file_name, folder.files())) == ["bank-b.request.json", "hospital-a.request.json"]


def test_only_valid_files_of_a_ceremony_are_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "m")
    forged = request("bank-b").model_copy(update={"box": "22" * 32})
    for data in (b"", b"{}", b"x" * (2 << 20), forged.encode()):
        with pytest.raises(SecurityError):
            folder.put(data)
    assert folder.files() == []


def test_stranger_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "MOST_FILES", 2)
    folder = Folder(tmp_path / "m")
    folder.put(request("bank-b").encode())
    folder.put(request("hospital-a").encode())
    with pytest.raises(EnvironmentUnfitError, match="full"):
        folder.put(request("telecom-c").encode())
    folder.put(request("bank-b").encode())


def test_old_files_are_forgotten(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "m")
    folder.put(request("bank-b").encode())
    (path,) = (tmp_path / "m").iterdir()
    os.utime(path, (0, 0))
    assert folder.files() == []


@given(st.binary(max_size=100))
def test_no_bytes_choose_a_file_name(data: bytes) -> None:
    with pytest.raises(DecodeError):
        file_name(data)
