"""One data set divided among local participants, for trials."""

from collections.abc import Sequence

from mpctf_secure.hazmat.prg import Generator


def split_iid(rows: int, parts: int, seed: int) -> list[list[int]]:
    """Row indices for each part, dealt from a seeded permutation."""
    order = Generator.of(seed, "split").permutation(rows)
    return [sorted(order[part::parts]) for part in range(parts)]


def split_by_label(labels: Sequence[str], parts: int, seed: int) -> list[list[int]]:
    """Row indices for each part, so that every label lives at half of the parts (at least one), its rows dealt evenly.

    Label number l in sorted order goes to parts l, l + 1, … modulo `parts`: everyone lacks labels that others have.
    """
    holders = max(1, parts // 2)
    index = {label: number for number, label in enumerate(sorted(set(labels)))}
    divided: list[list[int]] = [[] for _ in range(parts)]
    seen = [0] * len(index)
    for row in Generator.of(seed, "split").permutation(len(labels)):
        number = index[labels[row]]
        divided[(number + seen[number] % holders) % parts].append(row)
        seen[number] += 1
    return [sorted(part) for part in divided]
