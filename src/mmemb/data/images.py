"""Pictures: from a source to RGB, safely.

A source is an absolute path, a ``bundled:`` name or a PIL image (see `mmemb.types.Image`). Records only name pictures
(`resolve_image`: one `lstat` a picture); they are decoded when a backbone asks (`load_image`).
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache

from PIL import Image, ImageOps, UnidentifiedImageError

BUNDLED = "bundled:"
"""Prefix of pictures (and data sets) that come with the package."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What a picture file may hold, whatever its name. Other decoders of PIL stay shut: that of ICO decodes before a size
can be checked, that of EPS starts Ghostscript."""

_ORIENTATION = 0x0112

MOST_ELONGATED = 200
"""Largest ratio of a picture's sides: what image processors of vision-language models take."""


def load_image(source: str | Image.Image, *, max_pixels: int = 50_000_000) -> Image.Image:
    """Decodes a picture to RGB, upright (EXIF), transparency flattened on white; of an animation the first frame.

    Args:
        source: an absolute path, a ``bundled:`` name or a PIL image.
        max_pixels: largest width x height accepted; checked from the header, before anything is decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, is damaged, has more than `max_pixels` pixels, or one side is more than
            `MOST_ELONGATED` times the other.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source)
    if source.startswith(BUNDLED):
        from mmemb.data.bundled import open_picture

        return _to_rgb(open_picture(source))
    try:
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            elongated = max(width, height) > MOST_ELONGATED * min(width, height)
            if width * height <= max_pixels and not elongated:
                image.load()
                return _to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"picture {source}: there is no such file; correct the path or restore the file"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"picture {source}: cannot be read as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; "
            "convert it to one of them or leave its row out"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"picture {source}: header declares far more than the {max_pixels:,} pixels allowed; shrink or drop it"
        ) from None
    except Exception as error:  # decoders of damaged files raise nearly anything, SyntaxError and struct.error included
        raise ValueError(
            f"picture {source}: cannot be read ({_one_line(error)}); replace it or leave its row out"
        ) from error
    if elongated:
        raise ValueError(
            f"picture {source}: {width} x {height} pixels, one side more than {MOST_ELONGATED} times the other; "
            "crop it or leave its row out"
        )
    raise ValueError(
        f"picture {source}: {width} x {height} pixels, more than the {max_pixels:,} allowed; shrink or drop it"
    )


def resolve_image(path: str, root: str | os.PathLike[str]) -> str:
    """Absolute path, links resolved, of a picture named relative to a root; ``bundled:`` names pass as they are.

    Args:
        path: as written in a record; an absolute path is accepted only inside the root.
        root: the folder no picture may lie outside of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path leads out of the root (``..``, another absolute path, a symbolic link), or names no file.
    """
    if path.startswith(BUNDLED):
        return path
    base = _real_folder(os.path.join(os.getcwd(), root))
    joined = os.path.join(base, path)
    target = os.path.join(_real_folder(os.path.dirname(joined)), os.path.basename(joined))
    if _inside(target, base):  # otherwise nothing is looked up: an outsider learns not even whether a file exists
        try:
            mode = os.lstat(target).st_mode
            if stat.S_ISLNK(mode):
                target = os.path.realpath(target)
                mode = os.stat(target).st_mode if _inside(target, base) else 0
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"image {path!r} does not exist in {base}; correct the path, or set image_root to the pictures' folder"
            ) from None
        except (OSError, ValueError) as error:
            raise ValueError(
                f"image {path!r} cannot be looked up in {base} ({_one_line(error)}); correct the path"
            ) from error
        if stat.S_ISDIR(mode):
            raise ValueError(f"image {path!r} is a folder in {base}; name a picture file")
    if not _inside(target, base):
        raise ValueError(
            f"image {path!r} leads outside its root {base}; paths must stay inside the root, "
            f"so move the picture or set image_root to a folder that holds it"
        )
    return target


def _inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=65536)
def _real_folder(folder: str) -> str:
    """Cached: a million pictures of one folder resolve its links once, not a path component at a time.

    The folder must be absolute: what a relative one means changes with the working directory.
    """
    return os.path.realpath(folder)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
