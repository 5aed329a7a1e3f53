import json
import subprocess
import sys

import pytest


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpctf_secure", "privacy", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_noise_for_a_guarantee_is_shown_for_records_and_participants() -> None:
    result = plan("--rows", 5000, "--rounds", 10, "--epsilon", 8, "--format", "json")
    record, participant = json.loads(result.stdout)
    assert (record["unit"], participant["unit"]) == ("record", "participant")
    assert participant["noise_multiplier"] == pytest.approx(1.898, rel=5e-4)
    assert participant["delta"] == 1e-5
    assert record["sampling_rate"] == 64 / 5000
    assert record["noise_multiplier"] < participant["noise_multiplier"]
    assert all(7.9 < entry["epsilon"] <= 8 for entry in (record, participant))
    assert "times as long as the clipped mean of 4 updates" in participant["warnings"][0]


def test_the_papers_noise_is_called_what_it_is() -> None:
    result = plan("--rows", 5000, "--rounds", 10, "--noise-multiplier", 1e-4)
    assert "participant  noise multiplier 0.0001: epsilon 5.001e+08 at delta 1e-05" in result.stdout
    assert result.stdout.count("NO MEANINGFUL GUARANTEE") == 2
    assert result.stderr == ""


BAD = {
    "delta above one over the rows": (("--epsilon", 8, "--delta", 0.01), "delta: 0.01 is outside (0, 1/5000)"),
    "no number": (("--epsilon", "nan"), "--epsilon: nan is not"),
    "no noise": (("--noise-multiplier", 0), "--noise-multiplier: 0.0 is not"),
    "neither": ((), "name --epsilon or --noise-multiplier"),
    "both": (("--epsilon", 8, "--noise-multiplier", 1), "name --epsilon or --noise-multiplier"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_planned_is_refused(arguments: tuple[object, ...], message: str) -> None:
    result = plan("--rows", 5000, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "\nhint: " in result.stderr
