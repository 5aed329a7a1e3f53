"""How many rows a participant trains on in a round, by data strategy (MPCTF section 3.3)."""

from decimal import Decimal


def fixed_size(size: int, rows: int) -> int:
    """min(c, |D_k|)."""
    return min(size, rows)


def percentage(share: float, rows: int) -> int:
    """⌊p·|D_k|⌋ with p as it is written in decimal, at least 1."""
    return max(1, int(Decimal(str(share)) * rows))


def max_volume(largest: int, rounds: int) -> int:
    """⌈max_j |D_j| / R⌉, also for those who have fewer rows: they begin again sooner."""
    return -(-largest // rounds)


def memory_aware(rows: int, memory: int, total_rows: int, total_products: int, rounds: int) -> int:
    """(Σ|D_j| / R) · |D_k|·M_k / Σ|D_j|·M_j, rounded to the nearest, within [1, |D_k|].

    The paper gives no formula; this one gives on its own setting what the other strategies give.
    """
    numerator, denominator = total_rows * rows * memory, rounds * total_products
    return min(max(1, (2 * numerator + denominator) // (2 * denominator)), rows)
