"""Tile choices of the Triton kernels, one line a chip and element size, and which line a device takes.

A line is fixed, not tuned at run time: the same input gives the same bits in every run. Chosen by the compiler's
resource report: no spilled register and shared memory within the chip's limit
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
        rows: of a tile of S; a power of two, as the next two.
        columns: of a tile of S.
        depth: of one step along the embedding width.
        warps: that share a tile.
        stages: steps whose loads are in flight at once.
        parts: pieces of columns that follow one another once a tile is multiplied, 1, 2, 4 or 8.
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
"""Columns of what the kernels read come in multiples of this. Otherwise tensor descriptors refuse most widths, and the
compiler, to which a number is a multiple of 16 or of nothing, makes pointers load element by element and spills."""

TILES: dict[tuple[str, int], Tiles] = {
    ("sm_80", 2): Tiles(128, 128, 64, 8, 3, 4),
    ("sm_80", 4): Tiles(128, 64, 32, 8, 3, 4, precision="tf32x3"),
    ("sm_90", 2): Tiles(128, 256, 64, 8, 3, 8, descriptors=True),
    ("sm_90", 4): Tiles(128, 128, 32, 8, 3, 4, descriptors=True, precision="tf32x3"),
    ("sm_100", 2): Tiles(128, 256, 64, 8, 3, 8, descriptors=True),
    # In one part: in more, the gradient or a plain call's sums spill.
    ("sm_100", 4): Tiles(128, 64, 32, 8, 3, descriptors=True, precision="tf32x3"),
    # Not compiled by the tests: no report of registers was looked at.
    ("amd", 2): Tiles(128, 128, 64, 8, 2, 2),
    ("amd", 4): Tiles(128, 128, 32, 8, 2, 2),
    # The interpreter on a CPU pays a fixed price a step, whatever its size.
    ("interpreter", 2): Tiles(128, 128, 128, 4, 1, 2),
    ("interpreter", 4): Tiles(128, 128, 128, 4, 1, 2),
    ("interpreter", 8): Tiles(128, 128, 128, 4, 1, 2),
}

GRADIENT_TILES: dict[tuple[str, int], Tiles] = {
    ("sm_90", 2): Tiles(128, 128, 64, 8, 4, 8, descriptors=True),
    ("sm_90", 4): Tiles(128, 64, 32, 8, 3, 4, descriptors=True, precision="tf32x3"),
    ("sm_100", 2): Tiles(128, 128, 64, 8, 4, 8, descriptors=True),
}
"""What the gradient's kernel takes instead: its epilogue holds more, and spills with the lines above."""


def chip(device: torch.device) -> str:
    """The table's name of a device: sm_90 and sm_100 by name, other NVIDIA chips from Ampere on as sm_80.

    Chips before (``older``) multiply neither bfloat16 nor TF32 on their tensor cores and have no line.
    """
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80" if major >= 8 else "older")


def choose(device: torch.device, dtype: torch.dtype) -> Tiles | None:
    """The line for a device and embeddings of this dtype; None where there is none: float64 on a GPU, old chips."""
    return TILES.get((chip(device), dtype.itemsize))


def choose_for_gradient(device: torch.device, dtype: torch.dtype) -> Tiles | None:
    """As `choose`, of the gradient's kernel."""
    line = chip(device), dtype.itemsize
    return GRADIENT_TILES.get(line, TILES.get(line))
