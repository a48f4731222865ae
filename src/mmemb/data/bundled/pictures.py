"""Decodes pictures of the bundled data set, one at a time.

- `noto/1f34e` is one picture, 64 x 64.
- `noto/mirrored/1f34e` is the same picture with left and right exchanged.
- `noto/scene/1f34e+1f415+1f408+26f5` is a scene of four in reading order, 128 x 128.
"""

from __future__ import annotations

import io
import os
import zipfile
from importlib import resources
from typing import TYPE_CHECKING

from mmemb.data.bundled.entities import STYLES

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

PREFIX = "bundled:"
SIDE = 64
CELLS = 4

_archives: dict[int, zipfile.ZipFile] = {}


def _archive() -> zipfile.ZipFile:
    # One handle per process. A forked data-loader worker with its parent's handle would move the parent's position.
    process = os.getpid()
    if process not in _archives:
        _archives.clear()
        _archives[process] = zipfile.ZipFile(str(resources.files(__package__) / "pictures.zip"))
    return _archives[process]


def picture_names() -> list[str]:
    """Returns the names of all single pictures, sorted."""
    return [name.removesuffix(".webp") for name in _archive().namelist()]


def scene_name(vendor: str, keys: tuple[str, ...]) -> str:
    """Returns the name of the scene that shows four entities in reading order."""
    return f"{vendor}/scene/{'+'.join(keys)}"


def open_picture(name: str) -> PILImage:
    """Decodes a picture to RGB: 64 x 64, or 128 x 128 for a scene of four.

    Args:
        name: ``<style>/<code points>``, ``<style>/mirrored/<code points>`` or ``<style>/scene/<a>+<b>+<c>+<d>``, with
            or without ``bundled:``.

    Raises:
        ValueError: there is no such picture.
    """
    from PIL import Image, ImageOps

    name = name.removeprefix(PREFIX)
    vendor, _, rest = name.partition("/")
    if rest.startswith("mirrored/"):
        return ImageOps.mirror(_single(f"{vendor}/{rest.removeprefix('mirrored/')}"))
    if not rest.startswith("scene/"):
        return _single(name)
    keys = rest.removeprefix("scene/").split("+")
    if len(keys) != CELLS:
        raise ValueError(f"bundled scene {name!r} has {len(keys)} cells; give {CELLS}, joined by '+'")
    scene = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    for cell, key in enumerate(keys):
        scene.paste(_single(f"{vendor}/{key}"), (cell % 2 * SIDE, cell // 2 * SIDE))
    return scene


def _single(name: str) -> PILImage:
    from PIL import Image

    try:
        data = _archive().read(f"{name}.webp")
    except KeyError:
        raise ValueError(
            f"there is no bundled picture {name!r}; names are <style>/<code points> like {picture_names()[0]!r}, "
            f"and the styles are {', '.join(STYLES)}"
        ) from None
    return Image.open(io.BytesIO(data)).convert("RGB")
