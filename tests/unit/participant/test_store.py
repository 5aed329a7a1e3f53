from dataclasses import replace
from pathlib import Path

import pytest
from samples import make_contract

from mpctf_secure.config.training import Choice
from mpctf_secure.errors import EnvironmentUnfitError, SecurityError
from mpctf_secure.participant.store import Store, Terms
from mpctf_secure.rounds.state import initial_state

CONTRACT = make_contract()
RUN = CONTRACT.run_id
TERMS = Terms(data_hash="ab" * 32, choice=Choice(batch_size=4), memory=1024)


def test_work_folder_is_its_owners_alone(tmp_path: Path) -> None:
    Store(tmp_path / "work").close()
    assert (tmp_path / "work").stat().st_mode & 0o777 == 0o700


def test_run_is_where_it_was_after_a_crash(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.accept(CONTRACT, TERMS)
    store.accept(CONTRACT, TERMS)
    assert store.last_state(CONTRACT)[0].hash(CONTRACT) == initial_state(CONTRACT).hash(CONTRACT)
    later = replace(initial_state(CONTRACT), round=1)
    store.keep(RUN, later)
    store._db._lock.close()
    store = Store(tmp_path)
    state, certificate = store.last_state(CONTRACT)
    assert (state.hash(CONTRACT), certificate) == (later.hash(CONTRACT), None)
    store.certify(RUN, later, b"signed")
    latest = replace(later, round=2)
    store.keep(RUN, latest)
    assert len(list(store.folder(RUN).glob("*.state"))) == 2
    store.certify(RUN, latest, b"signed too")
    assert [path.name for path in store.folder(RUN).glob("*.state")] == ["2.state"]
    store.close()
    state, certificate = Store(tmp_path).last_state(CONTRACT)
    assert (state.hash(CONTRACT), certificate) == (latest.hash(CONTRACT), b"signed too")


def test_other_contract_under_a_run_s_id_is_refused_for_ever(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.accept(CONTRACT, TERMS)
    store.end(RUN, "done")
    with pytest.raises(SecurityError, match=f"another contract for run {RUN}"):
        store.accept(CONTRACT.model_copy(update={"seed": 2}), TERMS)
    assert store.ended(RUN) == "done"
    assert store.ended("another") is None


def test_terms_are_those_with_which_the_contract_was_accepted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.terms(RUN) is None
    store.accept(CONTRACT, TERMS)
    store.accept(CONTRACT, TERMS.model_copy(update={"memory": 9}))
    assert store.terms(RUN) == TERMS
    (store.folder(RUN) / "terms.json").write_text("{}")
    with pytest.raises(EnvironmentUnfitError, match=r"terms\.json"):
        store.terms(RUN)


def test_second_agent_of_a_site_is_refused(tmp_path: Path) -> None:
    """With the same entropy it would sign a second tuple: t shares of both kinds of one member could come together."""
    store = Store(tmp_path)
    with pytest.raises(EnvironmentUnfitError, match="another process of this site"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.accept(CONTRACT, TERMS)
    store.keep(RUN, replace(initial_state(CONTRACT), round=1))
    path = store.folder(RUN) / "1.state"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(EnvironmentUnfitError, match=r"1\.state: "):
        store.last_state(CONTRACT)
    store.close()
    (tmp_path / "site.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(EnvironmentUnfitError, match=r"site\.sqlite: file is not a database"):
        Store(tmp_path)
