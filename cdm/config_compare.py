"""The config's `compare` section: which ways of teaching the same student are held against each other (layer 0)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from cdm.config_types import Positive, Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Compare(Strict):
    """Each variant is this config with other values at some keys; each is trained once a seed."""

    variants: Annotated[dict[Name, dict[str, Any]], Field(min_length=2)] = Field(
        description="name -> dotted keys, as for --set, and their values"
    )
    baseline: str = Field("sft", description="the variant from which gaps and differences are counted")
    seeds: Annotated[int, Field(ge=2)] = Field(3, description="each with other initial weights and another order")
    max_concurrent: Positive = Field(1, description="students at once; each takes the workers of resources.student")

    @model_validator(mode="after")
    def _baseline_is_a_variant(self) -> Compare:
        if self.baseline not in self.variants:
            raise ValueError(f"baseline {self.baseline!r} is none of the variants: {', '.join(self.variants)}")
        return self
