"""Consecutive slices of a seeded permutation, reshuffled each time the data has been used up."""

import functools

from mpctf_secure.hazmat.prg import Generator


def round_slice(round_number: int, count: int, rows: int, seed: int, participant: str) -> list[int]:
    """Indices into `rows` rows for round 1, 2, …; the slice of any round is found without those before it."""

    @functools.cache
    def order(epoch: int) -> list[int]:
        """All rows, in the order of one pass over them."""
        return Generator.of(seed, "slice", participant, epoch).permutation(rows)

    start = (round_number - 1) * count
    return [order(at // rows)[at % rows] for at in range(start, start + count)]
