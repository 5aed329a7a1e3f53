"""What DP-SGD costs in accuracy: the demo model at four sites of 4096 rows, with and without it.

Usage: python benchmarks/dpsgd.py [EPSILON …], 8 if nothing is said; half an hour on two cores.

The same rows, batches of the same expected size, and as many steps: 16, in four rounds. Settings were chosen for large
batches and few coordinates, and are the same for both.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from mpctf_secure.experiments.intents import write_intents

RUN = """\
run: dpsgd
participants: {local: 4, data: "{participant}.jsonl"}
rounds: 4
model: {base: smollm2-135m-instruct, lora: {r: 2, alpha: 16}}
training: {learning_rate: 2e-2, batch_size: 64, max_length: 64}
data: {size: 256}
aggregation: {lora: freeze_a}
evaluation: {test: test.jsonl}
timeouts: {training: 3600}
"""
NAMES = [f"site-{number}" for number in range(1, 5)]
ROWS, TEST_ROWS = 4096, 240


def accuracy(home: Path, name: str, privacy: str) -> dict[str, float]:
    """Held-out accuracies of a run."""
    path, runs = home / f"{name}.yaml", home / name
    path.write_text(f"{RUN}privacy: {privacy}\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "mpctf_secure", "start", str(path), "--runs", str(runs)], check=True)
    (report,) = runs.glob("*/report.json")
    found: dict[str, float] = json.loads(report.read_text())["held_out_accuracy"]
    return found


def main(targets: list[float]) -> int:
    """Run all and print a table; 1 if noise has cost everything."""
    with tempfile.TemporaryDirectory() as work:
        home = Path(work)
        write_intents(home, NAMES, ROWS, TEST_ROWS, 0)
        without = accuracy(home, "without", "{}")
        table = {"no noise": without["federated"]}
        for epsilon in targets:
            dpsgd = f"{{record_dpsgd: {{epsilon: {epsilon:g}, delta: 1.0e-5, clip_norm: 1.0}}}}"
            table[f"epsilon {epsilon:g}"] = accuracy(home, f"epsilon-{epsilon:g}", dpsgd)["federated"]
    for name, share in table.items():
        print(f"| {name} | {share:.3f} |")
    return 0 if min(table.values()) > without["base"] else 1


if __name__ == "__main__":
    sys.exit(main([float(text) for text in sys.argv[1:]] or [8.0]))
