"""Every data strategy with every aggregation strategy, from config alone, on uneven sites."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.harness import SMOKE
from e2e.test_start import run_cli

from mpctf_secure.experiments.intents import write_intents

EXAMPLES = SMOKE.parent / "strategies"
DATA = ("fixed_size", "percentage", "max_volume", "memory_aware")
AGGREGATION = ("fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad")
ROWS = {"fixed_size": 3 * 24, "percentage": 24 + 12 + 6, "max_volume": 3 * 50}
"""What sites of 96, 48 and 24 rows train on together in a round; memory_aware goes by the machine's memory."""
FAST = {("memory_aware", "fedadam")}
PAIRS = [
    pytest.param(data, aggregation, marks=() if (data, aggregation) in FAST else pytest.mark.slow)
    for data in DATA
    for aggregation in AGGREGATION
]


def example(name: str) -> dict[str, Any]:
    """The run file that is shipped for a strategy."""
    content: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    return content


def write_uneven(folder: Path) -> None:
    """A file for each site, the second and third with a half and a quarter of the first one's rows."""
    names = [f"site-{number}" for number in (1, 2, 3)]
    write_intents(folder, names, 96, 24, 0)
    for power, name in enumerate(names):
        lines = (folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[: 96 >> power]))


@pytest.mark.parametrize(("data", "aggregation"), PAIRS)
def test_data_and_aggregation_strategies_run_from_config_alone(data: str, aggregation: str, tmp_path: Path) -> None:
    write_uneven(tmp_path)
    content = {**example(data), "aggregation": example(aggregation)["aggregation"]}
    content["participants"] = {"local": 3, "data": "{participant}.jsonl"}
    measures = (data, aggregation) in FAST
    if measures:
        content["training"]["validation"] = 0.25
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    result = run_cli("start", tmp_path / "run.yaml", "--runs", tmp_path / "runs", "--format", "json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    trained = [entry for entry in report["rounds"] if entry["survey"] is None]
    assert (len(trained), len(report["rounds"])) == (2, 2 + (data == "memory_aware"))
    assert all(len(entry["survivors"]) == 3 and 0 < entry["mean_loss"] < 10 for entry in trained)
    share = (168 - 42 * measures) / 2  # of all rows; these are shared out by rows and memory
    for entry in trained:
        assert entry["rows"] == pytest.approx(ROWS.get(data, share), abs=0 if data in ROWS else 2)
    losses = [entry["validation_loss_before"] for entry in trained]
    assert losses[1] < losses[0] if measures else losses == [None, None]
    assert report["adapter_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((SMOKE.parent / "privacy").glob("*.yaml")), ids=lambda path: path.stem)
def test_privacy_strategies_run_from_config_alone(path: Path, tmp_path: Path) -> None:
    result = run_cli("start", path, "--runs", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    found = report["privacy"]
    of_records, of_paper = path.stem == "record_dpsgd", path.stem == "mpctf_paper"
    sites, rounds = (2, 10) if of_paper else (4, 2)
    assert found["strategy"] == {"record_dpsgd": "none", "mpctf_paper": "server_fixed"}.get(path.stem, path.stem)
    if of_records:
        assert f"privacy of records: {found['records']['statement']}" in result.stdout
    elif of_paper:
        assert found["epsilon"] == pytest.approx(5.0e8, rel=1e-3)
        assert found["statement"].startswith("NO MEANINGFUL GUARANTEE, only clipping and regularising noise: epsilon")
    else:
        assert 1 < found["epsilon"] < 10
    assert f"privacy: {found['statement']}" in result.stdout
    assert all(entry["rows"] is None and len(entry["survivors"]) == sites for entry in report["rounds"])
    assert f"round 1: sum of {', '.join(f'site-{number}' for number in range(1, sites + 1))}" in result.stdout
    assert "mean loss" not in result.stdout
    shown = run_cli("privacy", "report", folder / "sites" / "site-1" / "site.yaml", "--format", "json")
    (spent,) = json.loads(shown.stdout)
    assert spent["charges"] == rounds
    costs = {(entry["unit"], entry["against"]): entry["epsilon"] for entry in spent["spent"]}
    central = found["strategy"].startswith("server")
    assert (costs["participant", "coordinator"] is None) == (of_records or central)
    assert (costs["record", "coordinator"] is None) == central
