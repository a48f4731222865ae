"""Draws ten queries: the query, the model's rationale, and the candidates it finds with and without reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from mmemb.common.vocabulary import ALWAYS_REASON, NEVER, row_meaning
from mmemb.drawing import cards as draw
from mmemb.drawing.cards import GAP, GREY, INK, LEGEND_LINE, MARGIN, PAPER, RIGHT, WRONG
from mmemb.types import EvaluationResults, EvaluationTask, Item, QueryRecord

_ROW, _QUERY, _THOUGHT, _TARGET, _TITLE = 176, 330, 300, 150, 30
_TOP = 3
_LEGEND = {
    "rationale": "What the model itself wrote before it embedded the query.",
    **{row: f"{row_meaning(row)} The first three candidates." for row in (NEVER, ALWAYS_REASON)},
    "right, wrong": "Whether the candidate is the target of the query.",
}


def choose(records: Sequence[QueryRecord], count: int = 10) -> list[QueryRecord]:
    """Up to ``count`` queries, the same number per task and evenly spaced within it, so that no one picks the best."""
    tasks: dict[str, list[QueryRecord]] = {}
    for record in records:
        tasks.setdefault(record.task, []).append(record)
    shares = [count // len(tasks) + (index < count % len(tasks)) for index in range(len(tasks))] if tasks else []
    chosen = []
    for found, share in zip(tasks.values(), shares, strict=True):
        share = min(share, len(found))
        chosen += [found[(2 * index + 1) * len(found) // (2 * share)] for index in range(share)]
    return chosen


def draw_gallery(results: EvaluationResults, *, count: int = 10) -> Image.Image:
    """The legend, then one line per query: the query, its rationale, and the first three candidates of both paths.

    Args:
        results: results of `mmemb.evaluation.runner.evaluate`.
        count: number of queries to show.
    """
    shown = choose(results.records, count)
    direct_x = MARGIN + _QUERY + GAP + _THOUGHT + 2 * GAP
    reasoned_x = direct_x + _TOP * (_TARGET + GAP) + 2 * GAP
    width = reasoned_x + _TOP * (_TARGET + GAP) - GAP + MARGIN
    head = MARGIN + len(_LEGEND) * LEGEND_LINE + GAP
    sheet = Image.new("RGB", (width, head + MARGIN + 24 + len(shown) * (_ROW + _TITLE + GAP)), PAPER)
    pen = ImageDraw.Draw(sheet)
    draw.legend(pen, _LEGEND, (MARGIN, MARGIN - 12))
    heads = (
        (MARGIN, "query"),
        (MARGIN + _QUERY + 2 * GAP, "rationale"),
        (direct_x, NEVER),
        (reasoned_x, ALWAYS_REASON),
    )
    for x, title in heads:
        pen.text((x, head - 12), title, font=draw.font(20), fill=INK)
    y = head + 24
    for record in shown:
        task = results.tasks[record.task]
        pen.text((MARGIN, y + 6), record.task, font=draw.font(16), fill=GREY)
        ranks = ((direct_x, record.direct_rank), (reasoned_x, record.reasoned_rank))
        for x, rank in ranks:
            if rank is not None:
                label = f"target at rank {rank:.4g} of {len(task.candidates)}"
                pen.text((x, y + 8), label, font=draw.font(13), fill=GREY)
        y += _TITLE
        draw.card(sheet, record.pair.query, (MARGIN, y, MARGIN + _QUERY, y + _ROW), with_instruction=True)
        thought = record.rationale or ("(no words)" if record.tokens else "(no rationale)")
        below = draw.write(
            pen,
            thought,
            (MARGIN + _QUERY + 2 * GAP, y + 10),
            width=_THOUGHT - GAP,
            size=16,
            lines=6,
            fill=INK if record.rationale else GREY,
        )
        if record.tokens:
            count_at = (MARGIN + _QUERY + 2 * GAP, below + 4)
            pen.text(count_at, f"{record.tokens} tokens", font=draw.font(13), fill=GREY)
        _targets(sheet, task, record.direct_top, record.pair.positive_id, (direct_x, y))
        if record.reasoned_top is not None:
            _targets(sheet, task, record.reasoned_top, record.pair.positive_id, (reasoned_x, y))
        y += _ROW + GAP
    return sheet


def write_gallery(path: str | Path, results: EvaluationResults, *, count: int = 10) -> Path:
    """Writes `draw_gallery` as a PNG, whole or not at all."""
    return draw.save(draw_gallery(results, count=count), path)


def _targets(
    sheet: Image.Image, task: EvaluationTask, top: Sequence[str], positive: str, corner: tuple[int, int]
) -> None:
    items: dict[str, Item] = dict(zip(task.candidate_ids, task.candidates, strict=True))
    x, y = corner
    for place, identity in enumerate(top):
        right = identity == positive
        left = x + place * (_TARGET + GAP)
        label = f"{place + 1}   {'right' if right else 'wrong'}"
        box = (left, y, left + _TARGET, y + _ROW)
        draw.card(sheet, items[identity], box, frame=RIGHT if right else WRONG, label=label)
