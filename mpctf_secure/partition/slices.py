"""Consecutive slices of a seeded permutation, reshuffled each time the data has been used up."""

from collections.abc import Callable

from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.hazmat.prg import Generator


def round_slice(round_number: int, count: int, rows: int, seed: int, participant: str) -> list[int]:
    """Indices into `rows` rows for round 1, 2, …; the slice of any round is found without those before it."""
    start = (round_number - 1) * count
    order = _orders(rows, seed, participant)
    return [order(at // rows)[at % rows] for at in range(start, start + count)]


def _orders(rows: int, seed: int, participant: str) -> Callable[[int], list[int]]:
    made: dict[int, list[int]] = {}

    def order(epoch: int) -> list[int]:
        """All rows, in the order of one pass over them."""
        if epoch not in made:
            key = hkdf(enc(seed), enc("mpctf-secure/slice/v1", participant, epoch))
            made[epoch] = [int(index) for index in Generator(key).permutation(rows)]
        return made[epoch]

    return order
