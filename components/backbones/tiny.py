"""The bundled small model: a Qwen3-VL of 2.3 million parameters, small enough to train on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .transformers import TransformersBackbone
from .tuning import LoraSettings

FOLDER = Path(__file__).with_name("tiny")
"""Folder with config, tokenizer, chat template, image processor and weights, made by ``tools/build_tiny.py``."""


class TinyBackbone(TransformersBackbone, name="tiny"):
    """The bundled small Qwen3-VL, pretrained on the bundled data; runs anywhere.

    A picture of 64 px takes 4 tokens and a scene of 128 px takes 16. Larger pictures are shrunk to an area of
    128 x 128 px.

    Args:
        weights: ``pretrained`` or ``random``.
        seed: seed of the random weights.
        frozen: parts that do not learn, by the beginning of their parameters' names; ``vision`` is the picture encoder.
        lora: low-rank adapters; everything else is then frozen.
        max_prompt_tokens: maximum number of tokens in a prompt, pictures included.
        max_rationale_tokens: maximum number of tokens in a rationale; a longer one is cut.
    """

    def __init__(
        self,
        *,
        weights: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        frozen: Sequence[str] = (),
        lora: LoraSettings | None = None,
        max_prompt_tokens: int = 512,
        max_rationale_tokens: int = 64,
    ) -> None:
        super().__init__(
            str(FOLDER),
            weights=weights,
            seed=seed,
            frozen=frozen,
            lora=lora,
            max_prompt_tokens=max_prompt_tokens,
            max_rationale_tokens=max_rationale_tokens,
        )
