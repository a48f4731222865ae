"""The large buffers of the tiled engine, kept from one call to the next on the CPU.

A buffer of tens of megabytes that is allocated anew is mapped and cleared by the system page by page as it is first
written: 3 to 5 % of a call's time at 8192 x 256 on two cores. Allocators of other devices keep what they freed by
themselves.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_thread = threading.local()


class Workspace:
    """The buffers of one call. Those of an earlier call in this thread are taken where they are large enough."""

    def __init__(self) -> None:
        self._taken: list[Tensor] = []

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of the dtype and device of ``like``, this call's until `keep`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        kept: list[Tensor] = getattr(_thread, "kept", [])
        fitting = [place for place, buffer in enumerate(kept) if buffer.numel() >= size]
        if fitting:
            buffer = kept.pop(min(fitting, key=lambda place: kept[place].numel()))
        else:
            with torch.inference_mode(False):  # what is made inside could not be written outside
                buffer = torch.empty(size, dtype=torch.uint8)
        self._taken.append(buffer)
        return buffer[:size].view(like.dtype).view(shape)

    def keep(self) -> None:
        """The call has ended: its buffers are for the next one, others that were kept are freed."""
        _thread.kept, self._taken = self._taken, []


def release_workspace() -> None:
    """Frees the buffers that the tiled engine kept from this thread's last call; the next call makes its own."""
    _thread.kept = []
