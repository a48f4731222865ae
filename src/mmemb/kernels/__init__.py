"""Compute kernels behind the losses: `infonce` is the public op."""

from mmemb.kernels.infonce import InfoNCEResult, infonce, infonce_with_grads
from mmemb.kernels.tiled.workspace import release_workspace

__all__ = ["InfoNCEResult", "infonce", "infonce_with_grads", "release_workspace"]
