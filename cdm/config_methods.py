"""The config's methods: what is learnt from the teachers, and how (layer 0)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cdm.config_types import Positive, Share, Strict


class Sft(Strict):
    """Cross-entropy alone."""

    type: Literal["sft"]


class Distilled(Strict):
    """Cross-entropy and the teachers' terms: L = alpha * CE + (1 - alpha) * KD."""

    alpha: Share = Field(0.5, description="weight of cross-entropy; 1 - alpha is the teachers'")
    align: Literal["exact", "dtw", "dtw_unweighted"] = Field(
        "exact", description="groups: equal bytes, or warping by spelling, weighted by both models' entropies or not"
    )


class Tempered(Distilled):
    temperature: Annotated[float, Field(gt=0)] = 1.0


class SameTokenizer(Tempered):
    """Over the teacher's top-k and the rest; only for a teacher with the student's own tokenizer."""

    align: Literal["exact"] = "exact"


class Kl(SameTokenizer):
    type: Literal["kl"]


class ReverseKl(SameTokenizer):
    type: Literal["reverse_kl"]


class Js(SameTokenizer):
    type: Literal["js"]
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5


class SkewKl(SameTokenizer):
    type: Literal["skew_kl"]
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Uld(Tempered):
    """Sorted probabilities, rows paired by position (arXiv 2402.12030)."""

    type: Literal["uld"]


class MultilevelOt(Tempered):
    """Sorted transport of tokens and sequences (arXiv 2412.14528)."""

    type: Literal["multilevel_ot"]
    temperature: Annotated[float, Field(gt=0)] = 2.0
    log_weight: Annotated[float, Field(ge=0)] = 0.1
    sequence_weight: Annotated[float, Field(ge=0)] = 0.1
    blur: Annotated[float, Field(gt=0)] = 0.1
    iterations: Positive = 20


class MinEdit(Tempered):
    """A static map to the nearest spelling, one-hot targets elsewhere (FuseLLM, arXiv 2401.10491)."""

    type: Literal["min_edit"]
    align: Literal["exact", "dtw", "dtw_unweighted"] = "dtw_unweighted"
    threshold: Share = Field(0.3, description="largest edit distance of the static map")
    protect: bool = True


class Alm(Distilled):
    """Binary cross-entropy of the probabilities of each group's text (arXiv 2503.20083)."""

    type: Literal["alm"]
    scale: Annotated[float, Field(gt=0)] = 100.0


class Gold(Tempered):
    """Jensen-Shannon on the shared vocabulary, sorted differences on the rest (Hugging Face TRL)."""

    type: Literal["gold"]
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5


class StrictKl(Tempered):
    """Only 1:1 groups and the shared vocabulary (arXiv 2610.08448)."""

    type: Literal["strict"]
    top_k: Positive = 16
    reverse: bool = True


class Cdm(Tempered):
    """Contextual Dynamic Mapping (docs/method.md, sections 2-4)."""

    type: Literal["cdm"]
    threshold: Share = Field(0.3, description="theta: largest edit distance of a dynamic mapping")
    protect: bool = Field(True, description="numbers, operators and white space match exactly or not at all")
    unmatched: Literal["spelling", "prefix"] = Field(
        "spelling",
        description="a token without an exact twin maps to a near spelling, or to a token that it begins with",
    )
    observed: bool = Field(False, description="the text's own two tokens at a group's start map to one another")
    top_k: Positive = Field(100, description="live candidates of the student, and of the teacher's stored ones")
    tail: Literal["renormalise", "residual"] = "renormalise"
    dual: bool = True
    rows: Literal["first", "mean"] = "first"


class PaperCdm(Cdm):
    """The same with the paper's own choices (arXiv 2502.11104) where they are merely different."""

    type: Literal["cdm_paper"]  # type: ignore[assignment]
    align: Literal["exact", "dtw", "dtw_unweighted"] = "dtw"
    protect: bool = False
    rows: Literal["first", "mean"] = "mean"


AnyMethod = Annotated[
    Sft | Kl | ReverseKl | Js | SkewKl | Uld | MultilevelOt | MinEdit | Alm | Gold | StrictKl | Cdm | PaperCdm,
    Field(discriminator="type"),
]


def label(method: AnyMethod) -> str:
    """A method by name, with the options that are not the defaults: two of one type stay apart."""
    default = type(method)(type=method.type)
    options = [f"{k}={v}" for k, v in method.model_dump().items() if v != getattr(default, k)]
    return ", ".join([method.type, *options])
