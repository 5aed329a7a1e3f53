"""DP-SGD (Abadi et al. 2016): every record's gradient is clipped, and their sum gets noise before anything sees it.

Clipped to norm C a gradient becomes integers of norm K = 2²⁴ at the most, so that what a record changes in the sum is
bounded exactly, in whatever order things are added. Noise on integers hides it to the last bit (Mironov 2012 on
floats).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from mpctf_secure.errors import UsageError
from mpctf_secure.hazmat.encoding import enc
from mpctf_secure.hazmat.kdf import hkdf, sha256
from mpctf_secure.parallel import ordered_map
from mpctf_secure.privacy.noise import gaussian_vector
from mpctf_secure.privacy.records import Samples
from mpctf_secure.training.data import Example
from mpctf_secure.training.group import Group
from mpctf_secure.training.loop import Gradient, Recipe, Steps, TrainResult, take_steps, trained_parameters
from mpctf_secure.training.model import device_of
from mpctf_secure.training.record_gradients import Gradients, RecordGradients

UNITS = 2**24
"""K."""
_BELOW = 1 - 2.0**-40  # for what float64 rounds in a norm and a product


@dataclass(frozen=True)
class DpSgd:
    """Of one job, with so many records: whose gradients, clipped to what norm."""

    model: torch.nn.Module
    group: Group
    gradients: RecordGradients
    clip_norm: float
    records: int

    def train(
        self,
        steps: Steps,
        samples: Samples,
        recipe: Recipe,
        after_step: Callable[[int, int], None],
        between_passes: Callable[[], None],
    ) -> TrainResult:
        """`train_steps` with these records in each step, of which nothing remains but sums with noise.

        UsageError where what is trained is not float32, or a step has changed nothing.
        """
        trained = trained_parameters(self.model)
        if any(parameter.dtype != torch.float32 for parameter in trained):
            raise UsageError("record_dpsgd: what is trained is not float32", hint="another base model")
        before = [parameter.detach().clone() for parameter in trained]

        def notice_no_change(number: int, steps: int) -> None:
            """An optimizer that has lost the parameters trains nothing, and says nothing (Opacus issue 820)."""
            if number == 1 and all(torch.equal(*pair) for pair in zip(before, trained, strict=True)):
                raise UsageError(
                    "record_dpsgd: the first step has changed nothing", hint="raise training.learning_rate"
                )
            after_step(number, steps)

        gradient = self.gradient(samples, between_passes)
        return take_steps(self.model, steps, gradient, recipe, self.group, notice_no_change)

    def gradient(self, samples: Samples, between_passes: Callable[[], None]) -> Gradient:
        """Of a step: the sum of its records' clipped gradients over all processes, with noise, as a mean."""
        trained, device, number = trained_parameters(self.model), device_of(self.model), count()
        sizes = [parameter.numel() for parameter in trained]
        expected = samples.release.sampling_rate * self.records
        scale = self.clip_norm / (UNITS * expected)

        def of_records(records: Sequence[Example]) -> torch.Tensor:
            """Of these records."""
            total = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
            losses = torch.zeros((), device=device)
            for loss, found in self.gradients.of(records):
                total += _clipped_sum(found, self.clip_norm)
                losses += loss
                between_passes()
            self.group.add([total])
            _add_noise(total, samples, next(number), self.group)
            for parameter, part in zip(trained, torch.split(total, sizes), strict=True):
                parameter.grad = (part.double() * scale).float().view_as(parameter)
            return losses

        return of_records


def _clipped_sum(gradients: Gradients, clip_norm: float) -> torch.Tensor:
    """Σ trunc(g · K/C · min(1, C/‖g‖)) over the records, all parameters as one vector [d] of int64.

    Truncated, so that no record's integers are longer than K. What is no finite gradient counts as nothing.
    """
    flat = [gradient.flatten(1).double() for gradient in gradients]
    norms = torch.stack([part.square().sum(1) for part in flat]).sum(0).sqrt()
    finite = norms.isfinite()
    factors = torch.where(finite, UNITS * _BELOW / norms.clamp(min=clip_norm), 0.0)[:, None]
    # Chosen and not multiplied: 0 · ∞ is no number, and as an integer −2⁶³.
    return torch.cat([torch.where(finite[:, None], part * factors, 0.0).long().sum(0) for part in flat])


def _add_noise(total: torch.Tensor, samples: Samples, step: int, group: Group) -> None:
    """From the head's secret, the step and the sum itself: a step that is repeated bit by bit has the same noise, and
    no other has."""
    if group.is_head:
        seed = hkdf(samples.secret, enc("mpctf-secure/record-noise/v1", step, sha256(total.cpu().numpy().tobytes())))
        variance = math.ceil((samples.release.noise_multiplier * UNITS) ** 2)
        total += torch.from_numpy(gaussian_vector(seed, variance, total.numel(), ordered_map)).to(total.device)
    group.share_tensor(total)
