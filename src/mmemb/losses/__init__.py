"""Losses over the kernels: `InfoNCE`, the gradient cache and negatives across ranks."""

from mmemb.losses.gradcache import CachedLoss, CachedStep, ChunkOutput, cached_step, gradient_hold
from mmemb.losses.infonce import InfoNCE

__all__ = ["CachedLoss", "CachedStep", "ChunkOutput", "InfoNCE", "cached_step", "gradient_hold"]
