"""The kernels of the losses. `infonce` is the public function."""

from mmemb.kernels.infonce import InfoNCEResult, infonce, infonce_with_grads
from mmemb.kernels.options import InfoNCEBatch, LossOptions
from mmemb.kernels.tiled.workspace import release_workspace

__all__ = ["InfoNCEBatch", "InfoNCEResult", "LossOptions", "infonce", "infonce_with_grads", "release_workspace"]
