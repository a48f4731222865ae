"""The contact sheet: every task is drawn, the seed chooses the queries, and no file is left incomplete."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image as PILImage
from PIL import ImageChops, ImageDraw

from mmemb.drawing.contact_sheet import CARD_HEIGHT, CARD_WIDTH, GAP, HEADER, draw, wrap


def test_sheet_grows_with_tasks_and_rows(tmp_path: Path) -> None:
    with PILImage.open(draw(tmp_path / "new" / "one.png", tasks=["name"], rows=1)) as one:
        small = one.size
    with PILImage.open(draw(tmp_path / "two.png", tasks=["name", "left1"], rows=3)) as two:
        assert two.size == (small[0] + 2 * (CARD_WIDTH + GAP), small[1] + HEADER + CARD_HEIGHT + GAP)
        assert two.format == "PNG"


def test_seed_chooses_the_queries(tmp_path: Path) -> None:
    paths = [draw(tmp_path / f"{i}.png", tasks=["vendor"], rows=2, seed=seed) for i, seed in enumerate((1, 1, 2))]
    first, same, other = (path.read_bytes() for path in paths)
    assert first == same
    assert first != other


def test_every_task_fills_its_section(tmp_path: Path) -> None:
    path = draw(tmp_path / "all.png", rows=1)
    with PILImage.open(path) as sheet:
        assert sheet.height >= 8 * (HEADER + CARD_HEIGHT)
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.png"]


def test_nothing_is_drawn_outside_the_cards(tmp_path: Path) -> None:
    with PILImage.open(draw(tmp_path / "all.png", rows=2)) as sheet:
        width, height = sheet.size
        gutter = sheet.crop((40 + CARD_WIDTH + 1, 0, 40 + CARD_WIDTH + GAP - 1, height)).convert("RGB")
        # Lines and task headings may cross the space between cards, so only the height of the cards is checked.
        for section in range(8):
            top = 94 + section * (HEADER + CARD_HEIGHT + GAP) + HEADER
            band = gutter.crop((0, top, gutter.width, top + CARD_HEIGHT))
            plain = PILImage.new("RGB", band.size, "#f4f6f8")
            assert ImageChops.difference(band, plain).getbbox() is None


def test_long_text_is_wrapped_and_marked_where_cut() -> None:
    pen = ImageDraw.Draw(PILImage.new("RGB", (10, 10)))
    lines = wrap(pen, "one two three four five six seven eight nine ten", 120, 14, 2)
    assert len(lines) == 2
    assert lines[-1].endswith(" ...")
    assert all(pen.textlength(line) <= 120 for line in lines)
    assert wrap(pen, "short", 120, 14, 2) == ["short"]
    question = "what is left of the soda cup ?"
    for width in range(60, 240, 20):
        lines = wrap(pen, question, width, 14, 9)
        assert " ".join(lines) == question
        assert not any(line.startswith("?") for line in lines)


def test_no_rows_and_unknown_tasks_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contact sheet\.rows is 0; give 1 or more"):
        draw(tmp_path / "x.png", rows=0)
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        draw(tmp_path / "x.png", tasks=["nope"])
    assert not list(tmp_path.iterdir())
