"""Sampled rollouts as a picture: what was asked, what was decided and thought, the positive's rank before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mmemb.drawing import cards as draw
from mmemb.drawing.cards import GAP, GREY, INK, MARGIN, PAPER, RIGHT, WRONG
from mmemb.types import Pair

_ROW, _QUERY, _DECISION, _THOUGHT, _RANK = 120, 260, 130, 380, 90


@dataclass(frozen=True)
class RolloutRow:
    """A rollout to look at.

    Attributes:
        pair: the query and its target.
        thought: the decision.
        think_probability: of the policy itself, exploration left out.
        rationale: empty where it did not think.
        tokens: of the rationale, brackets included.
        direct_rank: the positive's rank under the direct embedding.
        rank: the same under the rollout's.
        reward: total.
    """

    pair: Pair
    thought: bool
    think_probability: float
    rationale: str
    tokens: int
    direct_rank: float
    rank: float
    reward: float


def draw_rollouts(rows: Sequence[RolloutRow]) -> Image.Image:
    """A row a rollout: query, decision with its probability, rationale, rank before and after, reward."""
    edges = [MARGIN]
    for width in (_QUERY, _DECISION, _THOUGHT, _RANK, _RANK, _RANK):
        edges.append(edges[-1] + width + GAP)
    sheet = Image.new("RGB", (edges[-1] - GAP + MARGIN, 2 * MARGIN + 24 + len(rows) * (_ROW + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    titles = ("query", "decision", "rationale", "before", "after", "reward")
    for x, title in zip(edges, titles, strict=False):
        pen.text((x, MARGIN - 12), title, font=draw.font(18), fill=INK)
    y = MARGIN + 24
    for row in rows:
        box = (edges[0], y, edges[0] + _QUERY, y + _ROW)
        draw.card(sheet, row.pair.query, box, label=row.pair.task)
        decision = "think" if row.thought else "direct"
        pen.text((edges[1], y + 8), decision, font=draw.font(18), fill=INK)
        pen.text((edges[1], y + 34), f"p(think) {row.think_probability:.2f}", font=draw.font(13), fill=GREY)
        if row.thought:
            below = draw.write(
                pen, row.rationale or "(no words)", (edges[2], y + 8), width=_THOUGHT - GAP, size=15, lines=4
            )
            pen.text((edges[2], below + 4), f"{row.tokens} tokens", font=draw.font(13), fill=GREY)
        pen.text((edges[3], y + 8), f"{row.direct_rank:.4g}", font=draw.font(18), fill=GREY)
        better = RIGHT if row.rank < row.direct_rank else WRONG if row.rank > row.direct_rank else GREY
        pen.text((edges[4], y + 8), f"{row.rank:.4g}", font=draw.font(18), fill=better)
        pen.text((edges[5], y + 8), f"{row.reward:.3f}", font=draw.font(18), fill=INK)
        y += _ROW + GAP
    return sheet
