"""DP-SGD over a site's records (Abadi et al. 2016): how many steps, on which samples, with how much noise."""

import math

from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.privacy.accountant import Release, cost_of_integers, noise_for


def release_of_round(
    epsilon: float, delta: float, *, records: int, batch_size: int, volume: int, rounds: int
) -> Release:
    """What a round publishes of so many records, with noise so that all rounds together cost (ε, δ) at the most.

    Every step takes each record at the sampling rate, in as many steps as batches of `volume` rows. UsageError where
    no noise is enough.
    """
    rate, steps = sampling_rate(batch_size, records), math.ceil(volume / batch_size)
    noise = noise_for(epsilon, lambda noise: cost_of_integers([Release(noise, rate, rounds * steps)], delta))
    return Release(noise, rate, steps)


def sampling_rate(batch_size: int, records: int) -> float:
    """q with which a step has so many records in the mean, or all."""
    return min(1.0, batch_size / records)


def poisson_sample(source: Generator, records: int, rate: float) -> list[int]:
    """The records of a step: each with this probability, rounded down to a multiple of 2⁻⁶⁴."""
    words = source.bytes(8 * records).view("<u8")
    threshold = int(math.ldexp(rate, 64))
    return [index for index, word in enumerate(words.tolist()) if word < threshold]
