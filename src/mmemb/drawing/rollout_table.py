"""Draws sampled rollouts: the query, the decision, the rationale, the target's rank without and with it, the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mmemb.drawing import cards as draw
from mmemb.drawing.cards import GAP, GREY, INK, LEGEND_LINE, MARGIN, PAPER, RIGHT, WRONG
from mmemb.types import Pair

_ROW, _QUERY, _DECISION, _THOUGHT, _RANK = 120, 260, 150, 380, 120
_LEGEND = {
    "query": "The item that is embedded, with its task.",
    "decision": "Whether the sampled rollout reasons, and the policy's own probability of reasoning (no exploration).",
    "rationale": "What the rollout wrote, and its number of tokens.",
    "direct_rank": "Rank of the target with the direct embedding.",
    "rank": "Rank of the target with the rollout's embedding. Green: better than direct_rank. Red: worse.",
    "reward": "Weighted sum of the rewards.",
}
"""The columns with their meanings."""


@dataclass(frozen=True)
class RolloutRow:
    """One rollout of the table.

    Attributes:
        pair: the query and its target.
        thought: whether the rollout reasons.
        think_probability: the policy's own probability of reasoning, without exploration.
        rationale: what the rollout wrote; empty if it does not reason.
        tokens: number of rationale tokens, ``<think>`` and ``</think>`` included.
        direct_rank: rank of the target with the direct embedding.
        rank: rank of the target with the rollout's embedding.
        reward: weighted sum of the rewards.
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
    """The legend, then one line per rollout: query, decision, rationale, rank without and with it, reward."""
    edges = [MARGIN]
    for width in (_QUERY, _DECISION, _THOUGHT, _RANK, _RANK, _RANK):
        edges.append(edges[-1] + width + GAP)
    head = MARGIN + len(_LEGEND) * LEGEND_LINE + GAP
    sheet = Image.new("RGB", (edges[-1] - GAP + MARGIN, head + MARGIN + 24 + len(rows) * (_ROW + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    draw.legend(pen, _LEGEND, (MARGIN, MARGIN - 12))
    for x, title in zip(edges, _LEGEND, strict=False):
        pen.text((x, head - 12), title, font=draw.font(18), fill=INK)
    y = head + 24
    for row in rows:
        box = (edges[0], y, edges[0] + _QUERY, y + _ROW)
        draw.card(sheet, row.pair.query, box, label=row.pair.task)
        decision = "reason" if row.thought else "skip reasoning"
        pen.text((edges[1], y + 8), decision, font=draw.font(18), fill=INK)
        pen.text((edges[1], y + 34), f"probability {row.think_probability:.3f}", font=draw.font(13), fill=GREY)
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
