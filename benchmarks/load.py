"""One real coordinator and more and more sites on this machine: seconds, memory and bytes of a round.

Usage: python benchmarks/load.py [--dimension D] [--sites N …]

Every site is a process with its own channel, keys and sealed files; training is replaced by a ready update. The figures
at the end say whether the coordinator's cost grows with the number of sites and not faster; they compare runs of this
very invocation, all in the 32-bit ring. A round's seconds are no such figure: each site draws a mask for every other
one, and here all of them draw on the same cores.
"""

import argparse
import statistics
import sys
from typing import Any, NamedTuple

from secagg_round import measure

ROUNDS = 4
MOST_SLOPE = 1.5


class Load(NamedTuple):
    """Of one round, with so many sites; the median of all rounds after the first."""

    sites: int
    seconds: float
    cpu: float
    """The coordinator's seconds on the CPU, a round of the whole run."""
    up: float
    down: float
    memory: float
    """Peak of the coordinator's process, whole run."""


def load(dimension: int, sites: int) -> Load:
    """A run of ROUNDS rounds."""
    found = measure("secure", dimension, sites, ROUNDS)
    rounds = found["rounds"][1:]

    def middle(figure: Any) -> float:
        return statistics.median(sum(figure(record).values()) for record in rounds)

    return Load(
        sites,
        middle(lambda record: record["seconds"]),
        found["cpu"] / ROUNDS,
        middle(lambda record: record["bytes_up"]) / 1e6,
        middle(lambda record: record["bytes_down"]) / 1e6,
        found["memory"] / 1e6,
    )


def main() -> int:
    """Measure and print; 1 if a figure grows faster than the number of sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=1 << 20)
    parser.add_argument("--sites", type=int, nargs="+", default=[20, 30, 40, 50])
    options = parser.parse_args()
    print("| sites | seconds a round | coordinator: CPU s a round | MB up | MB down | MB |\n|---|---|---|---|---|---|")
    loads = []
    for sites in sorted(options.sites):
        loads.append(load(options.dimension, sites))
        print("| {} | {:.2f} | {:.2f} | {:.1f} | {:.1f} | {:.0f} |".format(*loads[-1]), flush=True)
    first, last = loads[0], loads[-1]
    more, missed = last.sites / first.sites, False
    print(f"\n| {last.sites} over {first.sites} sites, per site | seen | must be | |\n|---|---|---|---|")
    for name in ("cpu", "up", "down", "memory"):
        ratio = getattr(last, name) / getattr(first, name) / more
        missed |= ratio > MOST_SLOPE
        print(f"| {name} | {ratio:.2f} | ≤ {MOST_SLOPE} | {'MISSED' if ratio > MOST_SLOPE else 'reached'} |")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
