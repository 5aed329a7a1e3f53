"""The rows that a participant holds out for the whole run, to measure its own adapter on."""

from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.partition.volumes import percentage


def divide(share: float, rows: int, seed: int, participant: str) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on and of those held out, ascending: ⌊share·rows⌋, at least one; none of share 0."""
    if not share:
        return list(range(rows)), []
    key = hkdf(enc(seed), enc("mpctf-secure/held-out/v1", participant))
    order = [int(index) for index in Generator(key).permutation(rows)]
    count = percentage(share, rows)
    return sorted(order[count:]), sorted(order[:count])
