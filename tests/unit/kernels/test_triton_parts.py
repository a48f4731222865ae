"""The pieces into which the Triton kernels cut a tile's columns, as the chips' lines have them, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mmemb.kernels.triton import tiles as _tiles
from tests.unit.kernels.cases import arguments, error, grads, oracle, unit_rows
from tests.unit.kernels.interpreted import interpreter

OPTIONS = {"ids", "margin", "weight", "positive"}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    with interpreter() as run:
        yield run


def in_parts(parts: int, query: Tensor, candidate: Tensor, **how: Any) -> tuple[Tensor, ...]:
    """Loss and gradients where the interpreter's line has so many parts."""
    line = ("interpreter", query.element_size())
    with patch.dict(_tiles.TILES, {line: replace(_tiles.TILES[line], parts=parts)}):
        return tuple(grads(query, candidate, temperature=0.1, engine="triton", **how))


@pytest.mark.parametrize("parts", sorted({tiles.parts for tiles in (_tiles.TILES | _tiles.GRADIENT_TILES).values()}))
@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("options", [set(), OPTIONS], ids=["plain", "options"])
def test_any_number_of_parts_gives_the_same(
    interpreted: Callable[..., Any], parts: int, symmetric: bool, options: set[str]
) -> None:
    query, candidate = unit_rows(37, 24, torch.float32), unit_rows(150, 24, torch.float32)
    how = arguments(options, (37, 150, 24)) | {"symmetric": symmetric}
    found = interpreted(in_parts, parts, query, candidate, **how)
    expected = oracle(query, candidate, float(torch.tensor(0.1)), **how)
    for value, wanted in zip(found, expected, strict=True):
        assert error(value, wanted) < 2e-5
