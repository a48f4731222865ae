"""Computes the patch embedding as one matrix product.

The Qwen families project patches by a Conv3d whose kernel is as large as its stride. Every patch meets the weights
once, so this is a linear map. Convolution libraries do not use that and are slower on a CPU (docs/lab_notes.md). The
parameters and their names stay the same, and so does the result up to rounding.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PatchProjection(nn.Module):
    """Replaces a Conv3d with kernel = stride that is applied to patches of exactly the kernel's size.

    Args:
        convolution: the layer to replace; its weight [O, C, T, P, P] and bias [O] are taken over.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """Patches [N, C, T, P, P] -> [N, O, 1, 1, 1]."""
        projected = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return projected[:, :, None, None, None]


def use_matrix_product(model: nn.Module) -> None:
    """Replaces every patch-embedding convolution of a model in place."""
    for name, module in list(model.named_modules()):
        projection = getattr(module, "proj", None)
        if name.endswith("patch_embed") and isinstance(projection, nn.Conv3d):
            assert projection.kernel_size == projection.stride
            module.proj = PatchProjection(projection)
