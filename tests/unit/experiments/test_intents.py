import json
from pathlib import Path

import pytest

from mpctf_secure.errors import UsageError
from mpctf_secure.experiments.intents import labels_of, write_intents

NAMES = ["ada", "bob", "cleo", "dan"]


def read(path: Path) -> list[tuple[str, str]]:
    """(message, label) of every row."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [(row[1]["content"], row[2]["content"]) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intents")
    write_intents(folder, NAMES, 120, 96, 7)
    return folder


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_intents(tmp_path, NAMES, 120, 96, 7)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_another_seed_gives_other_rows(folder: Path, tmp_path: Path) -> None:
    write_intents(tmp_path, NAMES, 120, 96, 8)
    assert read(folder / "ada.jsonl") != read(tmp_path / "ada.jsonl")


def test_no_test_message_is_in_any_training_file(folder: Path) -> None:
    training = {message.lower() for name in NAMES for message, _ in read(folder / f"{name}.jsonl")}
    assert training.isdisjoint(message.lower() for message, _ in read(folder / "test.jsonl"))


def test_the_test_rows_are_balanced_over_all_intents(folder: Path) -> None:
    labels = [label for _, label in read(folder / "test.jsonl")]
    assert {labels.count(label) for label in labels} == {4}
    assert len(set(labels)) == 24


def test_every_slot_is_filled(folder: Path) -> None:
    assert not any("{" in message for path in folder.iterdir() for message, _ in read(path))


@pytest.mark.parametrize("count", range(2, 27))
def test_all_intents_are_somewhere_and_nobody_has_over_two_thirds(count: int) -> None:
    held = [set(labels_of(position, count)) for position in range(count)]
    assert len(set.union(*held)) == 24
    assert all(1 <= len(labels) <= 16 for labels in held)


def test_files_hold_the_labels_of_their_participant_only(folder: Path) -> None:
    for position, name in enumerate(NAMES):
        assert {label for _, label in read(folder / f"{name}.jsonl")} == set(labels_of(position, len(NAMES)))


@pytest.mark.parametrize("count", [0, 1, 27])
def test_other_numbers_of_participants_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(UsageError, match="2 to 26"):
        write_intents(tmp_path, [f"p{i}" for i in range(count)], 10, 10, 0)
