"""Small checks that several parts of the loss share: numbers, flags and dtypes."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an int. True and False do not count."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, numpy's included. True and False do not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_choices(*, dtypes: Mapping[str, torch.dtype | None] | None = None, **flags: bool) -> None:
    """Checks flags and dtypes by name.

    Args:
        dtypes: each a floating point dtype, or None for the input's dtype.
        flags: each True or False.

    Raises:
        ValueError: a flag is not a bool, or a dtype is not floating point.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} is {flag!r}; allowed are True and False")
    for name, dtype in (dtypes or {}).items():
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"{name} is {dtype!r}; allowed are floating point dtypes, and None for the input's")


def check_plain(name: str, tensor: object) -> None:
    """Checks that an argument is a tensor with strides.

    Raises:
        ValueError: it is not a tensor, or its layout is not `torch.strided`.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; allowed is a tensor, which torch.as_tensor makes")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}; allowed is torch.strided, which its to_dense() gives")
