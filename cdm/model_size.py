"""How large a model is and how many operations it takes, from its configuration; no weights are read (layer 2).

Operations: 2 a weight and token for a product, 4 x layers x width a pair of tokens of one document for attention
(causality saves none: PaLM, arXiv 2204.02311, appendix B). The head is a product for the rows that are asked for alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers  # models cost seconds to import: they are named where they are used

from cdm.config_models import Pretrain, Pretrained, Student
from cdm.models import pretrain_config


@dataclass(frozen=True)
class ModelSize:
    """weights: all of them; body: without embeddings and head; head: vocabulary x width, whether tied or not."""

    weights: int
    body: int
    head: int
    layers: int
    width: int

    @classmethod
    def of(cls, config: transformers.PretrainedConfig) -> ModelSize:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        weights = sum(p.numel() for p in model.parameters())
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        outside = embedding.numel() + (0 if head is embedding else head.numel())
        text = config.get_text_config()
        return cls(weights, weights - outside, head.numel(), text.num_hidden_layers, text.hidden_size)

    def scoring(self, work: Work) -> float:
        """Operations of a forward pass."""
        return 2.0 * (self.body * work.tokens + self.head * work.rows) + 4.0 * self.layers * self.width * work.pairs

    def training(self, work: Work, *, frozen: bool = False, recomputed: bool = False) -> float:
        """Operations of forward and backward: three products a weight, two where weights are frozen (their input still
        has a gradient); `recomputed`: the blocks' forward once more (activation checkpointing).
        """
        products = 2.0 if frozen else 3.0
        again = 2.0 * self.body * work.tokens + 4.0 * self.layers * self.width * work.pairs if recomputed else 0.0
        body = 2.0 * products * (self.body * work.tokens + self.head * work.rows)
        return body + 12.0 * self.layers * self.width * work.pairs + again


@dataclass(frozen=True)
class Work:
    """Tokens, pairs of tokens of one document (the sum of squared lengths), and rows that go through the head."""

    tokens: float
    pairs: float
    rows: float

    def __mul__(self, times: float) -> Work:
        return Work(self.tokens * times, self.pairs * times, self.rows * times)


def model_config(model: Pretrain | Pretrained) -> transformers.PretrainedConfig:
    """A model's configuration: the hub's or the folder's, or that of one that is to be made.

    Raises ValueError naming the model where there is none to read.
    """
    if isinstance(model, Pretrain):
        return pretrain_config(model, model.tokenizer.vocab_size)
    try:
        return transformers.AutoConfig.from_pretrained(model.name, revision=model.revision, trust_remote_code=False)
    except OSError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{model.name}: its config.json cannot be read; name a folder that has it ({first})"
        ) from error


def training_flops(size: ModelSize, work: Work, section: Student) -> float:
    """Operations of training on `work` as the section says. Adapters' own few are not counted."""
    return size.training(work, frozen=section.lora is not None, recomputed=section.activation_checkpointing)
