"""The large buffers of the tiled engine, kept on the CPU for the next call with the same sizes.

The system maps and clears a new buffer of tens of megabytes page by page on the first write. That took 3 to 5 % of a
call's time at 8192 x 256 on two cores of a Xeon. Allocators of other devices keep freed memory by themselves.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    """The buffers that the last call of this thread left, one tensor of bytes each."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []


_kept = _Kept()


class Workspace:
    """The buffers of one call.

    Args:
        most_bytes: maximum size of these and of the kept buffers together, unless the call itself takes more.
    """

    def __init__(self, most_bytes: int) -> None:
        self._taken: list[Tensor] = []
        if sum(map(len, _kept.buffers)) > most_bytes:
            release_workspace()

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Returns an uninitialised tensor with the dtype and device of ``like``, for this call alone until `keep`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape) * like.element_size()
        sizes = list(map(len, _kept.buffers))
        if size in sizes:
            buffer = _kept.buffers.pop(sizes.index(size))
        else:
            release_workspace()
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside
                buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        self._taken.append(buffer)
        return buffer.view(like.dtype).view(shape)

    def keep(self) -> None:
        """Ends the call: keeps its buffers for the next one and frees those that were kept before."""
        _kept.buffers, self._taken = self._taken, []


def release_workspace() -> None:
    """Frees the buffers that the tiled engine kept from this thread's last call. The next call makes new ones."""
    _kept.buffers = []
