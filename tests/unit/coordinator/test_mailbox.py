import datetime
import os
from pathlib import Path

import pytest

from mpctf_secure.coordinator import mailbox
from mpctf_secure.coordinator.mailbox import Folder, file_name
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.kdf import sha256
from mpctf_secure.identity import enrollment
from mpctf_secure.identity.documents import Request, decode_any
from mpctf_secure.identity.keys import Keys

HOME = "ipv4:192.0.2.1"
NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


def request(name: str) -> Request:
    keys = Keys.of(b"".join(sha256(f"{name}/{use}".encode()) for use in range(3)))
    return enrollment.make_request(
        keys, name, "participant", NOW, NOW + datetime.timedelta(days=9), bytes(32), bytes(32)
    )


def test_files_come_back_once_and_under_names_from_their_content(tmp_path: Path) -> None:
    folder, files = Folder(tmp_path / "m"), [request(name).encode() for name in ("bank-b", "hospital-a")]
    for data in (*files, *files):
        folder.put(data, HOME)
    assert sorted(folder.files()) == sorted(files)
    names = [file_name(decode_any(data)) for data in folder.files()]
    marks = {name: request(name).hash.hex()[:8] for name in ("bank-b", "hospital-a")}
    assert sorted(names) == [f"{name}.{mark}.request.json" for name, mark in marks.items()]


def test_only_valid_files_of_a_ceremony_are_kept(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "m")
    forged = request("bank-b").model_copy(update={"box": "22" * 32})
    for data in (b"", b"{}", b"x" * (2 << 20), forged.encode()):
        with pytest.raises(SecurityError):
            folder.put(data, HOME)
    assert list(folder.files()) == []


def test_stranger_cannot_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "MOST_FILES", 2)
    folder = Folder(tmp_path / "m")
    folder.put(request("bank-b").encode(), HOME)
    folder.put(request("hospital-a").encode(), HOME)
    with pytest.raises(EnvironmentUnfitError, match="full"):
        folder.put(request("telecom-c").encode(), HOME)
    folder.put(request("bank-b").encode(), HOME)


def test_old_files_are_forgotten(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "m")
    folder.put(request("bank-b").encode(), HOME)
    (path,) = (tmp_path / "m").iterdir()
    os.utime(path, (0, 0))
    assert list(folder.files()) == []


def test_one_address_cannot_fill_it_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "_MOST_OF_ONE", 1)
    folder = Folder(tmp_path / "m")
    folder.put(request("bank-b").encode(), HOME)
    with pytest.raises(EnvironmentUnfitError, match="1 files came from your address already"):
        folder.put(request("hospital-a").encode(), HOME)
    folder.put(request("hospital-a").encode(), "ipv4:198.51.100.7")


def test_forged_request_does_not_take_the_true_one_s_place(tmp_path: Path) -> None:
    forged = request("bank-b").model_copy(update={"nonce": "11" * 32})
    assert file_name(forged) != file_name(request("bank-b"))
