import datetime
import errno
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from mpctf_secure.errors import DecodeError, EnvironmentUnfitError, MpctfError, SecurityError, UsageError
from mpctf_secure.hazmat import passphrase
from mpctf_secure.hazmat.passphrase import LIGHT, WrongPassphraseError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity import ceremony, documents, enrollment, keystore
from mpctf_secure.identity.documents import MOST_BYTES, Organisation, RosterBody, SignedRoster, Vote
from mpctf_secure.identity.keys import Keys
from mpctf_secure.ids import ParticipantName

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NAMES = ("bank-b", "coordinator", "hospital-a", "telecom-c")
PHRASE = b"a passphrase"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    folders = {ParticipantName(name): tmp_path / name / "keys" for name in NAMES}
    ceremony.hold(folders, ParticipantName("coordinator"), NOW, PHRASE)
    return dict(folders)


def sealed(folder: Path) -> Path:
    (path,) = folder.glob("*.sealed")
    return path


def renewed(folders: dict[str, Path], name: str, day: int) -> SignedRoster:
    current = keystore.installed(folders[name])
    assert current
    keys, created = keystore.unseal(folders[name], PHRASE), NOW + datetime.timedelta(days=day)
    request = enrollment.make_request(
        keys, name, "participant", created, created + datetime.timedelta(days=90), bytes(32), bytes(32)
    )
    body = enrollment.next_roster(current.roster, [request])
    signers = [keystore.unseal(folders[n], PHRASE) for n in ("bank-b", "hospital-a", "telecom-c")]
    return enrollment.collect(body, [enrollment.vote(body, signer, []) for signer in signers])


def test_ceremony_leaves_the_same_roster_with_everybody(folders: dict[str, Path]) -> None:
    rosters = [keystore.load_roster(folder) for folder in folders.values()]
    assert len({roster.hash for roster in rosters}) == 1
    assert rosters[0].coordinator.name == "coordinator"
    assert [member.name for member in rosters[0].participants] == ["bank-b", "hospital-a", "telecom-c"]
    with pytest.raises(SecurityError, match="not in the roster"):
        rosters[0].by_identity(bytes(32))


def test_files_are_the_owner_s_alone_and_hold_no_key_in_the_clear(folders: dict[str, Path]) -> None:
    folder = folders["bank-b"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.rglob("*"))
    keys = keystore.unseal(folder, PHRASE)
    assert bytes(keys.identity._key) not in sealed(folder).read_bytes()
    for key in (keys.identity, keys.box, keys.log):
        assert bytes(key._key).hex() not in repr(keys)
        assert repr(bytes(key._key)) not in repr(keys)


BAD_FILES = {
    "a wrong passphrase": (lambda path: None, b"another", WrongPassphraseError, "wrong passphrase"),
    "a flipped bit": (
        lambda path: path.write_bytes(path.read_bytes()[:50] + b"?" + path.read_bytes()[51:]),
        PHRASE, DecodeError, "damaged"),
    "an empty file": (lambda path: path.write_bytes(b""), PHRASE, DecodeError, "damaged"),
    "a loose mode": (lambda path: path.chmod(0o644), PHRASE, SecurityError, "mode 0644"),
    "no file": (lambda path: path.unlink(), PHRASE, EnvironmentUnfitError, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "phrase", "error", "why"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_each_trouble_with_the_key_file_has_its_own_error_that_names_it(
    folders: dict[str, Path], spoil, phrase: bytes, error: type[MpctfError], why: str
) -> None:
    path = sealed(folders["bank-b"])
    spoil(path)
    with pytest.raises(error, match=why) as caught:
        keystore.unseal(folders["bank-b"], phrase)
    assert str(path) in caught.value.message
    assert caught.value.hint or error is not SecurityError


def test_keys_are_never_overwritten(folders: dict[str, Path]) -> None:
    before = sealed(folders["bank-b"]).read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        keystore.create(folders["bank-b"], Organisation(name="bank-b", role="participant"), PHRASE, LIGHT)
    assert sealed(folders["bank-b"]).read_bytes() == before


def test_an_interrupted_init_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(passphrase, "seal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        keystore.create(tmp_path / "keys", Organisation(name="bank-b", role="participant"), PHRASE, LIGHT)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_the_disk_had_no_room_for_is_not_there_at_all(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            keystore.draw(folders["bank-b"], PHRASE, LIGHT)
    assert len(keystore.identities(folders["bank-b"])) == 1
    assert keystore.pending(folders["bank-b"]) is None
    new = keystore.draw(folders["bank-b"], PHRASE, LIGHT)
    pending = keystore.pending(folders["bank-b"])
    assert pending
    assert pending.stem == new.identity.public.hex()


def test_older_skipped_and_foreign_rosters_are_refused_and_the_installed_one_stays(folders: dict[str, Path]) -> None:
    folder = folders["hospital-a"]
    first = keystore.installed(folder)
    second, other = renewed(folders, "bank-b", 1), renewed(folders, "bank-b", 5)
    for path in folders.values():
        assert keystore.install(path, [second]).version == 2
        assert keystore.install(path, [second]).version == 2
    assert first
    assert keystore.install(folder, [first]).version == 2
    with pytest.raises(SecurityError, match="a way back"):
        keystore.install(folder, [other])
    third = renewed(folders, "bank-b", 2)
    keystore.install(folders["bank-b"], [third])
    fourth = renewed(folders, "bank-b", 3)
    with pytest.raises(SecurityError, match="leaves a gap"):
        keystore.install(folder, [fourth])
    assert keystore.load_roster(folder).version == keystore.latest_version(folder) == 2
    assert keystore.install(folder, [third]).version == 3


def test_roster_changed_on_disk_is_noticed(folders: dict[str, Path]) -> None:
    path = folders["bank-b"] / "rosters" / "1.json"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes().replace(b'"heard":["bank-b"', b'"heard":["bank-c"'))
    with pytest.raises(SecurityError):
        keystore.load_roster(folders["bank-b"])


def test_one_version_is_signed_for_one_roster_only(folders: dict[str, Path]) -> None:
    """With two each could gather a quorum among those who sign both, and the members would part in two."""
    folder, keys = folders["bank-b"], keystore.unseal(folders["bank-b"], PHRASE)
    one, other = renewed(folders, "bank-b", 1).roster, renewed(folders, "bank-b", 2).roster
    keystore.keep_vote(folder, 2, enrollment.vote(one, keys, []))
    keystore.keep_vote(folder, 2, enrollment.vote(one, keys, []))
    with pytest.raises(SecurityError, match="has signed another roster of version 2"):
        keystore.keep_vote(folder, 2, enrollment.vote(other, keys, []))


def test_what_was_heard_counts_for_one_roster_only(folders: dict[str, Path]) -> None:
    folder = folders["bank-b"]
    assert keystore.heard(folder, "aa" * 32) == ()
    keystore.note_heard(folder, "aa" * 32, ["hospital-a"])
    keystore.note_heard(folder, "aa" * 32, ["telecom-c"])
    assert keystore.heard(folder, "aa" * 32) == ("hospital-a", "telecom-c")
    assert keystore.heard(folder, "bb" * 32) == ()
    keystore.note_heard(folder, "bb" * 32, ["telecom-c"])
    assert keystore.heard(folder, "aa" * 32) == ()


def test_impostor_in_everybody_s_files_is_noticed_by_its_victim(folders: dict[str, Path]) -> None:
    """All hear the same words about the impostor's request, its victim too: only the victim's own keys can tell."""
    current = keystore.installed(folders["bank-b"])
    assert current
    impostor = enrollment.make_request(
        Keys.of(bytes(range(96))), "bank-b", "participant", NOW, NOW + datetime.timedelta(days=90), bytes(32), bytes(32)
    )
    body = enrollment.next_roster(current.roster, [impostor])
    keystore.check_mine(folders["hospital-a"], body)
    with pytest.raises(SecurityError, match="under your name, bank-b, is not yours"):
        keystore.check_mine(folders["bank-b"], body)


def test_rotation_ends_the_old_keys_once_a_roster_has_the_new_ones(folders: dict[str, Path]) -> None:
    folder, old = folders["bank-b"], keystore.unseal(folders["bank-b"], PHRASE)
    new = keystore.draw(folder, PHRASE, LIGHT)
    assert keystore.unseal(folder, PHRASE).identity.public == old.identity.public
    current = keystore.installed(folder)
    assert current
    request = enrollment.make_request(
        new, "bank-b", "participant", NOW, NOW + datetime.timedelta(days=90), bytes(32), bytes(32)
    )
    body = enrollment.next_roster(current.roster, [request])
    others = [keystore.unseal(folders[name], PHRASE) for name in ("hospital-a", "telecom-c")]
    voters = [*((key, ["bank-b"]) for key in others), (old, []), (new, [])]
    keystore.install(folder, [enrollment.collect(body, [enrollment.vote(body, key, heard) for key, heard in voters])])
    assert keystore.identities(folder) == [new.identity.public]
    assert keystore.pending(folder) is None
    assert keystore.unseal(folder, PHRASE).identity.public == new.identity.public


def test_roster_with_an_impostor_under_one_s_own_name_is_not_installed(folders: dict[str, Path]) -> None:
    """All others have heard its thief's words, and signed; bank-b itself must not follow them."""
    current, victim = keystore.installed(folders["bank-b"]), folders["bank-b"]
    assert current
    keys, old = Keys.of(bytes(range(96))), keystore.unseal(victim, PHRASE)
    end = NOW + datetime.timedelta(days=90)
    impostor = enrollment.make_request(keys, "bank-b", "participant", NOW, end, bytes(32), bytes(32))
    body = enrollment.next_roster(current.roster, [impostor])
    others = [keystore.unseal(folders[name], PHRASE) for name in ("hospital-a", "telecom-c")]
    voters = [*((key, ["bank-b"]) for key in others), (old, []), (keys, [])]
    signed = enrollment.collect(body, [enrollment.vote(body, key, heard) for key, heard in voters])
    assert keystore.install(folders["hospital-a"], [signed]).version == 2
    with pytest.raises(SecurityError, match="under your name, bank-b, is not yours"):
        keystore.install(victim, [signed])
    assert keystore.latest_version(victim) == 1


def test_torn_key_of_a_run_is_refused_and_not_used(folders: dict[str, Path]) -> None:
    """An empty one would make the rounding bits predictable."""
    keystore.run_secret(folders["bank-b"], "run-1")
    path = folders["bank-b"] / "rounds" / "run-1.run.key"
    path.write_bytes(b"")
    with pytest.raises(DecodeError, match="0 bytes instead of 32"):
        keystore.run_secret(folders["bank-b"], "run-1")


def test_longest_roster_that_members_can_sign_is_read_again(tmp_path: Path) -> None:
    """Whoever could make it too long to be read would shut everybody out for good."""
    names = tuple(f"{number:03}{'x' * 60}" for number in range(documents.MOST_MEMBERS))
    key = SigningKey(bytes(32))
    vote = Vote(roster="0" * 64, signer="0" * 64, heard=names, signature="0" * 128)
    request = enrollment.make_request(
        Keys(key, key, key), names[0], "coordinator", NOW, NOW + datetime.timedelta(days=9), bytes(32), bytes(32)
    )
    body = RosterBody(version=1, previous="0" * 64, expires=request.expires, members=(request,) * len(names))
    longest = SignedRoster(roster=body, signatures=(vote,) * 2 * len(names))
    assert len(longest.encode()) <= MOST_BYTES
    with pytest.raises(ValidationError, match="at most 101"):
        Vote(roster="0" * 64, signer="0" * 64, heard=(*names, "y"), signature="0" * 128)


def test_expired_roster_is_no_good(folders: dict[str, Path]) -> None:
    roster = keystore.load_roster(folders["bank-b"])
    roster.check_unexpired(NOW)
    with pytest.raises(SecurityError, match="roster version 1 expired on 2030-01-31"):
        roster.check_unexpired(NOW + datetime.timedelta(days=30))


def test_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(DecodeError, match="not a file of the ceremony"):
        keystore.load_any(path)
    with pytest.raises(DecodeError, match=f"larger than {MOST_BYTES} bytes"):
        keystore.load_document(path, SignedRoster)
    with pytest.raises(UsageError, match="no such file"):
        keystore.load_any(tmp_path / "none.json")


def test_folder_without_keys_or_roster_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError):
        keystore.load_roster(tmp_path / "none")
    folder = tmp_path / "keys"
    keystore.create(folder, Organisation(name="bank-b", role="participant"), PHRASE, LIGHT)
    with pytest.raises(EnvironmentUnfitError, match="no roster is installed"):
        keystore.load_roster(folder)
    keystore.draw(folder, PHRASE, LIGHT)
    with pytest.raises(EnvironmentUnfitError, match="2 sealed keys and no roster"):
        keystore.unseal(folder, PHRASE)


def test_destroyed_keys_are_gone(folders: dict[str, Path]) -> None:
    keystore.create_round_key(folders["bank-b"], "run.1")
    keystore.destroy(folders["bank-b"])
    assert not [*folders["bank-b"].rglob("*.sealed"), *folders["bank-b"].rglob("*.key")]
