"""Triton's interpreter for the tests: a process of its own, since TRITON_INTERPRET counts when Triton is imported."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    if "coverage" in sys.modules:  # tracing would double the time of what is interpreted Python through and through
        tracer = sys.modules["coverage"].Coverage.current()
        if tracer is not None:
            tracer.stop()


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """``call(function, *args, **kwargs)`` runs a module's function on CPU tensors there and returns what it returns."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _start) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def on_cuda(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same on the GPU: tensors go there and come back. The library's float32 products are whole ones there."""

    def move(value: Any, device: str) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    try:
        found = function(*(move(x, "cuda") for x in args), **{key: move(x, "cuda") for key, x in kwargs.items()})
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if isinstance(found, tuple):
        return tuple(move(x, "cpu") for x in found)
    return move(found, "cpu")
