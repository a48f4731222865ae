"""Renders items as chat messages, in the form that chat templates of the transformers library accept."""

from __future__ import annotations

from typing import Any

from mmemb.types import Item, Text, Video


def render(item: Item) -> list[dict[str, Any]]:
    """Renders an item as one user message: the instruction, then the parts in reading order.

    Its content is a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``. The image entries have the
    order of `mmemb.types.pictures`. A page is one image, and a video has one image per frame. An empty instruction or
    text has no entry.
    """
    content: list[dict[str, Any]] = []
    if item.instruction:
        content.append({"type": "text", "text": item.instruction})
    for part in item.parts:
        if isinstance(part, Text):
            if part.text:
                content.append({"type": "text", "text": part.text})
        else:
            content.extend({"type": "image"} for _ in range(len(part.frames) if isinstance(part, Video) else 1))
    return [{"role": "user", "content": content}]
