"""What a round costs besides training steps, and what a second process brings.

Usage: python benchmarks/rounds.py

Overhead: a run of three sites on this machine; of each round, from its start until all hold the next state, the share
that is no training step of the slowest site. The limit is for rounds of minutes on a GPU; here rounds are as short as
the demo model allows, so that what is fixed weighs more.
Scaling: tokens a second of one job with one process and with two, each on as many threads, or on a GPU each.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from secagg import machine

from mpctf_secure import files
from mpctf_secure.aggregation.lora import initial_adapter
from mpctf_secure.cli.models import cache
from mpctf_secure.config.run import Lora
from mpctf_secure.config.site import Compute, Node, SiteConfig
from mpctf_secure.config.strategies import FedAvg
from mpctf_secure.config.training import Training
from mpctf_secure.experiments.intents import write_intents
from mpctf_secure.training.launch.job import Job, gpus_here
from mpctf_secure.training.model_hash import hash_model
from mpctf_secure.training.spec import JobSpec

MODEL = cache() / "models" / "smollm2-135m-instruct"
ROWS, PASSES, MOST_OVERHEAD = 128, 3, 0.05
RUN = f"""\
run: rounds
participants: {{local: 3, data: "{{participant}}.jsonl"}}
rounds: 3
model: {{base: smollm2-135m-instruct}}
training: {{batch_size: 8, max_length: 128}}
data: {{size: {ROWS}}}
"""


def lines(path: Path) -> list[dict[str, Any]]:
    """A file of events."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def overheads(home: Path) -> Iterator[float]:
    """Of each round the share that is not training."""
    names = ["site-1", "site-2", "site-3"]
    write_intents(home, names, ROWS, 12, 0)
    (home / "run.yaml").write_text(RUN)
    argv = [sys.executable, "-m", "mpctf_secure", "start", str(home / "run.yaml"), "--runs", str(home / "runs")]
    subprocess.run(argv, check=True, capture_output=True)
    (folder,) = (home / "runs").iterdir()
    at = {(e["event"], e.get("round")): datetime.fromisoformat(e["time"]) for e in lines(folder / "events.jsonl")}
    sites = [lines(folder / "sites" / name / "work" / "events.jsonl") for name in names]
    for number in (1, 2, 3):
        trained = [
            e["seconds"] for events in sites for e in events if e["event"] == "round_trained" and e["round"] == number
        ]
        whole = (at["round_finished", number] - at["round_started", number]).total_seconds()
        yield 1 - max(trained) / whole


def rate(home: Path, processes: int, on_gpus: bool) -> float:
    """Tokens a second of a job; the median of some rounds."""
    node = Node(gpus=tuple(range(processes))) if on_gpus else Node(processes=processes)
    compute = Compute(nodes=(node,))
    site = SiteConfig(coordinator="127.0.0.1:1", model=MODEL, data=home / "site-1.jsonl", work=home, compute=compute)
    terms = Training(batch_size=16, max_length=128)
    spec = JobSpec.of(site, (hash_model(site.model).whole, files.digest(site.data)), Lora(), terms, FedAvg())
    job = Job(spec, site)
    try:
        names = [name for name, _ in job.schema]
        rounds = [
            job.train(initial_adapter(job.schema, 0), list(range(ROWS)), names, lambda *_: None) for _ in range(PASSES)
        ]
    finally:
        job.close()
    return float(np.median([trained.tokens / trained.seconds for trained in rounds]))


def main() -> int:
    """Measure and print; 1 if a round costs more than the limit."""
    print(machine())
    with tempfile.TemporaryDirectory() as work:
        found = list(overheads(Path(work)))
        print("overhead of rounds:", ", ".join(f"{share:.1%}" for share in found))
        os.environ["OMP_NUM_THREADS"] = "1"
        one, two = (rate(Path(work), processes, on_gpus=gpus_here() > 1) for processes in (1, 2))
        print(f"one process {one:.0f} tokens/s, two {two:.0f}: × {two / one:.2f}")
    return 0 if float(np.median(found)) <= MOST_OVERHEAD else 1


if __name__ == "__main__":
    sys.exit(main())
