"""The table of rollouts colours a rank by whether reasoning improved it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw

from mmemb.drawing import cards, gallery, rollout_table
from mmemb.drawing.cards import RIGHT, WRONG
from mmemb.drawing.rollout_table import RolloutRow, draw_rollouts
from mmemb.types import Image, Item, Pair, Text


def row(*, thought: bool, before: float, after: float) -> RolloutRow:
    query = Item("what", (Image(PILImage.new("RGB", (8, 8), "#3333ff")),))
    pair = Pair("0", "name", query, Item("", (Text("dog"),)), "dog")
    return RolloutRow(pair, thought, 0.4, "a dog" if thought else "", 4 if thought else 0, before, after, 0.25)


def has(sheet: PILImage.Image, colour: str) -> bool:
    rgb = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return bool((np.asarray(sheet) == rgb).all(axis=-1).any())


def test_ranks_are_green_if_reasoning_helped_and_red_if_it_hurt() -> None:
    helped, hurt = row(thought=True, before=9, after=1), row(thought=True, before=1, after=9)
    direct = row(thought=False, before=3, after=3)
    assert has(draw_rollouts([helped]), RIGHT)
    assert not has(draw_rollouts([helped]), WRONG)
    assert has(draw_rollouts([hurt]), WRONG)
    plain = draw_rollouts([direct])
    assert not has(plain, RIGHT)
    assert not has(plain, WRONG)
    assert draw_rollouts([helped, hurt, direct]).height > plain.height


@pytest.mark.parametrize("meanings", [gallery._LEGEND, rollout_table._LEGEND], ids=["gallery", "rollouts"])
def test_a_legend_has_one_line_per_name_and_fits_its_picture(meanings: dict[str, str]) -> None:
    width = draw_rollouts([]).width  # the gallery is wider
    sheet = PILImage.new("L", (width + 400, 400), 255)
    below = cards.legend(ImageDraw.Draw(sheet), meanings, (cards.MARGIN, 10))
    assert below == 10 + len(meanings) * cards.LEGEND_LINE
    drawn = sheet.point(lambda grey: 255 - grey).getbbox()
    assert drawn is not None
    assert drawn[2] < width - cards.MARGIN
    assert drawn[3] <= below
