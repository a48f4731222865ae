"""Prints one pair of a pool in colour, with its candidates, their gains and the choice."""

from __future__ import annotations

import math
from collections.abc import Collection

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mmemb.rationales.gains import placebo_gains
from mmemb.types import Candidates, Item, Pair, pictures


def show_pair(
    pair: Pair, candidates: Candidates, chosen: Collection[int] | None, *, console: Console | None = None
) -> None:
    """Prints a pair, the gains of its candidates and placebos in nats, the leak flags, and the choice.

    Args:
        pair: the pair.
        candidates: the candidates of the pair. Scores may be nan.
        chosen: indices of the candidates to mark. None marks none and prints no line about the choice.
        console: where to print. None means the terminal.
    """
    head = Table.grid(padding=(0, 2))
    head.add_column(style="bold")
    head.add_column(overflow="fold")
    head.add_row("task", pair.task)
    head.add_row("query", _content(pair.query))
    head.add_row("target", _content(pair.positive))
    head.add_row("without", Text(_number(candidates.score_none), style="cyan"))

    table = Table(box=None, padding=(0, 1), header_style="dim")
    with_placebos = any(not math.isnan(score) for score in candidates.scores_placebo)
    table.add_column("")
    table.add_column("worker")
    for name in ("tokens", "score", "gain", *(["placebo"] if with_placebos else [])):
        table.add_column(name, justify="right")
    table.add_column("rationale", overflow="fold")
    scores = candidates.scores or (math.nan,) * len(candidates.rationales)
    marked = chosen or ()
    placebos = placebo_gains(candidates) or [math.nan] * len(scores)
    for index, (rationale, score) in enumerate(zip(candidates.rationales, scores, strict=True)):
        gain = score - candidates.score_none
        text = Text(rationale.text, style="bold" if index in marked else "strike dim" if rationale.leaks else "")
        for mark in (*(f"leak: {flag}" for flag in rationale.leaks), rationale.corruption):
            if mark:
                text.append(" ").append(f"[{mark}]", style="not strike not dim not bold yellow")
        table.add_row(
            Text("▶" if index in marked else ""),
            Text(rationale.worker, style="magenta"),
            str(rationale.tokens or ""),
            _number(score),
            Text(_number(gain, sign="+"), style="dim" if math.isnan(gain) else "green" if gain > 0 else "red"),
            *([Text(_number(placebos[index], sign="+"), style="dim")] if with_placebos else []),
            text,
            style="on grey15" if index in marked else "",
        )
    parts: list[RenderableType] = [head, Text(), table if candidates.rationales else Text("no candidates", style="dim")]
    if chosen is not None and not marked:
        parts.append(Text("no candidate was chosen: this pair trains the direct path alone", style="yellow"))
    (console or Console()).print(Panel(Group(*parts), title=Text(pair.id), title_align="left"))


def _content(item: Item) -> Text:
    """Returns the instruction, text and picture names of an item."""
    sources = [source if isinstance(source, str) else "<picture>" for source in pictures(item)]
    text = Text(item.instruction, style="italic")
    for words, style in ((item.text, ""), (" ".join(sources), "blue")):
        if words:
            text.append(" " if text.plain else "").append(words, style=style)
    return text


def _number(value: float, *, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.3f}"
