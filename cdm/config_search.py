"""The config's `search` section: which keys are tried with which values (layer 0)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cdm.config_types import Positive, Strict


class Choice(Strict):
    """Any of these values; a whole section may be one."""

    type: Literal["choice"]
    values: Annotated[list[Any], Field(min_length=1)]


class _Range(Strict):
    low: float
    high: float

    @model_validator(mode="after")
    def _low_below_high(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class Uniform(_Range):
    type: Literal["uniform"]
    step: Annotated[float, Field(gt=0)] | None = Field(None, description="only low, low + step, ... up to high")


class LogUniform(_Range):
    """Uniform in the logarithm."""

    type: Literal["loguniform"]
    low: Annotated[float, Field(gt=0)]


class Int(_Range):
    """Whole numbers from low to high, both included."""

    type: Literal["int"]
    low: int
    high: int
    step: Positive = 1


AnyDistribution = Annotated[Choice | Uniform | LogUniform | Int, Field(discriminator="type")]


class Search(Strict):
    """Trials of this config with other values at some keys."""

    space: Annotated[dict[str, AnyDistribution], Field(min_length=1)] = Field(
        description="dotted keys of the config, as for --set"
    )
    trials: Positive | None = Field(None, description="how many; a grid has as many as it has points")
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    scheduler: Literal["asha", "none"] = Field("asha", description="asha stops trials that fall behind")
    grace_steps: Positive | None = Field(None, description="steps that asha leaves each trial; default: a quarter")
    metric: str = Field("validation_bits_per_byte", description="a figure of the validation")
    mode: Literal["min", "max"] = "min"
    seeds: Positive = Field(1, description="runs a trial, each with another order of the data; the mean counts")
    max_concurrent: Positive = Field(1, description="trials at once; each takes the workers of resources.student")

    @model_validator(mode="after")
    def _count_is_known(self) -> Search:
        if (self.searcher == "grid") == (self.trials is not None):
            raise ValueError("a grid takes no `trials`" if self.trials else f"{self.searcher} needs `trials`")
        if self.scheduler == "none" and self.grace_steps is not None:
            raise ValueError("grace_steps is asha's; the scheduler is none")
        return self
