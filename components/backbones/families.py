"""Where the families of image-text-to-text models differ, in one small table.

Everything else goes through the auto classes of the transformers library. A family is found by its config's
``model_type``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What the adapter must know of a family.

    Attributes:
        pictures: how a picture becomes tensors and tokens: ``qwen`` (any size, see `pictures.QwenPictures`) or
            ``idefics`` (fixed tiles, see `pictures.IdeficsPictures`).
        positions: ``mrope``, three position ids a token (time, height, width; arXiv 2409.12191), or ``plain``, one.
        vision: prefixes of the parameters of the picture encoder and its projection.
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
