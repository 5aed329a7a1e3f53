"""What one run of each noise lets slip of a thousand canaries (Steinke et al. 2023), against what it claims.

Usage: python benchmarks/audit.py

Each canary is as long as the clip norm, in a direction of its own, and there or not by the toss of a coin. The bound on
ε is a lower one, at δ = 1e-5 and 95 %: a right mechanism that claims 3 shows about 1, so that only much too little
noise would be seen here. What is two times too small is caught by the tests, in a thousand runs.
"""

import os
import sys
from collections.abc import Iterator

import numpy as np
import torch

from mpctf_secure.privacy.accountant import Release, cost, noise_for
from mpctf_secure.privacy.audit import lower_bound_of_one_run
from mpctf_secure.privacy.integers import Scheme, noised, to_signed
from mpctf_secure.privacy.records import Samples
from mpctf_secure.training.dpsgd import DpSgd
from mpctf_secure.training.group import ALONE

CLAIM, DELTA, CANARIES, GUESSES = 3.0, 1e-5, 1000, 100
MULTIPLIER = noise_for("epsilon", CLAIM, lambda noise: cost([Release(noise)], DELTA))


class Canaries:
    """In the place of records' gradients."""

    def __init__(self, included: np.ndarray) -> None:
        self._included = included

    def of(self, _: object) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Those that are there, far too long."""
        yield torch.zeros(()), [100 * torch.eye(CANARIES)[torch.from_numpy(self._included)][:, None]]


def of_updates(included: np.ndarray) -> np.ndarray:
    """Scores by the noise of a round."""
    scheme = Scheme(CANARIES, 1, MULTIPLIER, None, 1.0)
    lanes, _ = noised(included.astype(np.int64) * scheme.units, 0, scheme, os.urandom(32))
    return to_signed(lanes) / scheme.units


def of_records(included: np.ndarray) -> np.ndarray:
    """Scores by a step of DP-SGD."""
    layer = torch.nn.Linear(CANARIES, 1, bias=False)
    dpsgd = DpSgd(layer, ALONE, Canaries(included), 1.0, 1)  # type: ignore[arg-type]
    dpsgd.gradient(Samples(Release(MULTIPLIER), os.urandom(32)), lambda: None)([])
    assert layer.weight.grad is not None
    return layer.weight.grad[0].double().numpy()


def main() -> int:
    """Print what both show; 1 if one of them shows more than it claims."""
    worst = 0.0
    for name, mechanism in {"updates": of_updates, "records": of_records}.items():
        included = np.random.default_rng().random(CANARIES) < 0.5
        shown = lower_bound_of_one_run(mechanism(included), included, GUESSES, DELTA)
        print(f"noise on {name}: claims epsilon {CLAIM:g}, one run shows {shown:.2f} or more")
        worst = max(worst, shown)
    return 0 if worst <= CLAIM else 1


if __name__ == "__main__":
    sys.exit(main())
