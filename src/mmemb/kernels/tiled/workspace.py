"""The large buffers of the tiled engine, kept on the CPU for the next call that takes the same.

A buffer of tens of megabytes that is allocated anew is mapped and cleared by the system page by page as it is first
written: 3 to 5 % of a call's time at 8192 x 256 on two cores of a Xeon. Allocators of other devices keep what they
freed by themselves.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    """What the last call of this thread left: bytes, a tensor a buffer."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []


_kept = _Kept()


class Workspace:
    """The buffers of one call; with those that are still kept at most ``most_bytes``, unless it takes more itself."""

    def __init__(self, most_bytes: int) -> None:
        self._taken: list[Tensor] = []
        if sum(map(len, _kept.buffers)) > most_bytes:
            release_workspace()

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of the dtype and device of ``like``, this call's until `keep`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        sizes = list(map(len, _kept.buffers))
        if size in sizes:
            buffer = _kept.buffers.pop(sizes.index(size))
        else:
            release_workspace()
            with torch.inference_mode(False):  # what is made inside could not be written outside
                buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        self._taken.append(buffer)
        return buffer.view(like.dtype).view(shape)

    def keep(self) -> None:
        """The call has ended: its buffers are for the next one, others that were kept are freed."""
        _kept.buffers, self._taken = self._taken, []


def release_workspace() -> None:
    """Frees the buffers that the tiled engine kept from this thread's last call; the next call makes its own."""
    _kept.buffers = []
