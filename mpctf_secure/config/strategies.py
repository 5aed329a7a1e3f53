"""Data and aggregation strategies: a model each, chosen by `strategy`, so that a field of another one is an error."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mpctf_secure.config.base import Frozen

MOST_COUNT = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
Factors = Literal["both", "alternating", "freeze_a"]
_Rate = Annotated[float, Field(gt=0, le=10)]
_Decay = Annotated[float, Field(ge=0, lt=1)]


def _chosen(default: str) -> Callable[[Any], Any]:
    def strategy(value: Any) -> Any:
        name = value.get("strategy", default) if isinstance(value, dict) else getattr(value, "strategy", None)
        return name if isinstance(name, str) else None

    return strategy


def by_strategy(default: str, *names: str, beside: str = "") -> Discriminator:
    """A union's tag is the field `strategy`; without it the default's. `beside`: what may be taken for one."""
    return Discriminator(
        _chosen(default),
        custom_error_type="strategy",
        custom_error_message=f"strategy is not one of {', '.join(names)}{beside}",
    )


class FixedSize(Frozen):
    """min(size, |D_k|) rows a round."""

    strategy: Literal["fixed_size"] = "fixed_size"
    size: Count = 50


class Percentage(Frozen):
    """⌊share·|D_k|⌋ rows a round, at least 1."""

    strategy: Literal["percentage"] = "percentage"
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    weight_cap: Count = 1000
    """Rows above which a participant weighs no more: nobody knows the others' sizes."""


class MaxVolume(Frozen):
    """⌈max_j |D_j| / rounds⌉ rows a round, the same for all; sites tell their sizes, rounded up."""

    strategy: Literal["max_volume"] = "max_volume"


class MemoryAware(Frozen):
    """A share of Σ|D_j| / rounds in proportion to |D_k|·M_k, rows times memory; round 1 adds these up under masks."""

    strategy: Literal["memory_aware"] = "memory_aware"
    weight_cap: Count = 1000
    """As with percentage; it also bounds what a false size may do."""


Data = Annotated[
    Annotated[FixedSize, Tag("fixed_size")]
    | Annotated[Percentage, Tag("percentage")]
    | Annotated[MaxVolume, Tag("max_volume")]
    | Annotated[MemoryAware, Tag("memory_aware")],
    by_strategy("fixed_size", "fixed_size", "percentage", "max_volume", "memory_aware"),
]


class FedAvg(Frozen):
    """adapter + η·mean (McMahan et al. 2017)."""

    strategy: Literal["fedavg"] = "fedavg"
    lora: Factors = "both"
    """Which factors are trained and travel; `alternating`: B and A in turn, B first."""
    server_learning_rate: _Rate = 1.0


class FedProx(Frozen):
    """FedAvg, with μ/2·‖w − global‖² added to the local loss (Li et al. 2020)."""

    strategy: Literal["fedprox"] = "fedprox"
    lora: Factors = "both"
    server_learning_rate: _Rate = 1.0
    mu: Annotated[float, Field(ge=0, le=1000)] = 0.01


class FedAdam(Frozen):
    """Adaptive server steps (Reddi et al. 2021, algorithm 2)."""

    strategy: Literal["fedadam"] = "fedadam"
    lora: Factors = "both"
    server_learning_rate: _Rate = 0.001
    beta1: _Decay = 0.9
    beta2: _Decay = 0.99
    tau: Annotated[float, Field(ge=1e-8, le=1)] = 1e-3


class FedYogi(FedAdam):
    """The same with Yogi's second moment."""

    strategy: Literal["fedyogi"] = "fedyogi"  # type: ignore[assignment]


class FedAdagrad(Frozen):
    """The same with Adagrad's, which grows without end."""

    strategy: Literal["fedadagrad"] = "fedadagrad"
    lora: Factors = "both"
    server_learning_rate: _Rate = 0.1
    beta1: _Decay = 0.0
    tau: Annotated[float, Field(ge=1e-8, le=1)] = 1e-3


Adaptive = FedAdam | FedYogi | FedAdagrad
Aggregation = Annotated[
    Annotated[FedAvg, Tag("fedavg")]
    | Annotated[FedProx, Tag("fedprox")]
    | Annotated[FedAdam, Tag("fedadam")]
    | Annotated[FedYogi, Tag("fedyogi")]
    | Annotated[FedAdagrad, Tag("fedadagrad")],
    by_strategy("fedavg", "fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad"),
]
