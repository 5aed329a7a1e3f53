"""DP-SGD over a site's records (Abadi et al. 2016): on which samples, with how much noise."""

import math
from dataclasses import astuple, dataclass, field
from typing import Any

from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf
from mpctf_secure.hazmat.prg import Generator
from mpctf_secure.privacy.accountant import Release


def sampling_rate(batch_size: int, records: int) -> float:
    """q with which a step has so many records in the mean, or all."""
    return min(1.0, batch_size / records)


@dataclass(frozen=True)
class Samples:
    """Of a round; samples and noise follow from its secret, so that a job that is started again repeats them: who could
    choose among draws, or wait for one that fits into memory, would have less noise.

    Only the agent and the head of its job have the secret.
    """

    release: Release
    secret: bytes = field(default=b"", repr=False)

    def draw(self, records: int) -> list[list[int]]:
        """Which of so many records each step has: every one at the sampling rate, to a multiple of 2⁻⁶⁴ below."""
        source, found = Generator(hkdf(self.secret, enc("mpctf-secure/samples/v1"))), list[list[int]]()
        threshold = int(math.ldexp(self.release.sampling_rate, 64))
        for _ in range(self.release.steps):
            words = source.bytes(8 * records).view("<u8")
            found.append([index for index, word in enumerate(words.tolist()) if word < threshold])
        return found

    def encode(self) -> list[Any]:
        """For JSON, without the secret."""
        return list(astuple(self.release))

    @classmethod
    def decode(cls, told: list[Any], secret: bytes = b"") -> "Samples":
        """What was encoded, with its secret where it is known."""
        return cls(Release(*told), secret)
