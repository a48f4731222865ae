"""What a vision-language model is asked by the workers that show it the whole item."""

from __future__ import annotations

from dataclasses import replace

from mmemb.types import EMB, END_THINK, THINK, Item, Text

REQUEST = (
    "Do not answer yet. In at most three short sentences, name what in the input matters for this task "
    "and what follows from it."
)
"""What is asked after the item. Short, because a rationale is read by every later forward pass."""


def asked(item: Item, request: str) -> Item:
    """The item as a model is shown it: instruction and parts as they stand, the request last, no fields."""
    return replace(item, parts=(*item.parts, Text(request)), fields={})


def thought(text: str) -> str:
    """A model's answer without its brackets: what follows ``</think>``, or what was thought if nothing does."""
    inside, _, after = text.rpartition(END_THINK)
    text = after if after.strip() else inside
    for token in (THINK, END_THINK, EMB):
        text = text.replace(token, " ")
    return text.strip()
