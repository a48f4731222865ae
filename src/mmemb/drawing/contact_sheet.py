"""Draws examples of the bundled tasks: one section per task, one card per query with its target and true rationale.

Uses Pillow only. Text is wrapped to the card. Text that does not fit ends in an ellipsis.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from mmemb.common.checks import check_numbers
from mmemb.data.bundled import TASKS, load_pairs, open_picture
from mmemb.drawing.cards import save
from mmemb.types import Image as ImagePart
from mmemb.types import Item, Pair

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CARD_WIDTH, CARD_HEIGHT, GAP, MARGIN, HEADER = 430, 236, 18, 40, 58
PICTURE, ARROW, PAD = 112, 44, 16
INK, GREY, LINE, PAPER, CARD = "#1c2733", "#66727f", "#d9dfe5", "#f4f6f8", "#ffffff"
KIND_COLOURS = {"easy": "#2e7d5b", "hop": "#b2621b", "spatial": "#3f5fb5"}


def draw(
    path: str | Path, *, split: str = "test", tasks: Sequence[str] | None = None, rows: int = 4, seed: int = 0
) -> Path:
    """Writes the contact sheet as PNG.

    Args:
        path: file to write; its folder is made.
        split: the split whose queries are shown.
        tasks: task names; all eight by default.
        rows: queries per task.
        seed: seed of the choice of queries.

    Returns:
        The path.

    Raises:
        ValueError: unknown split or task, or ``rows`` below one.
    """
    check_numbers("contact sheet", at_least=1, rows=rows)
    pairs = load_pairs(split, tasks=tasks)
    shown = {name: [pair for pair in pairs if pair.task == name] for name in TASKS}
    rng = random.Random(seed)
    sections = {name: rng.sample(found, min(rows, len(found))) for name, found in shown.items() if found}
    width = 2 * MARGIN + rows * CARD_WIDTH + (rows - 1) * GAP
    height = 2 * MARGIN + 54 + len(sections) * (HEADER + CARD_HEIGHT + GAP)
    sheet = PILImage.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), f"bundled tasks, {split} split", font=_font(30), fill=INK)
    top = MARGIN + 54
    for name, found in sections.items():
        _header(pen, name, top, width)
        for column, pair in enumerate(found):
            _card(sheet, pair, (MARGIN + column * (CARD_WIDTH + GAP), top + HEADER))
        top += HEADER + CARD_HEIGHT + GAP
    return save(sheet, path)


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _header(pen: ImageDraw.ImageDraw, name: str, top: int, width: int) -> None:
    spec = TASKS[name]
    colour = KIND_COLOURS[spec.kind]
    pen.line((MARGIN, top + 6, width - MARGIN, top + 6), fill=LINE, width=1)
    pen.text((MARGIN, top + 18), name, font=_font(23), fill=INK)
    left = MARGIN + int(pen.textlength(name, font=_font(23))) + 14
    length = int(pen.textlength(spec.kind, font=_font(14)))
    pen.rounded_rectangle((left, top + 21, left + length + 20, top + 44), radius=11, fill=colour)
    pen.text((left + 10, top + 24), spec.kind, font=_font(14), fill="white")
    pen.text((left + length + 36, top + 22), spec.instruction, font=_font(17), fill=GREY)


def _card(sheet: PILImage.Image, pair: Pair, corner: tuple[int, int]) -> None:
    pen = ImageDraw.Draw(sheet)
    x, y = corner
    box = (x, y, x + CARD_WIDTH, y + CARD_HEIGHT)
    pen.rounded_rectangle(box, radius=10, fill=CARD, outline=LINE, width=1)
    half = (CARD_WIDTH - ARROW - 2 * PAD) // 2
    _item(sheet, pair.query, (x + PAD, y + 12), half, "query")
    _item(sheet, pair.positive, (x + PAD + half + ARROW, y + 12), half, "target")
    tip, level = x + PAD + half + ARROW // 2 + 2, y + 12 + 18 + PICTURE // 2
    pen.line((tip - 16, level, tip, level), fill=GREY, width=2)
    pen.polygon([(tip + 2, level), (tip - 5, level - 5), (tip - 5, level + 5)], fill=GREY)
    pen.line((x + PAD, y + 168, x + CARD_WIDTH - PAD, y + 168), fill=LINE)
    pen.text((x + PAD, y + 174), "rationale", font=_font(12), fill=GREY)
    _write(pen, pair.query.fields["rationale"], (x + PAD, y + 191), CARD_WIDTH - 2 * PAD, 14, lines=2, fill=INK)


def _item(sheet: PILImage.Image, item: Item, corner: tuple[int, int], width: int, label: str) -> None:
    pen = ImageDraw.Draw(sheet)
    x, y = corner
    pen.text((x, y), label, font=_font(12), fill=GREY)
    y += 18
    pictures = [part.source for part in item.parts if isinstance(part, ImagePart) and isinstance(part.source, str)]
    text = item.text
    # With a question below it a picture is smaller; without one it takes the whole half of the card.
    side = PICTURE if not text else 84
    for source in pictures:
        picture = open_picture(source).resize((side, side), PILImage.Resampling.LANCZOS)
        sheet.paste(picture, (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline=LINE)
    if text and pictures:
        _write(pen, text, (x, y + side + 5), width, 14, lines=2, fill=INK)
    elif text:
        _write(pen, text, (x, y + PICTURE // 2 - 18), width, 17, lines=3, fill=INK)


def _write(
    pen: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], width: int, size: int, *, lines: int, fill: str
) -> None:
    for number, line in enumerate(wrap(pen, text, width, size, lines)):
        pen.text((corner[0], corner[1] + number * (size + 5)), line, font=_font(size), fill=fill)


def wrap(pen: ImageDraw.ImageDraw, text: str, width: int, size: int, lines: int) -> list[str]:
    """Breaks a text into at most ``lines`` lines of at most ``width`` pixels. A cut text ends in an ellipsis."""
    font = _font(size)
    wrapped: list[str] = []
    # The data has a space before punctuation; no line may begin with a punctuation mark.
    for word in re.split(r" (?![?:;,])", text):
        longer = f"{wrapped[-1]} {word}" if wrapped else word
        if wrapped and pen.textlength(longer, font=font) <= width:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = wrapped[:lines]
        while wrapped[-1] and pen.textlength(wrapped[-1] + " ...", font=font) > width:
            wrapped[-1] = wrapped[-1][:-1]
        wrapped[-1] += " ..."
    return wrapped
