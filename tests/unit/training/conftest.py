"""What several tests of training begin with."""

from pathlib import Path

import pytest

from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.experiments.tiny_llama import write_tiny_llama


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and in `data` rows for it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_intents(folder / "data", ["a", "b"], 40, 24, 0)
    write_tiny_llama(folder, (folder / "data" / "a.jsonl").read_text().splitlines())
    return folder
