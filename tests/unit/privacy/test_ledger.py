import math
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpctf_secure.config.site import Budget
from mpctf_secure.errors import BudgetSpentError, EnvironmentUnfitError, SecurityError, UsageError
from mpctf_secure.privacy import ledger as ledger_module
from mpctf_secure.privacy.ledger import Charge, Ledger, spent

A, B = "aa" * 32, "bb" * 32
BUDGET = Budget(epsilon=8.0, delta=1e-5, unit="participant")


def charge(number: int = 1, **changes: object) -> Charge:
    terms = {
        "data_set": "notes", "fingerprint": A, "run": "joint-1", "contract": B, "round": number,
        "content": f"{number:064x}", "against": "coordinator", "noise_multiplier": 1.9, "colluders": 1, "rows": 100,
    }  # fmt: skip
    return Charge(**{**terms, **changes})


def test_what_was_charged_is_there_after_a_restart_and_adds_up(tmp_path: Path) -> None:
    for number in range(1, 4):
        Ledger(tmp_path).charge(charge(number), BUDGET)
    found = Ledger(tmp_path).charges()
    assert found == [charge(1), charge(2), charge(3)]
    assert spent(found, "notes", "participant", "coordinator", 1e-5).epsilon == pytest.approx(3.9, abs=0.1)
    assert spent(found, "other", "participant", "coordinator", 1e-5).epsilon == 0
    assert (tmp_path / "ledger.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_same_again_is_free_and_anything_else_is_not(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    for changes in ({}, {}, {"content": A}, {"run": "joint-2"}, {"contract": A}, {"number": 2}):
        book.charge(charge(**changes), None)
    assert len(book.charges()) == 5


def test_a_charge_that_does_not_fit_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    for number in range(1, 11):
        book.charge(charge(number), BUDGET)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(BudgetSpentError, match=r"data set notes: epsilon of a participant would be 8\.") as caught:
        book.charge(charge(11), BUDGET)
    assert caught.value.exit_code == 6
    assert "privacy report" in caught.value.hint
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    book.charge(charge(11, data_set="other", fingerprint=B), BUDGET)


def test_run_without_noise_is_in_the_ledger_and_no_budget_holds_after_it(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.charge(charge(against="nobody", noise_multiplier=None), None)
    for against in ("coordinator", "participants"):
        assert math.isinf(spent(book.charges(), "notes", "participant", against, 1e-5).epsilon)
    with pytest.raises(BudgetSpentError):
        book.charge(charge(2), BUDGET)


def test_line_whose_end_was_edited_off_is_not_cut(tmp_path: Path) -> None:
    content = three(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(content[:-1])
    with pytest.raises(SecurityError):
        Ledger(tmp_path).charges()
    (tmp_path / "ledger.jsonl").write_bytes((tmp_path / "ledger.jsonl").read_bytes() + b"\n")
    assert len(Ledger(tmp_path).charges()) == 3


def test_changed_rows_are_refused_until_somebody_accepts_them_and_keep_what_was_spent(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.charge(charge(1), BUDGET)
    with pytest.raises(UsageError, match="changed since data set notes was charged for run joint-1") as caught:
        book.charge(charge(2, fingerprint=B), BUDGET)
    assert "--accept-data-change" in caught.value.hint
    book.charge(charge(2, fingerprint=B), BUDGET, accept_change=True)
    book.charge(charge(3, fingerprint=B), BUDGET)
    assert len(book.charges()) == 3


def test_same_rows_under_another_name_are_refused_until_somebody_accepts_it(tmp_path: Path) -> None:
    """Else a name is all that it takes for a new budget."""
    book = Ledger(tmp_path)
    book.charge(charge(1), BUDGET)
    with pytest.raises(UsageError, match="data_set other: the same file was charged as data set notes") as caught:
        book.charge(charge(2, data_set="other"), BUDGET)
    assert "data_set: notes" in caught.value.hint
    book.charge(charge(2, data_set="other"), BUDGET, accept_change=True)
    book.charge(charge(3, data_set="other"), BUDGET)


def test_reading_changes_nothing(tmp_path: Path) -> None:
    content = three(tmp_path) + b'{"charge":{"aga'
    (tmp_path / "ledger.jsonl").write_bytes(content)
    assert len(Ledger(tmp_path).charges()) == 3
    assert (tmp_path / "ledger.jsonl").read_bytes() == content
    Ledger(tmp_path).charge(charge(4), None)  # what a crash tore off was never published
    assert [one.round for one in Ledger(tmp_path).charges()] == [1, 2, 3, 4]


def test_folder_without_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"none: no keys folder"):
        Ledger(tmp_path / "none").charges()


def three(folder: Path) -> bytes:
    for number in (1, 2, 3):
        Ledger(folder).charge(charge(number), None)
    return (folder / "ledger.jsonl").read_bytes()


def edited(content: bytes) -> bytes:
    return content.replace(b'"noise_multiplier":1.9', b'"noise_multiplier":9.9', 1)


def without_line(number: int):
    return lambda content: b"".join(line for n, line in enumerate(content.splitlines(keepends=True)) if n != number)


SPOILT = {
    "a number changed by hand": edited,
    "the first line gone": without_line(0),
    "one in the middle gone": without_line(1),
    "the last one gone": without_line(2),
    "all gone": lambda _: b"",
    "two changed places": lambda content: b"".join(reversed(content.splitlines(keepends=True))),
    "no JSON": lambda content: content + b"x\n",
    "noise without end": lambda content: content.replace(
        b'"fingerprint"', b'"dpsgd":{"noise_multiplier":Infinity,"sampling_rate":0.1,"steps":1},"fingerprint"', 1
    ),
    "white space": lambda content: content.replace(b":", b": ", 1),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_ledger_that_was_shortened_or_edited_is_refused(tmp_path: Path, spoil) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(spoil(three(tmp_path)))
    with pytest.raises(SecurityError, match=r"ledger\.jsonl: ") as caught:
        Ledger(tmp_path).charge(charge(4), None)
    assert "restore it" in caught.value.hint


def test_ledger_that_was_deleted_with_its_head_left_is_refused(tmp_path: Path) -> None:
    three(tmp_path)
    (tmp_path / "ledger.jsonl").unlink()
    with pytest.raises(SecurityError, match="0 lines"):
        Ledger(tmp_path).charges()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_crash_at_any_byte_of_a_charge_loses_nothing_that_was_charged(tmp_path: Path, data: st.DataObject) -> None:
    """The line may be torn anywhere, or whole and its head not written."""
    for path in tmp_path.glob("ledger.*"):
        path.unlink()
    three(tmp_path)
    head = (tmp_path / "ledger.head").read_bytes()
    before = (tmp_path / "ledger.jsonl").read_bytes()
    Ledger(tmp_path).charge(charge(4), None)
    after = (tmp_path / "ledger.jsonl").read_bytes()
    cut = data.draw(st.integers(len(before), len(after)))
    (tmp_path / "ledger.jsonl").write_bytes(after[:cut])
    (tmp_path / "ledger.head").write_bytes(head)
    assert len(Ledger(tmp_path).charges()) == (4 if cut == len(after) else 3)
    Ledger(tmp_path).charge(charge(4), None)
    assert Ledger(tmp_path).charges()[-1] == charge(4)
    (tmp_path / "ledger.jsonl").write_bytes(before)
    with pytest.raises(SecurityError):
        Ledger(tmp_path).charges()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_no_ledger_or_end_in_a_torn_line(tmp_path: Path, noise: bytes) -> None:
    for path in tmp_path.glob("ledger.*"):
        path.unlink()
    (tmp_path / "ledger.jsonl").write_bytes(noise)
    if b"\n" in noise:
        with pytest.raises(SecurityError):
            Ledger(tmp_path).charges()
    else:
        assert Ledger(tmp_path).charges() == []


def charge_many(folder: Path, first: int) -> None:
    for number in range(first, first + 20):
        Ledger(folder).charge(charge(number), None)


def test_two_processes_charge_one_ledger_one_after_the_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=charge_many, args=(tmp_path, first)) for first in (1, 101)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert len(Ledger(tmp_path).charges()) == 40


def test_head_is_on_disk_before_a_charge_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    original = ledger_module.files.replace
    monkeypatch.setattr(ledger_module.os, "fsync", lambda _: steps.append("line"))
    monkeypatch.setattr(ledger_module.files, "replace", lambda *a: (steps.append("head"), original(*a)))
    Ledger(tmp_path).charge(charge(), None)
    assert steps[:2] == ["line", "head"]
