"""What of a backbone learns, and in how many bits the rest is held: LoRA, frozen parts, quantisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig

Quantization = Literal["none", "nf4", "int8"]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the text decoder (LoRA, arXiv 2106.09685), through peft; the base is frozen.

    Attributes:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability that an adapter's input is dropped.
        targets: names of the linear layers that get one.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = _PROJECTIONS


def quantization_config(quantization: Quantization, *, compute_dtype: torch.dtype, skip: Sequence[str]) -> Any:
    """The library's config for bitsandbytes, or None. The named modules and the head stay in full precision."""
    if quantization == "none":
        return None
    kept = [*skip, "lm_head"]
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype, llm_int8_skip_modules=kept
    )


def add_lora(model: Any, settings: LoraSettings, *, exclude: Sequence[str], new_tokens: Sequence[int]) -> None:
    """Freezes the model and puts adapters on its decoder; the rows of newly added tokens learn too."""
    model.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
            exclude_modules="|".join(rf"{prefix}\..*" for prefix in exclude),
            trainable_token_indices=list(new_tokens) or None,
        )
    )


def freeze(model: nn.Module, prefixes: Sequence[str], *, vision: Sequence[str]) -> None:
    """Stops the gradients of parameters whose name starts with a prefix; ``vision`` is the family's picture encoder.

    Raises:
        ValueError: no parameter starts with a prefix.
    """
    for prefix in prefixes:
        wanted = tuple(vision) if prefix == "vision" else (prefix,)
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(wanted)]
        if not found:
            parts = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
            raise ValueError(
                f"frozen part {prefix!r}: no parameter's name starts so; there are: vision, {', '.join(parts)}"
            )
        for parameter in found:
            parameter.requires_grad_(False)


def merged_state(model: Any) -> dict[str, torch.Tensor]:
    """The model's parameters by their plain names, adapters added in; without adapters just its state."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return model.state_dict()
    merged = copy.deepcopy(model)
    for module in merged.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    plain = {}
    for name, value in merged.state_dict().items():
        if ".lora_" in name or ".token_adapter." in name:
            continue
        plain[name.replace(".base_layer.", ".")] = value
    return plain
