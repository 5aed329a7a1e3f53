"""Banking77 among four label-skewed sites: base, each alone, federated, centralised at equal rows.

Usage: python benchmarks/banking77.py FOLDER [INTENTS], FOLDER with train.csv and test.csv (PolyAI, CC BY 4.0).
"""

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

RUN = """\
run: banking77
participants: {local: 4, data: train.jsonl, split: label}
rounds: 6
model: {base: smollm2-135m-instruct, lora: {r: 8, alpha: 16}}
training: {learning_rate: 2e-3, batch_size: 8, max_length: 128}
data: {size: 64}
evaluation: {test: test.jsonl}
"""
TEST_ROWS_EACH = 20
INSTRUCTION = "Label the bank customer's message with its intent."


def rows(path: Path, intents: set[str], most_each: int | None = None) -> Iterator[str]:
    """JSONL rows of the chosen intents, at most so many of each."""
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            seen[row["category"]] = seen.get(row["category"], 0) + 1
            if row["category"] in intents and (most_each is None or seen[row["category"]] <= most_each):
                contents = {"system": INSTRUCTION, "user": row["text"], "assistant": row["category"]}
                yield json.dumps({"messages": [{"role": role, "content": text} for role, text in contents.items()]})


def write(path: Path, lines: Iterable[str]) -> None:
    """One row a line."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main(folder: Path, count: int) -> int:
    """Write the files, run, and print federated as a share of centralised; 0 if it is at least 0.85."""
    with (folder / "train.csv").open(encoding="utf-8", newline="") as stream:
        intents = set(sorted({row["category"] for row in csv.DictReader(stream)})[:count])
    with tempfile.TemporaryDirectory() as work:
        home = Path(work)
        write(home / "train.jsonl", rows(folder / "train.csv", intents))
        write(home / "test.jsonl", rows(folder / "test.csv", intents, TEST_ROWS_EACH))
        (home / "run.yaml").write_text(RUN, encoding="utf-8")
        argv = [sys.executable, "-m", "mpctf_secure", "start", str(home / "run.yaml"), "--runs", str(home / "runs")]
        subprocess.run([*argv, "--compare", "alone", "--compare", "centralised"], check=True)
        report = json.loads(next((home / "runs").glob("*/report.json")).read_text())
    accuracy = report["held_out_accuracy"]
    ratio = accuracy["federated"] / accuracy["centralised"]
    print(f"{count} intents: federated / centralised = {ratio:.3f}")
    return 0 if ratio >= 0.85 else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20))
