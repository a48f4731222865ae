"""Augments pictures by one affine transform and one colour matrix. Takes about 0.2 ms for a 64 x 64 picture."""

from __future__ import annotations

import math
import random

from PIL import Image

from mmemb.common.checks import check_numbers
from mmemb.registry import Component

_LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights, as in Pillow's own conversion to grey."""


class PictureAugment(Component, kind="augmentation", name="jitter"):
    """Shifts, scales, rotates and recolours a picture a little. Keeps its size and fills the border with white.

    The changes are small and apply to the whole picture, so that each of several things in it keeps its place. The
    same picture and seed give the same result in any process.

    Args:
        shift: maximum shift along each axis, in pixels.
        scale: minimum and maximum zoom factor.
        rotate: maximum rotation in either direction, in degrees.
        brightness: maximum relative change of brightness.
        contrast: maximum relative change of contrast (around mid-grey).
        saturation: maximum relative change of saturation.
    """

    def __init__(
        self,
        *,
        shift: float = 4.0,
        scale: tuple[float, float] = (0.85, 1.1),
        rotate: float = 8.0,
        brightness: float = 0.15,
        contrast: float = 0.15,
        saturation: float = 0.15,
    ) -> None:
        check_numbers("augment.scale", above=0, smallest=scale[0])
        check_numbers("augment.scale", at_least=scale[0], largest=scale[1])
        self.shift = shift
        self.scale = scale
        self.rotate = rotate
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Returns the augmented picture in RGB. Does not change the given one."""
        draw = random.Random(seed).uniform
        image = image.convert("RGB")
        moved = image.transform(
            image.size,
            Image.Transform.AFFINE,
            _affine(
                image.size,
                shift=(draw(-self.shift, self.shift), draw(-self.shift, self.shift)),
                scale=draw(*self.scale),
                angle=math.radians(draw(-self.rotate, self.rotate)),
            ),
            Image.Resampling.BILINEAR,
            fillcolor="white",
        )
        colour = _colour(
            brightness=1 + draw(-self.brightness, self.brightness),
            contrast=1 + draw(-self.contrast, self.contrast),
            saturation=1 + draw(-self.saturation, self.saturation),
        )
        return moved.convert("RGB", colour)


def _affine(size: tuple[int, int], *, shift: tuple[float, float], scale: float, angle: float) -> tuple[float, ...]:
    """Returns the six coefficients for Pillow: the inverse map from output pixel to input pixel, about the centre."""
    x, y = size[0] / 2, size[1] / 2
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    to_x, to_y = x + shift[0], y + shift[1]
    return (cos, sin, x - cos * to_x - sin * to_y, -sin, cos, y + sin * to_x - cos * to_y)


def _colour(*, brightness: float, contrast: float, saturation: float) -> tuple[float, ...]:
    """Returns a 3 x 4 matrix (rows red, green, blue): saturation, then brightness, then contrast around 128."""
    gain, offset = brightness * contrast, 128 * (1 - contrast)
    rows: list[float] = []
    for row in range(3):
        rows.extend(gain * ((1 - saturation) * _LUMA[column] + saturation * (row == column)) for column in range(3))
        rows.append(offset)
    return tuple(rows)
