"""Every Triton kernel compiles for every chip of the table, spills no register and fits the chip's shared memory.

The compiler needs no GPU; its resource report is read from the binary.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmemb.kernels.triton import kernels
from mmemb.kernels.triton.launch import GROUP
from mmemb.kernels.triton.tiles import GRADIENT_TILES, TILES, Tiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a block may use, by a line's capability; that of 8.0 is for 8.6, 8.9 and 12.0 too, with 99 KiB (8.0 has 163)."""

WIDEST: dict[str, tuple[Any, dict[str, bool]]] = {
    "sums": (
        kernels.sums_kernel,
        {"IDS": True, "LIMITED": True, "BOUNDED": False, "COLUMNS": True, "EXPONENTIALS": False},
    ),
    "bounded sums": (
        kernels.sums_kernel,
        {"IDS": True, "LIMITED": True, "BOUNDED": True, "COLUMNS": True, "EXPONENTIALS": False},
    ),
    "exponentials": (
        kernels.sums_kernel,
        {"IDS": True, "LIMITED": True, "BOUNDED": True, "COLUMNS": False, "EXPONENTIALS": True},
    ),
    "gradient": (kernels.gradient_kernel, {"IDS": True, "LIMITED": True, "COLUMNS": True}),
}
"""Each large kernel with all options that take registers."""


PLAIN: dict[str, tuple[Any, dict[str, bool]]] = {
    "plain sums": (kernels.sums_kernel, dict.fromkeys(WIDEST["sums"][1], False)),
    "plain exponentials": (
        kernels.sums_kernel,
        dict.fromkeys(WIDEST["sums"][1], False) | {"BOUNDED": True, "EXPONENTIALS": True},
    ),
    "plain column sums": (
        kernels.sums_kernel,
        dict.fromkeys(WIDEST["sums"][1], False) | {"BOUNDED": True, "COLUMNS": True},
    ),
    "plain gradient": (kernels.gradient_kernel, dict.fromkeys(WIDEST["gradient"][1], False)),
    "plain symmetric gradient": (
        kernels.gradient_kernel,
        dict.fromkeys(WIDEST["gradient"][1], False) | {"COLUMNS": True},
    ),
}
"""The same of a call without options, in one direction and symmetric."""

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Triton's name of an embedding's dtype -> its size."""


def compiled(
    kernel: Any, flags: dict[str, Any], capability: int, element: str, tiles: Tiles, *, multiples: bool = False
) -> Any:
    """The kernel as the engine launches it: pointers, the width and a slab's rows are multiples of 16.

    With ``multiples`` so are all other numbers, which a launch tells the compiler too; else none is.
    """
    shapes = {"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.depth, "PARTS": tiles.parts, "GROUP": GROUP}
    ways = {"DESCRIPTORS": tiles.descriptors, "WIDEN": False, "PRECISION": tiles.precision}
    constants = {key: value for key, value in (shapes | ways | flags).items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        block = tiles.rows if name == "query" else tiles.columns
        if name in constants:
            kind = "constexpr"
        elif name in ("query", "candidate"):
            large = "GROUP" in constants and tiles.descriptors
            kind = f"tensordesc<{element}[{block}, {tiles.depth}]>" if large else f"*{element}"
        elif name in ("exponentials", "gradient", "matrix"):
            kind = f"*{element}"
        elif name in ("positive", "query_id", "candidate_id"):
            kind = "*i64"
        else:
            kind = "i32" if name.startswith(("first_", "last_")) or name.endswith(("stride", "width")) else "*fp32"
        signature[name] = kind
        if kind.startswith("*") or name in ("width", "stride", "exponential_stride") or (multiples and kind == "i32"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(binary: bytes, folder: Path) -> dict[str, int]:
    """The compiler's resource report: registers a thread, bytes of stack (where spilled registers go)."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def check(name: str, capability: int, element: str, folder: Path, *, multiples: bool) -> None:
    kernel, flags = (WIDEST | PLAIN)[name]
    line, size = f"sm_{capability}", BYTES[element]
    tiles = TILES[line, size]
    if kernel is kernels.gradient_kernel:
        tiles = GRADIENT_TILES.get((line, size), tiles)
    found = compiled(kernel, flags, capability, element, tiles, multiples=multiples)
    used = report(found.asm["cubin"], folder)
    assert used["stack"] == 0, f"{name} spills: {used}"
    assert found.metadata.shared <= SHARED_BYTES[capability]
    assert found.metadata.global_scratch_size == 0  # else a launch needs an allocator


CHIPS = [(capability, element) for capability in SHARED_BYTES for element in ("bf16", "fp16", "fp32")]


@pytest.mark.parametrize(("capability", "element"), CHIPS)
@pytest.mark.parametrize("name", [*WIDEST, *PLAIN])
@pytest.mark.parametrize("multiples", [True, False], ids=["sizes of 16", "any sizes"])
def test_kernels_fit(name: str, capability: int, element: str, multiples: bool, tmp_path: Path) -> None:
    check(name, capability, element, tmp_path, multiples=multiples)


@pytest.mark.parametrize(("capability", "element"), CHIPS)
def test_the_small_kernel_fits(capability: int, element: str, tmp_path: Path) -> None:
    found = compiled(kernels.own_kernel, {"BM": 32, "BK": 128}, capability, element, TILES["sm_80", BYTES[element]])
    assert report(found.asm["cubin"], tmp_path)["stack"] == 0


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    # The whole tile's epilogue at once takes more registers than a thread has.
    kernel, flags = WIDEST["gradient"]
    greedy = Tiles(128, 256, 64, 8, 3)
    assert report(compiled(kernel, flags, 80, "bf16", greedy).asm["cubin"], tmp_path)["stack"] > 0
