import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mpctf_secure.errors import EnvironmentUnfitError
from mpctf_secure.experiments.tiny_llama import write_tiny_llama
from mpctf_secure.training import model_hash
from mpctf_secure.training.model_hash import has_chat_template, hash_model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "original"
    write_tiny_llama(folder, ["a text", "another text"])
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def divide(model: Path) -> None:
    tensors = list(load_file(model / "model.safetensors").items())
    save_file(dict(tensors[:5]), model / "model-2.safetensors")
    save_file(dict(tensors[5:]), model / "model-1.safetensors")
    (model / "model.safetensors").unlink()


def change_a_weight(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors")


CHANGES = {
    "other files with the same tensors": (divide, set()),
    "where it came from": (lambda m: change(m / "config.json", _name_or_path="/elsewhere"), set()),
    "its shape": (lambda m: change(m / "config.json", rope_theta=1.0), {"config"}),
    "the chat template": (lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"), {"tokenizer"}),
    "a weight": (change_a_weight, {"weights"}),
}


@pytest.mark.parametrize(("spoil", "parts"), CHANGES.values(), ids=CHANGES.keys())
def test_what_matters_to_what_is_computed_shows_in_its_own_hash(model: Path, spoil, parts: set[str]) -> None:
    before = hash_model(model)
    spoil(model)
    after = hash_model(model)
    assert {name for name in before._fields if getattr(before, name) != getattr(after, name)} == parts
    assert (before.whole != after.whole) == bool(parts)


def test_hash_of_the_weights_is_kept_until_their_files_change(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hash_model(model, tmp_path / "kept")
    with monkeypatch.context() as patched:
        patched.setattr(model_hash, "_hash_weights", None)
        assert hash_model(model, tmp_path / "kept") == before == hash_model(model, tmp_path / "kept")
    change_a_weight(model)
    assert hash_model(model, tmp_path / "kept") == hash_model(model) != before
    (tmp_path / "kept").write_bytes(b"")
    assert hash_model(model, tmp_path / "kept") == hash_model(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_folder_that_is_no_model_is_named(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(EnvironmentUnfitError, match=str(model)):
        hash_model(model, tmp_path / "kept")


def test_chat_template_is_found_where_it_may_lie(model: Path) -> None:
    assert has_chat_template(model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    change(model / "tokenizer_config.json", chat_template=None)
    assert not has_chat_template(model)
    change(model / "tokenizer_config.json", chat_template="{{ messages }}")
    assert has_chat_template(model)
    assert not has_chat_template(model / "nowhere")
