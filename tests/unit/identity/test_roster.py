import datetime
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import ceremony, certificate, keystore, roster
from mpctf_secure.ids import ParticipantName

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NAMES = ["bank-b", "coordinator", "hospital-a", "telecom-c"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("homes")
    folders = {ParticipantName(name): home / name / "keys" for name in NAMES}
    ceremony.hold(folders, ParticipantName("coordinator"), NOW)
    return folders


@pytest.fixture
def content(folders) -> dict:
    return json.loads((folders["bank-b"] / "roster.json").read_text())


def test_everyone_gets_the_same_roster_with_everyones_signature(folders) -> None:
    rosters = [keystore.load_roster(folder) for folder in folders.values()]
    assert len({one.hash for one in rosters}) == 1
    assert rosters[0].coordinator.name == "coordinator"
    assert [member.name for member in rosters[0].participants] == ["bank-b", "hospital-a", "telecom-c"]
    assert set(rosters[0].signatures) == set(NAMES)


def drop_signature(content: dict) -> None:
    del content["signatures"]["bank-b"]


def swap_identity(content: dict) -> None:
    content["members"][0]["identity"] = SigningKey(b"\5" * 32).public.hex()


def small_order_identity(content: dict) -> None:
    content["members"][0]["identity"] = (b"\1" + bytes(31)).hex()


def swap_certificates(content: dict) -> None:
    first, second = content["members"][0], content["members"][2]
    first["certificate"], second["certificate"] = second["certificate"], first["certificate"]


def add_member_alone(content: dict) -> None:
    key, (_, der) = SigningKey(b"\6" * 32), certificate.make("zz-sybil", NOW)
    sybil = keystore.Keys(key, b"", der).member(ParticipantName("zz-sybil"), "participant")
    members = tuple(map(roster._member, content["members"]))
    forged = roster.Roster(1, (*members, sybil), {n: bytes.fromhex(s) for n, s in content["signatures"].items()})
    content.update(json.loads(forged.signed_by(sybil.name, key).to_json()))


def two_coordinators(content: dict) -> None:
    content["members"][0]["role"] = "coordinator"


def unordered(content: dict) -> None:
    content["members"].reverse()


def newer(content: dict) -> None:
    content["version"] = 2


def absurd_version(content: dict) -> None:
    content["version"] = -1


FORGERIES = [
    absurd_version,
    drop_signature, swap_identity, small_order_identity, swap_certificates, add_member_alone, two_coordinators,
    unordered, newer,
]  # fmt: skip


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda f: f.__name__)
def test_roster_that_somebody_changed_is_refused(content: dict, forge) -> None:
    roster.parse(json.dumps(content))
    forge(content)
    with pytest.raises(SecurityError):
        roster.parse(json.dumps(content))


@given(st.one_of(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)))
def test_any_text_is_a_roster_or_refused(text: str) -> None:
    with pytest.raises(SecurityError):
        roster.parse(text)


def test_stranger_is_not_in_the_roster(folders) -> None:
    signed = keystore.load_roster(folders["bank-b"])
    with pytest.raises(SecurityError):
        signed.by_identity(bytes(32))
    with pytest.raises(SecurityError):
        signed.by_spki(certificate.spki_hash(certificate.make("bank-b", NOW)[1]))


def test_private_files_have_mode_0600_and_looser_ones_are_refused(tmp_path: Path) -> None:
    keystore.create(tmp_path / "keys", "hospital-a", NOW)
    keystore.load(tmp_path / "keys")
    (tmp_path / "keys" / "identity.key").chmod(0o644)
    with pytest.raises(SecurityError, match="0644"):
        keystore.load(tmp_path / "keys")


def test_keys_are_never_overwritten_and_missing_ones_are_named(tmp_path: Path) -> None:
    keystore.create(tmp_path / "keys", "hospital-a", NOW)
    with pytest.raises(FileExistsError):
        keystore.create(tmp_path / "keys", "hospital-a", NOW)
    keystore.destroy(tmp_path / "keys")
    with pytest.raises(EnvironmentUnfitError, match=r"identity\.key"):
        keystore.load(tmp_path / "keys")


def test_keys_do_not_show_in_a_repr(tmp_path: Path) -> None:
    keys = keystore.create(tmp_path / "keys", "hospital-a", NOW)
    seed = (tmp_path / "keys" / "identity.key").read_bytes()
    assert seed.hex() not in repr(keys)
    assert repr(seed) not in repr(keys)
    assert b"PRIVATE" not in repr(keys).encode()
