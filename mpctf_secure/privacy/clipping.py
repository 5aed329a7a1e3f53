"""Clipping an update to a public norm before it is masked: nobody can do it afterwards."""

import numpy as np
import numpy.typing as npt

from mpctf_secure.errors import UsageError

Vector = npt.NDArray[np.float32]


def clip_to_norm(update: Vector, clip_norm: float) -> tuple[Vector, bool]:
    """(u·min(1, C/‖u‖), whether ‖u‖ > C), the norm in float64; NaN and Inf are refused."""
    norm = float(np.sqrt(np.square(update, dtype=np.float64).sum()))
    if not np.isfinite(norm):
        raise UsageError("the local update holds NaN or Inf", hint="lower training.learning_rate")
    if norm <= clip_norm:
        return update, False
    return (update * (clip_norm / norm)).astype(np.float32), True
