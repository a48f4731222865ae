"""Lists the differences between the families of image-text-to-text models in one small table.

Everything else goes through the auto classes of the transformers library. The ``model_type`` of a config decides its
family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What the adapter must know about a family.

    Attributes:
        pictures: how a picture becomes tensors and tokens: ``qwen`` (any size, see `pictures.QwenPictures`) or
            ``idefics`` (fixed tiles, see `pictures.IdeficsPictures`).
        positions: ``mrope`` for three position ids per token (time, height, width; arXiv 2409.12191), or ``plain`` for
            one.
        vision: prefixes of the parameter names of the picture encoder and its projection.
    """

    pictures: Literal["qwen", "idefics"]
    positions: Literal["mrope", "plain"]
    vision: tuple[str, ...]


_QWEN = Family(pictures="qwen", positions="mrope", vision=("model.visual",))
_IDEFICS = Family(pictures="idefics", positions="plain", vision=("model.vision_model", "model.connector"))

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "smolvlm": _IDEFICS,
    "idefics3": _IDEFICS,
}
