"""Turns pictures into tensors and placeholder text, with one class per method.

Cost: pictures whose sides already fit are cut into patches together by our own code. The others pass through the
library's processor.

Legend: P patches of all pictures, p patch side, m patches per token along a side, h and w patches of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image as PILImage
from torch import Tensor

Shape = tuple[int, int]
"""Rows and columns of a picture, in patches or tiles. They decide the tokens of the picture."""


class Pictures(Protocol):
    """Turns pictures into the model's tensors and gives the text that represents each picture in the prompt."""

    def encode(self, pictures: Sequence[PILImage]) -> tuple[dict[str, Tensor], list[Shape]]:
        """Tensors of all pictures in order, and the shape of each."""

    def placeholder(self, shape: Shape) -> str:
        """The text that represents a picture of this shape in the prompt."""

    def grid(self, shape: Shape) -> Shape:
        """Rows and columns of tokens of a picture of this shape (for three-part position ids)."""


class QwenPictures:
    """Pictures of any size as one list of patches: ``pixel_values`` [P, 3*2*p*p] and ``image_grid_thw`` [pictures, 3].

    Args:
        image_processor: the library's image processor, which holds sizes, mean and deviation.
        image_token: text of the placeholder token.
    """

    def __init__(self, image_processor: Any, image_token: str) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        self.image_processor = image_processor
        self.image_token = image_token
        self.patch, self.merge = int(image_processor.patch_size), int(image_processor.merge_size)
        self.temporal = int(image_processor.temporal_patch_size)
        mean = np.asarray(image_processor.image_mean, dtype=np.float64)
        std = np.asarray(image_processor.image_std, dtype=np.float64)
        self._scale = (image_processor.rescale_factor / std).astype(np.float32)[:, None, None]
        self._shift = (mean / std).astype(np.float32)[:, None, None]
        self._smart_resize = smart_resize

    def encode(self, pictures: Sequence[PILImage]) -> tuple[dict[str, Tensor], list[Shape]]:
        """Tensors of all pictures in order, and the patch grid (h, w) of each."""
        by_size: dict[tuple[int, int], list[int]] = {}
        odd: dict[int, tuple[NDArray[np.float32], Shape]] = {}
        shapes: list[Shape] = []
        for index, picture in enumerate(pictures):
            size = picture.size
            if self._fits(size):
                by_size.setdefault(size, []).append(index)
                shapes.append((size[1] // self.patch, size[0] // self.patch))
            else:
                odd[index] = self._by_library(picture)
                shapes.append(odd[index][1])
        starts = np.concatenate([[0], np.cumsum([h * w for h, w in shapes])]).astype(int)
        width = 3 * self.temporal * self.patch**2
        patches = np.empty((starts[-1], width), dtype=np.float32)
        for rows in by_size.values():
            block = self.patchify(np.stack([np.asarray(pictures[row]) for row in rows]))
            for row, part in zip(rows, block, strict=True):
                patches[starts[row] : starts[row + 1]] = part
        for row, (part, _) in odd.items():
            patches[starts[row] : starts[row + 1]] = part
        grid = torch.tensor([(1, h, w) for h, w in shapes], dtype=torch.int64)
        return {"pixel_values": torch.from_numpy(patches), "image_grid_thw": grid}, shapes

    def patchify(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Cuts equal-sized pictures [N, H, W, 3] uint8 into patches [N, h*w, 3*2*p*p] float32, as the library does."""
        number, height, width, _ = pictures.shape
        p, m = self.patch, self.merge
        pixels = pictures.transpose(0, 3, 1, 2).astype(np.float32) * self._scale - self._shift
        cut = pixels.reshape(number, 3, height // p // m, m, p, width // p // m, m, p)
        cut = cut.transpose(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]  # N, rows, columns, m, m, 3, time, p, p
        cut = np.broadcast_to(cut, (*cut.shape[:6], self.temporal, p, p))  # a still picture repeats along time
        return cut.reshape(number, (height // p) * (width // p), -1)

    def placeholder(self, shape: Shape) -> str:
        """One placeholder token for every merged m x m block."""
        rows, columns = self.grid(shape)
        return self.image_token * (rows * columns)

    def grid(self, shape: Shape) -> Shape:
        """Rows and columns of tokens."""
        return shape[0] // self.merge, shape[1] // self.merge

    def _fits(self, size: tuple[int, int]) -> bool:
        """Whether the library would leave a picture of this (width, height) as it is."""
        factor = self.patch * self.merge
        if size[0] % factor or size[1] % factor:
            return False
        limits = self.image_processor.size
        return int(limits["shortest_edge"]) <= size[0] * size[1] <= int(limits["longest_edge"])

    def _by_library(self, picture: PILImage) -> tuple[NDArray[np.float32], Shape]:
        out = self.image_processor(images=[picture], return_tensors="np")
        _, height, width = (int(value) for value in np.asarray(out["image_grid_thw"])[0])
        return np.asarray(out["pixel_values"], dtype=np.float32), (height, width)


class IdeficsPictures:
    """Pictures cut into tiles of one size by the library: ``pixel_values`` [1, tiles, 3, S, S] and its mask.

    Args:
        image_processor: the library's image processor.
        image_token: text of the placeholder token.
        tokens_per_tile: number of tokens that the model makes from a tile.
    """

    def __init__(self, image_processor: Any, image_token: str, tokens_per_tile: int) -> None:
        self.image_processor = image_processor
        self.image_token = image_token
        self.tokens_per_tile = tokens_per_tile

    def encode(self, pictures: Sequence[PILImage]) -> tuple[dict[str, Tensor], list[Shape]]:
        """Tensors of all pictures in order, and the tile grid (rows, columns) of each.

        The tensors are laid out as one row, since the model ignores row borders.
        """
        out = self.image_processor(images=[list(pictures)], return_row_col_info=True, return_tensors="pt")
        tensors = {"pixel_values": out["pixel_values"], "pixel_attention_mask": out["pixel_attention_mask"]}
        rows, columns = out["rows"][0], out["cols"][0]
        return tensors, [(int(r), int(c)) for r, c in zip(rows, columns, strict=True)]

    def placeholder(self, shape: Shape) -> str:
        """Every tile's tokens with its row and column, then the tokens of the whole picture."""
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        return get_image_prompt_string(
            *shape,
            self.tokens_per_tile,
            fake_token_around_image="<fake_token_around_image>",
            image_token=self.image_token,
            global_image_token="<global-img>",
        )

    def grid(self, shape: Shape) -> Shape:
        """Not used: these models count positions one by one."""
        raise NotImplementedError
