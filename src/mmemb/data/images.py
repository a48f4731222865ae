"""Finds and decodes pictures safely.

A source is an absolute path, a ``bundled:`` name or a PIL image (see `mmemb.types.Image`). Reading a record only
resolves the paths of its pictures (`resolve_image`, one `lstat` per picture). A picture is decoded when a backbone
needs it (`load_image`).
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache

from PIL import Image, ImageOps, UnidentifiedImageError

BUNDLED = "bundled:"
"""Prefix of pictures (and data sets) that come with the package."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that a picture file may have, independent of its name. Other decoders of PIL are not used. The one for ICO
decodes before the size can be checked, and the one for EPS starts Ghostscript."""

_ORIENTATION = 0x0112

MOST_ELONGATED = 200
"""Maximum ratio of a picture's sides that image processors of vision-language models accept."""


def load_image(source: str | Image.Image, *, max_pixels: int = 50_000_000) -> Image.Image:
    """Decodes a picture to RGB.

    Turns it upright (EXIF) and puts transparent parts on white. Takes the first frame of an animation.

    Args:
        source: an absolute path, a ``bundled:`` name or a PIL image.
        max_pixels: maximum width x height. It is checked in the header, before anything is decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, is damaged or has more than `max_pixels` pixels, or one side is more than
            `MOST_ELONGATED` times as long as the other.
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
            "convert it to one of these formats or remove its row"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"picture {source}: the header declares far more than the maximum of {max_pixels:,} pixels; "
            "shrink the picture or remove its row"
        ) from None
    except Exception as error:  # on damaged files, decoders raise nearly anything, even SyntaxError and struct.error
        raise ValueError(
            f"picture {source}: cannot be read ({_one_line(error)}); replace the picture or remove its row"
        ) from error
    if elongated:
        raise ValueError(
            f"picture {source}: {width} x {height} pixels, so one side is more than {MOST_ELONGATED} times as long "
            "as the other; crop the picture or remove its row"
        )
    raise ValueError(
        f"picture {source}: {width} x {height} pixels, but the maximum is {max_pixels:,}; "
        "shrink the picture or remove its row"
    )


def resolve_image(path: str, root: str | os.PathLike[str]) -> str:
    """Returns the absolute path of a picture below a root, with links resolved. Returns ``bundled:`` names unchanged.

    Args:
        path: the path as written in a record. An absolute path must be inside the root.
        root: the folder that must contain the picture.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path leads out of the root (``..``, another absolute path, a symbolic link), or is not a file.
    """
    if path.startswith(BUNDLED):
        return path
    base = _real_folder(os.path.join(os.getcwd(), root))
    joined = os.path.join(base, path)
    target = os.path.join(_real_folder(os.path.dirname(joined)), os.path.basename(joined))
    if _inside(target, base):  # outside, nothing is looked up, so that an error does not tell whether a file exists
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
            raise ValueError(f"image {path!r} is a folder in {base}; give the path of a picture file")
    if not _inside(target, base):
        raise ValueError(
            f"image {path!r} is outside its root {base}; paths must stay inside the root, "
            f"so move the picture or set image_root to a folder that contains it"
        )
    return target


def _inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=65536)
def _real_folder(folder: str) -> str:
    """Resolves the links of a folder. The result is cached, so a million pictures of one folder need one resolution.

    The folder must be absolute, because a relative one depends on the working directory.
    """
    return os.path.realpath(folder)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):  # 16-bit grey: convert() alone would clip at 255 instead of scaling
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
