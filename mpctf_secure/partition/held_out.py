"""The rows that a participant holds out for the whole run, to measure its own adapter on."""

from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.partition.volumes import percentage


def divide(share: float, rows: int, seed: int, participant: str) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on and of those held out, ascending: ⌊share·rows⌋, at least one; none of share 0."""
    if not share:
        return list(range(rows)), []
    order = Generator.of(seed, "held-out", participant).permutation(rows)
    count = percentage(share, rows)
    return sorted(order[count:]), sorted(order[:count])
