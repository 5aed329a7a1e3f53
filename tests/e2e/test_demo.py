"""The demo's claim, with the demo's model: federated beats the base and everyone alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpctf_secure.cli.models import cache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BANKING77 = ROOT.parent / "shared" / "data" / "banking77"


@pytest.fixture(autouse=True)
def demo_model() -> None:
    if not (cache() / "models" / "smollm2-135m-instruct" / "config.json").exists():
        pytest.skip("the demo's model is not in the cache; `make demo` puts it there")


def test_federated_beats_base_and_everyone_alone_and_comes_near_centralised(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mpctf_secure", "start", "--runs", str(tmp_path)]
    subprocess.run([*argv, "--compare", "alone", "--compare", "centralised"], check=True)
    report = json.loads(next(tmp_path.glob("*/report.json")).read_text())
    accuracy = report["held_out_accuracy"]
    alone = [value for name, value in accuracy.items() if name.endswith(" alone")]
    assert len(alone) == 4
    assert accuracy["federated"] > max(*alone, accuracy["base"])
    assert accuracy["federated"] >= 0.85 * accuracy["centralised"]


def test_banking77_among_four_label_skewed_sites() -> None:
    if not BANKING77.exists():
        pytest.skip(f"{BANKING77} is not here")
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "banking77.py"), str(BANKING77)], check=True)
