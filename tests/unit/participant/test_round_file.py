from pathlib import Path

import pytest

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.participant.round_file import Entry, LostRoundError, RoundFile

ENTRIES = [Entry("attempt", b"one"), Entry("share", b"secret-two" * 9), Entry("mask", b"")]


CONTRACT = bytes(32)
RECORD_BYTES = 4 + 4 + 12 + 4 + 16  # three lengths, nonce and tag


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir()
    (tmp_path / "work").mkdir(mode=0o700)
    return tmp_path


def opened(home: Path, number: int = 1, contract: bytes = CONTRACT) -> RoundFile:
    """As the next process would."""
    return RoundFile(home / "work", home / "keys", "run", contract, number)


def written(home: Path) -> Path:
    opened(home).append(*ENTRIES)
    return home / "work" / "1.sealed"


def test_entries_come_back_in_order_and_more_can_follow(home: Path) -> None:
    assert opened(home).entries == []
    written(home)
    again = opened(home)
    assert again.entries == ENTRIES
    again.append(Entry("release", b"three"))
    assert opened(home).entries == [*ENTRIES, Entry("release", b"three")]


def test_no_plaintext_lies_on_disk_and_only_the_owner_reads(home: Path) -> None:
    path = written(home)
    assert b"secret" not in path.read_bytes()
    keys = [*(home / "keys").rglob("*.key")]
    assert [key.name for key in keys] == ["run.1.key"]
    assert all(file.stat().st_mode & 0o077 == 0 for file in (path, *keys, path.parent, keys[0].parent))


def test_record_torn_by_a_crash_is_cut_at_every_length(home: Path) -> None:
    path = written(home)
    whole = path.read_bytes()
    two = whole[: len(whole) - RECORD_BYTES - len("mask")]
    for length in range(len(two), len(whole)):
        path.write_bytes(whole[:length])
        file = opened(home)
        assert file.entries == ENTRIES[:2]
        assert path.read_bytes() == two
        file.append(ENTRIES[2])
        assert opened(home).entries == ENTRIES


def test_flipped_bit_in_a_whole_record_loses_the_round(home: Path) -> None:
    """It may be a record that was acknowledged: cutting it could let a second tuple be released."""
    path = written(home)
    whole = path.read_bytes()
    first = RECORD_BYTES + len("attempt") + len(b"one")
    lengths = {*range(4), *range(11, 15), *range(27, 31)}
    for at in set(range(first)) - lengths:
        spoilt = bytearray(whole)
        spoilt[at] ^= 1
        path.write_bytes(spoilt)
        with pytest.raises(LostRoundError, match="damaged") as caught:
            opened(home)
        assert "sits the round out" in caught.value.hint


def test_records_of_another_round_or_in_another_order_do_not_open(home: Path) -> None:
    path = written(home)
    whole = path.read_bytes()
    path.write_bytes(whole[RECORD_BYTES + len("attempt") + len(b"one") :])
    with pytest.raises(LostRoundError, match="record 0 is damaged"):
        opened(home)
    opened(home, 2)
    (home / "keys" / "rounds" / "run.2.key").write_bytes((home / "keys" / "rounds" / "run.1.key").read_bytes())
    (home / "work" / "2.sealed").write_bytes(whole)
    with pytest.raises(LostRoundError, match="record 0 is damaged"):
        opened(home, 2)


def test_other_contract_under_the_same_run_id_does_not_open_what_the_first_sealed(home: Path) -> None:
    written(home)
    with pytest.raises(LostRoundError, match="record 0 is damaged"):
        opened(home, contract=b"\1" * 32)


@pytest.mark.parametrize("gone", ["work/1.sealed", "keys/rounds/run.1.key"])
def test_round_without_file_or_key_is_lost_and_the_next_is_not(home: Path, gone: str) -> None:
    written(home)
    (home / gone).unlink()
    with pytest.raises(LostRoundError):
        opened(home)
    assert opened(home, 2).entries == []


def test_closed_round_leaves_nothing_and_cannot_be_joined_again(home: Path) -> None:
    path = written(home)
    opened(home).close()
    assert not path.exists()
    assert [*(home / "keys").rglob("*.key")] == []
    with pytest.raises(LostRoundError):
        opened(home)


def test_position_that_is_no_number_is_not_taken_for_zero(home: Path) -> None:
    written(home)
    (home / "keys" / "rounds" / "run.joined").write_bytes(b"\xff")
    with pytest.raises(EnvironmentUnfitError, match=r"run\.joined: not a round's number"):
        opened(home)


def test_full_disk_ends_the_round_and_says_so(home: Path) -> None:
    file = opened(home)
    file._stream.close()
    file._stream = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115
    with pytest.raises(EnvironmentUnfitError, match="No space left"):
        file.append(ENTRIES[0])
    with pytest.raises(ValueError, match="closed"):
        file.append(ENTRIES[0])
