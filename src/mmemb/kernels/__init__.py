"""Compute kernels behind the losses: `infonce` is the public op."""

from mmemb.kernels._workspace import release_workspace
from mmemb.kernels.infonce import InfoNCEResult, infonce, infonce_with_grads

__all__ = ["InfoNCEResult", "infonce", "infonce_with_grads", "release_workspace"]
