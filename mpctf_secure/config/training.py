"""Local training: what the run proposes, and what a site may choose within the bounds of the contract."""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mpctf_secure.config.base import Frozen, Wire
from mpctf_secure.config.strategies import Count
from mpctf_secure.errors import UsageError

Rate = Annotated[float, Field(gt=0, le=1)]
Send = Literal["last", "best"]
Length = Annotated[int, Field(ge=8, lt=2**31)]


class Choice(Wire):
    """What one site trains with instead of the run's defaults, nothing where it keeps them: the body of `accept`."""

    learning_rate: Rate | None = None
    batch_size: Count | None = None
    local_epochs: Count | None = None
    max_length: Length | None = None

    def chosen(self) -> dict[str, float]:
        """The fields that are set."""
        return self.model_dump(exclude_none=True)


class Bounds(Frozen):
    """[least, most] that a site may choose; a field without bounds is the same for all."""

    learning_rate: tuple[Rate, Rate] | None = None
    batch_size: tuple[Count, Count] | None = None
    local_epochs: tuple[Count, Count] | None = None
    max_length: tuple[Length, Length] | None = None


class Training(Frozen):
    """Local training in a round."""

    learning_rate: Rate = 1e-3
    batch_size: Count = 8
    local_epochs: Count = 1
    max_length: Length = 512
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The share of each site's rows that it never trains on but measures adapters with, in every round; the sum of the
    sites' losses on them is told."""
    send: Send = "last"
    """The adapter after the round's last step, or that with the lowest validation loss at four points of the round."""
    bounds: Bounds = Bounds()

    @field_validator("send")
    @classmethod
    def _best_by_held_out_rows(cls, send: str, info: ValidationInfo) -> str:
        if send == "best" and info.data.get("validation") == 0:
            raise ValueError("best needs training.validation above 0")
        return send

    @model_validator(mode="after")
    def _defaults_are_inside(self) -> Self:
        for name in Choice.model_fields:
            least, most = self.range_of(name)
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is outside its bounds [{least}, {most}]")
        return self

    def range_of(self, name: str) -> tuple[float, float]:
        """The bounds of a field: its default alone where none are named."""
        fixed = (getattr(self, name), getattr(self, name))
        return getattr(self.bounds, name) or fixed

    def shown_range(self, name: str) -> str:
        """The same for people."""
        least, most = self.range_of(name)
        return f"{least:.12g}" if least == most else f"{least:.12g} to {most:.12g}"

    def with_choice(self, choice: Choice) -> "Training":
        """What a site with this choice trains with; UsageError names the field that is out of bounds."""
        for name, value in choice.chosen().items():
            least, most = self.range_of(name)
            if not least <= value <= most:
                raise UsageError(
                    f"training.{name}: {value} in the site file, and the run file allows {self.shown_range(name)}",
                    hint=f"change it, or agree on training.bounds.{name} of the run file",
                )
        return self.model_copy(update=choice.chosen())
