"""What of a student is trained: all weights, low-rank adapters beside them, all but the embeddings (layer 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cdm.config_models import Lora

ADAPTER = "default"


def adapt(model: Any, lora: Lora | None, freeze_embeddings: bool, *, seed: int) -> None:
    """Puts adapters into a causal LM and freezes what is not trained, in place. The same seed gives the same adapters.

    Raises ValueError where no linear layer has one of `lora.targets` for its name, or one of another kind has.
    """
    if lora is not None:
        from peft import LoraConfig, inject_adapter_in_model  # seconds to import

        options = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets or "all-linear",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(options, model, ADAPTER)
        _check_adapted(model)
    if freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)


def _check_adapted(model: Any) -> None:
    for name, layer in model.named_modules():
        base = getattr(layer, "base_layer", None)
        if base is not None and not isinstance(base, torch.nn.Linear):
            raise ValueError(f"student.lora.targets: {name} is a {type(base).__name__}; adapters go into linear layers")


def merged(weights: Mapping[str, torch.Tensor], lora: Lora | None) -> dict[str, torch.Tensor]:
    """Whole weights of a model with adapters, by the names of the model without them: W + alpha / rank * B A."""
    if lora is None:
        return dict(weights)
    out = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        layer, base, _ = name.rpartition(".base_layer.")
        if base and name.endswith(".weight"):
            a, b = (weights[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            value = value + lora.alpha / lora.rank * (b @ a)
        out[name.replace(".base_layer.", ".")] = value
    return out
