"""Tile sizes of the Triton kernels: a table with one line per chip and element size, and how a device finds its line.

The lines are fixed and not tuned at run time, so the same input gives the same bits in every run. They were chosen from
the compiler's resource report: no register spills, and shared memory is within the chip's limit
(`tests/unit/kernels/test_triton_compile.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["ieee", "tf32x3"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """One kernel configuration.

    Attributes:
        rows: rows of a tile of S; a power of two, like ``columns`` and ``depth``.
        columns: columns of a tile of S.
        depth: columns of the embeddings per step of a product.
        warps: warps that share a tile.
        stages: steps whose loads are in flight at once.
        parts: pieces of columns that are processed one after another once a tile is multiplied; 1, 2, 4 or 8.
        descriptors: load through tensor descriptors (the chip's copy engine).
        precision: how float32 products are made; ``tf32x3`` keeps 22 bits of each factor on the tensor cores.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1
    descriptors: bool = False
    precision: Precision = "ieee"


STEP = 16
"""The kernels read embeddings whose width is a multiple of this. Tensor descriptors refuse most other widths. The
compiler only distinguishes multiples of 16 from other numbers: for those it loads element by element and spills."""

TILES: dict[tuple[str, int], Tiles] = {
    ("sm_80", 2): Tiles(128, 128, 64, 8, 3, 4),
    ("sm_80", 4): Tiles(128, 64, 32, 8, 3, 4, precision="tf32x3"),
    ("sm_90", 2): Tiles(128, 256, 64, 8, 3, 8, descriptors=True),
    ("sm_90", 4): Tiles(128, 128, 32, 8, 3, 4, descriptors=True, precision="tf32x3"),
    ("sm_100", 2): Tiles(128, 256, 64, 8, 3, 8, descriptors=True),
    # In one part: with more, the gradient or the sums of a plain call spill.
    ("sm_100", 4): Tiles(128, 64, 32, 8, 3, descriptors=True, precision="tf32x3"),
    # The tests do not compile these lines, and no report of their registers was read.
    ("amd", 2): Tiles(128, 128, 64, 8, 2, 2),
    ("amd", 4): Tiles(128, 128, 32, 8, 2, 2),
    # The interpreter on a CPU takes a fixed time per step, whatever its size.
    ("interpreter", 2): Tiles(128, 128, 128, 4, 1, 2),
    ("interpreter", 4): Tiles(128, 128, 128, 4, 1, 2),
    ("interpreter", 8): Tiles(128, 128, 128, 4, 1, 2),
}

GRADIENT_TILES: dict[tuple[str, int], Tiles] = {
    ("sm_90", 2): Tiles(128, 128, 64, 8, 4, 8, descriptors=True),
    ("sm_90", 4): Tiles(128, 64, 32, 8, 3, 4, descriptors=True, precision="tf32x3"),
    ("sm_100", 2): Tiles(128, 128, 64, 8, 4, 8, descriptors=True),
}
"""Lines for the gradient's kernel. Its epilogue needs more registers and spills with the lines above."""


def chip(device: torch.device) -> str:
    """Returns the name of a device in the table: sm_90 and sm_100, and sm_80 for other NVIDIA chips since Ampere.

    Older chips (``older``) multiply neither bfloat16 nor TF32 on their tensor cores and have no line.
    """
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80" if major >= 8 else "older")


def choose(device: torch.device, dtype: torch.dtype) -> Tiles | None:
    """Returns the line for a device and dtype, or None: float64 on a GPU and old chips have no line."""
    return TILES.get((chip(device), dtype.itemsize))


def choose_for_gradient(device: torch.device, dtype: torch.dtype) -> Tiles | None:
    """Returns the line for the gradient's kernel, as `choose` does for the others."""
    line = chip(device), dtype.itemsize
    return GRADIENT_TILES.get(line, TILES.get(line))
