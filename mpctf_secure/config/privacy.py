"""Privacy strategies of the run file: who adds how much noise to what."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, Tag, model_validator

from mpctf_secure.config.base import Frozen
from mpctf_secure.config.strategies import by_strategy

Against = Literal["coordinator", "participants"]
"""Whom a guarantee holds against: the coordinator, with participants who collude, or participants and outsiders."""
ClipNorm = Annotated[float, Field(ge=1e-6, le=1e6)]
"""L2 norm that no participant's update exceeds; AdamW moves d coordinates about steps · learning rate · √d."""
USUAL_DELTA = 1e-5
LEAST_NOISE, MOST_NOISE = 1e-6, 1e4
_Noise = Annotated[float, Field(ge=LEAST_NOISE, le=MOST_NOISE)]


class RecordDpSgd(Frozen):
    """DP-SGD (Abadi et al. 2016) at every site: its records' gradients are clipped, and noise is added in each step.

    A site takes as much noise as its number of records and steps needs; it may be stricter.
    """

    epsilon: Annotated[float, Field(ge=0.02, le=1e9)]
    """Of each record of a site, for the whole run; below a fiftieth accountants are too coarse."""
    delta: Annotated[float, Field(gt=0, lt=1)] = USUAL_DELTA
    """Below one over the number of records of every site."""
    clip_norm: ClipNorm = 1.0
    """Of a record's gradient."""


class _Strategy(Frozen):
    record_dpsgd: RecordDpSgd | None = None
    """Beside what the strategy does with updates."""
    against: ClassVar[Against | Literal["nobody"]] = "nobody"
    """Whom noise on updates keeps from seeing one."""

    @property
    def holds_against_coordinator(self) -> bool:
        """Whether noise on updates is added before the coordinator has their sum."""
        return self.against == "coordinator"

    @property
    def hides_training(self) -> bool:
        """Whether nothing of a site's training without noise reaches the coordinator: no loss, count or progress."""
        return self.holds_against_coordinator or self.record_dpsgd is not None


class NoNoise(_Strategy):
    """On updates: clipping alone, which is no differential privacy."""

    strategy: Literal["none"] = "none"
    clip_norm: ClipNorm = 100.0


class Noised(_Strategy):
    """What the four strategies share."""

    clip_norm: ClipNorm = 1.0
    noise_multiplier: _Noise
    """Standard deviation of the sum's noise in clip norms: z; of the adaptive two for both things that they publish."""

    @property
    def highest_clip_norm(self) -> float:
        """The clip norm of any round at the most."""
        return self.clip_norm


class _ByCoordinator(Noised):
    """The coordinator sees the sum and adds the noise before it publishes: nothing is promised against it."""

    against = "participants"


class ByParticipants(Noised):
    """Every participant adds its share of the noise before masking: the coordinator sees the noised sum alone."""

    against = "coordinator"
    dropouts: Annotated[int, Field(ge=0, le=100)] | None = None
    """How many of a cohort may be lost before the round is void, all that the protocol bears if nothing is said: the
    shares of the others are as large as it takes then."""


class Adaptive(Noised):
    """The clip norm follows a quantile of the updates' norms (Andrew et al. 2021)."""

    target_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The share of updates that shall not be clipped: γ."""
    clip_learning_rate: Annotated[float, Field(gt=0, le=2)] = 0.2
    """η: C ← C·exp(−η·(share that was not clipped − γ))."""
    largest_clip_norm: ClipNorm = 100.0

    @property
    def highest_clip_norm(self) -> float:
        """As it adapts."""
        return self.largest_clip_norm

    @model_validator(mode="after")
    def _starts_inside(self) -> Self:
        if self.clip_norm > self.largest_clip_norm:
            raise ValueError("clip_norm is above largest_clip_norm")
        return self


class ServerFixed(_ByCoordinator):
    """The coordinator adds the noise, to a sum of updates of one clip norm."""

    strategy: Literal["server_fixed"] = "server_fixed"


class ServerAdaptive(_ByCoordinator, Adaptive):
    """With a clip norm that adapts."""

    strategy: Literal["server_adaptive"] = "server_adaptive"


class ClientFixed(ByParticipants):
    """Participants add the noise, to updates of one clip norm."""

    strategy: Literal["client_fixed"] = "client_fixed"


class ClientAdaptive(ByParticipants, Adaptive):
    """With a clip norm that adapts."""

    strategy: Literal["client_adaptive"] = "client_adaptive"


Privacy = Annotated[
    Annotated[NoNoise, Tag("none")]
    | Annotated[ServerFixed, Tag("server_fixed")]
    | Annotated[ServerAdaptive, Tag("server_adaptive")]
    | Annotated[ClientFixed, Tag("client_fixed")]
    | Annotated[ClientAdaptive, Tag("client_adaptive")],
    by_strategy(
        "none",
        *("none", "server_fixed", "server_adaptive", "client_fixed", "client_adaptive"),
        beside="; record_dpsgd: {epsilon: 8} stands beside one of them",
    ),
]
