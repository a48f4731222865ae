"""Decides which parts of a backbone learn and how many bits hold the rest: LoRA, frozen parts, quantisation.

peft and bitsandbytes are imported only where they are used. Together they take seconds to import, and most runs need
neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

Quantization = Literal["none", "nf4", "int8"]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on the text decoder (LoRA, arXiv 2106.09685), made by peft; the base is frozen.

    Attributes:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability that an adapter's input is dropped.
        targets: names of the linear layers that get an adapter.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = _PROJECTIONS


def quantization_config(quantization: Quantization, *, compute_dtype: torch.dtype, skip: Sequence[str]) -> Any:
    """The library's bitsandbytes config, or None. The modules in ``skip`` and the head stay in full precision."""
    if quantization == "none":
        return None
    kept = [*skip, "lm_head"]
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype, llm_int8_skip_modules=kept
    )


def add_lora(model: Any, settings: LoraSettings, *, exclude: Sequence[str], new_tokens: Sequence[int]) -> None:
    """Freezes the model and adds adapters to its decoder. The rows of newly added tokens learn too."""
    from peft import LoraConfig

    tables = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    model.add_adapter(
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
            exclude_modules="|".join(rf"{prefix}\..*" for prefix in exclude),
            trainable_token_indices={table: list(new_tokens) for table in tables} if new_tokens else None,
        )
    )


def freeze(model: nn.Module, prefixes: Sequence[str], *, vision: Sequence[str]) -> None:
    """Stops the gradients of parameters whose names start with a prefix; ``vision`` is the family's picture encoder.

    Raises:
        ValueError: no parameter starts with a prefix.
    """
    for prefix in prefixes:
        wanted = tuple(vision) if prefix == "vision" else (prefix,)
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(wanted)]
        if not found:
            parts = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
            raise ValueError(
                f"frozen part {prefix!r}: no parameter name starts with it; choose from vision, {', '.join(parts)}"
            )
        for parameter in found:
            parameter.requires_grad_(False)


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """Stops bitsandbytes from packing 4-bit weights again at the first evaluation on a CPU with AVX512-BF16.

    Weights that are packed again pass no gradient, so a validation would end training. They also need widths that are
    multiples of 64.
    """
    if not getattr(model, "is_quantized", False):
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def merged(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Adds the adapters to the weights while the context lasts; yields the parameters by the plain model's names.

    Afterwards the weights are what they were, bit for bit. They are restored from copies, since subtracting would
    round.
    """
    if not model._hf_peft_config_loaded:
        yield model.state_dict()
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    copies = [weight.detach().to("cpu", copy=True) for weight in weights]
    model._hf_peft_config_loaded = False  # otherwise the library saves only the adapters
    try:
        for layer in layers:
            layer.merge()
        yield {
            _plain_name(name): value
            for name, value in model.state_dict().items()
            if ".lora_" not in name and "trainable_tokens_" not in name
        }
    finally:
        for layer, weight, copy in zip(layers, weights, copies, strict=True):
            layer.unmerge()
            weight.data.copy_(copy)
        model._hf_peft_config_loaded = True


def _plain_name(name: str) -> str:
    return name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
