"""The prompt and the answer's cleaning for workers that show a vision-language model the whole item."""

from __future__ import annotations

from dataclasses import replace

from mmemb.types import EMB, END_THINK, THINK, Item, Text

REQUEST = (
    "Do not answer yet. In at most three short sentences, name what in the input matters for this task "
    "and what follows from it."
)
"""The request after the item. It asks for a short text, because every later forward pass reads the rationale."""


def asked(item: Item, request: str) -> Item:
    """The item as the model sees it: unchanged instruction and parts, then the request, without fields."""
    return replace(item, parts=(*item.parts, Text(request)), fields={})


def thought(text: str) -> str:
    """A model's answer: the text after ``</think>``, or the text between the brackets if nothing follows."""
    inside, _, after = text.rpartition(END_THINK)
    text = after if after.strip() else inside
    for token in (THINK, END_THINK, EMB):
        text = text.replace(token, " ")
    return text.strip()
