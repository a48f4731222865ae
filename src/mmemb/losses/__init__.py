"""Losses: `InfoNCE` on one rank and across ranks, the gradient cache and the policy loss."""

from mmemb.losses.gradcache import CachedLoss, CachedStep, ChunkOutput, cached_step, gradient_hold
from mmemb.losses.infonce import InfoNCE

__all__ = ["CachedLoss", "CachedStep", "ChunkOutput", "InfoNCE", "cached_step", "gradient_hold"]
