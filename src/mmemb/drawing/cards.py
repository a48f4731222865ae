"""Draws items as cards with their pictures and text, for the gallery and for search results.

Uses Pillow only. Text is wrapped to its card. Text that does not fit ends in an ellipsis. A picture that cannot be read
becomes an empty frame, because a drawing is a report and must not stop a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmemb.common.files import whole_file
from mmemb.data.images import load_image
from mmemb.types import Item, pictures

INK, GREY, LINE, PAPER, CARD = "#1c2733", "#66727f", "#d9dfe5", "#f4f6f8", "#ffffff"
RIGHT, WRONG = "#2e7d5b", "#b3402f"
GAP, MARGIN = 12, 32
_RADIUS = 8
_LEGEND_SIZE, LEGEND_LINE = 14, 21
"""Height of a legend's letters, and of one of its lines, in pixels."""


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The default typeface at a size in pixels."""
    return ImageFont.load_default(size)


def wrap(text: str, *, width: int, size: int, lines: int) -> list[str]:
    """Breaks a text into at most ``lines`` lines of at most ``width`` pixels. Words longer than a line are broken."""
    face = font(size)
    broken = [""]
    for word in text.split():
        joined = f"{broken[-1]} {word}".strip()
        if face.getlength(joined) <= width:
            broken[-1] = joined
            continue
        if broken[-1]:
            broken.append("")
        for letter in word:
            if broken[-1] and face.getlength(broken[-1] + letter) > width:
                broken.append("")
            broken[-1] += letter
    if len(broken) > lines:
        broken = broken[:lines]
        while broken[-1] and face.getlength(broken[-1] + "…") > width:
            broken[-1] = broken[-1][:-1]
        broken[-1] = broken[-1].rstrip() + "…"
    return broken


def write(
    pen: ImageDraw.ImageDraw, text: str, at: tuple[int, int], *, width: int, size: int, lines: int, fill: str = INK
) -> int:
    """Writes wrapped text with its upper left corner at a point; returns the y below it."""
    x, y = at
    for line in wrap(text, width=width, size=size, lines=lines):
        pen.text((x, y), line, font=font(size), fill=fill)
        y += round(size * 1.35)
    return y


def legend(pen: ImageDraw.ImageDraw, meanings: Mapping[str, str], at: tuple[int, int]) -> int:
    """Writes one line per name with its meaning, each `LEGEND_LINE` high; returns the y below them."""
    x, y = at
    face = font(_LEGEND_SIZE)
    for name, meaning in meanings.items():
        pen.text((x, y), name, font=face, fill=INK)
        pen.text((x + face.getlength(f"{name}   "), y), meaning, font=face, fill=GREY)
        y += LEGEND_LINE
    return y


def card(
    sheet: Image.Image,
    item: Item,
    box: tuple[int, int, int, int],
    *,
    frame: str = LINE,
    label: str = "",
    with_instruction: bool = False,
) -> None:
    """Draws an item into a box (left, top, right, bottom): its pictures next to each other, and its text below them.

    Args:
        sheet: the picture to draw on.
        item: the item to draw.
        box: the outline of the card in pixels.
        frame: colour of the outline and the label.
        label: one or two words at the bottom of the card.
        with_instruction: whether to draw the instruction at the top.
    """
    pen = ImageDraw.Draw(sheet)
    left, top, right, bottom = box
    pen.rounded_rectangle(box, radius=_RADIUS, fill=CARD, outline=frame, width=1 if frame == LINE else 3)
    x, y, width = left + 10, top + 10, right - left - 20
    if label:
        pen.text((x, bottom - 24), label, font=font(14), fill=frame if frame != LINE else GREY)
        bottom -= 24
    if with_instruction and item.instruction:
        y = write(pen, item.instruction, (x, y), width=width, size=13, lines=2, fill=GREY) + 4
    sources = list(pictures(item))
    if sources:
        text_room = 42 if item.text else 0
        side = max(8, min(bottom - y - 10 - text_room, (width - GAP * (len(sources) - 1)) // len(sources)))
        for index, source in enumerate(sources):
            _paste(sheet, source, (x + index * (side + GAP), y), side)
        y += side + 6
    if not item.text:
        return
    size = 14 if sources else 17
    step = round(size * 1.35)
    room = max(1, (bottom - y - 4) // step)
    if not sources:  # text without pictures is centred
        lines = len(wrap(item.text, width=width, size=size, lines=room))
        y += max(0, (bottom - y - 10 - lines * step) // 2)
    write(pen, item.text, (x, y), width=width, size=size, lines=room)


def save(sheet: Image.Image, path: str | Path) -> Path:
    """Writes a PNG, whole or not at all; its folder is made. Returns the path."""
    with whole_file(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)
    return Path(path)


def draw_results(path: str | Path, query: Item, results: Sequence[tuple[Item, float]], *, columns: int = 5) -> Path:
    """Writes a picture of a query and its top results, best first, with rank and cosine.

    Args:
        path: PNG to write.
        query: the item that was searched for.
        results: items with their cosine, best first.
        columns: results per line.

    Returns:
        The path.
    """
    side, head = 220, 250
    lines = -(-len(results) // columns)
    width = 2 * MARGIN + columns * side + (columns - 1) * GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + head + lines * (side + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), "query", font=font(18), fill=GREY)
    query_box = (MARGIN, MARGIN + 18, MARGIN + 2 * side + GAP, MARGIN + 18 + side - 32)
    card(sheet, query, query_box, with_instruction=True)
    found = f"{len(results)} nearest" if results else "nothing found"
    pen.text((MARGIN, MARGIN + head - 30), found, font=font(18), fill=GREY)
    for index, (item, score) in enumerate(results):
        x = MARGIN + index % columns * (side + GAP)
        y = MARGIN + head + index // columns * (side + GAP)
        card(sheet, item, (x, y, x + side, y + side), label=f"{index + 1}   {score:.3f}")
    return save(sheet, path)


def _paste(sheet: Image.Image, source: str | Image.Image, at: tuple[int, int], side: int) -> None:
    pen = ImageDraw.Draw(sheet)
    x, y = at
    try:
        picture = load_image(source)
    except (OSError, ValueError):
        pen.rectangle((x, y, x + side, y + side), outline=LINE)
        pen.text((x + 6, y + side // 2 - 8), "no picture", font=font(12), fill=GREY)
        return
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x + (side - size[0]) // 2, y + (side - size[1]) // 2))
