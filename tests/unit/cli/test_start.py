from pathlib import Path
from types import SimpleNamespace

import pytest
from chronicle import make_roster

from mpctf_secure.cli import start
from mpctf_secure.errors import UsageError
from mpctf_secure.hazmat.signature import SigningKey
from mpctf_secure.identity.keys import Keys

KEYS = [SigningKey(bytes([number]) * 32) for number in (1, 2)]


def test_run_that_began_with_other_keys_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log would get a signature of a key that it is not of, and no site would take the call."""
    config = SimpleNamespace(participants=SimpleNamespace(enrolled=("a", "b")))
    plan = SimpleNamespace(config=config, home=tmp_path, proposal=SimpleNamespace(roster_hash="00" * 32))
    monkeypatch.setattr(start.Plan, "load", lambda _: plan)
    monkeypatch.setattr(start.passphrase, "read", lambda _: b"")
    monkeypatch.setattr(start.keystore, "unseal", lambda *_: Keys.of(bytes(96)))
    monkeypatch.setattr(start.keystore, "load_roster_of", lambda *_: make_roster(("a", "b"), KEYS))
    with pytest.raises(UsageError, match=f"{tmp_path.name} began with other keys"):
        start.resume_run(tmp_path, None, as_json=True)
