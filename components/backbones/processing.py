"""Turns items into model inputs: renders the chat prompt, tokenises, left-pads, cuts patches and labels.

No model is used here, so the processor can be pickled.

Cost: a row whose prompt (words and picture shapes) was seen before costs a dictionary look-up. A new one takes about
0.3 ms.

Legend: B rows, T columns, L tokens of one row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmemb.data.images import load_image
from mmemb.data.templates import render
from mmemb.inference.prompts import thought_tokens
from mmemb.types import EMB, END_THINK, THINK, Item, ModelInputs, Text, Video, pictures

from .pictures import Pictures, Shape

Augment = Callable[[Any, int], Any]
Ids = NDArray[np.int64]
_CACHE_LIMIT = 50_000
IGNORE = -100


class PromptProcessor:
    """Renders and tokenises items for one model.

    Args:
        tokenizer: the library's tokenizer, with the three special tokens.
        chat_template: Jinja text that turns messages into a prompt with one placeholder per picture.
        pictures: turns pictures into tensors for this family.
        image_token: text of the placeholder token.
        positions: ``mrope`` or ``plain`` (see `families.Family`).
        max_prompt_tokens: longest prompt; a longer one is an error.
        max_rationale_tokens: longest rationale or response; a longer one is cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str,
        pictures: Pictures,
        image_token: str,
        positions: str,
        max_prompt_tokens: int,
        max_rationale_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.pictures = pictures
        self.image_token = image_token
        self.image_id = int(tokenizer.convert_tokens_to_ids(image_token))
        self.positions = positions
        self.max_prompt_tokens = max_prompt_tokens
        self.max_rationale_tokens = max_rationale_tokens
        self.ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in (THINK, END_THINK, EMB)}
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        specials = sorted(
            (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True
        )
        self._special = re.compile("|".join(re.escape(token) for token in specials))
        self._prompts: dict[Any, tuple[Ids, Ids]] = {}
        self._texts: dict[str, Ids] = {}

    def prepare(
        self,
        items: Sequence[Item],
        *,
        rationales: Sequence[str | None] | None = None,
        embed: bool = True,
        augment: Augment | None = None,
    ) -> ModelInputs:
        """See `mmemb.interfaces.Backbone.prepare`."""
        if rationales is not None and not embed:
            raise ValueError("rationales need embed=True; a bare prompt has none")
        suffixes: list[Ids] = []
        for rationale in rationales if rationales is not None else [None] * len(items):
            written = None if rationale is None else self._tokenise(rationale)
            following = thought_tokens(self.ids.__getitem__, written) if embed else []
            suffixes.append(np.array(following, dtype=np.int64))
        return self._assemble(items, suffixes, unlabelled=0, embed=embed, augment=augment)

    def prepare_response(
        self, items: Sequence[Item], responses: Sequence[str], *, augment: Augment | None = None
    ) -> ModelInputs:
        """See `mmemb.interfaces.Backbone.prepare_response`."""
        tokens = [thought_tokens(self.ids.__getitem__, self._tokenise(response)) for response in responses]
        suffixes = [np.array(ids[:-1], dtype=np.int64) for ids in tokens]  # without ``<emb>``
        return self._assemble(items, suffixes, unlabelled=1, embed=False, augment=augment)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens spelt out in it become ordinary characters."""
        return [int(token) for token in self._encode(self._plain(text))]

    def count_tokens(self, text: str) -> int:
        """Length of a text in tokens."""
        return len(self._encode(self._plain(text)))

    def _assemble(
        self, items: Sequence[Item], suffixes: Sequence[Ids], *, unlabelled: int, embed: bool, augment: Augment | None
    ) -> ModelInputs:
        """Joins prompts and suffixes, left-padded. Suffix tokens after the first ``unlabelled`` ones are labelled."""
        if len(items) != len(suffixes):
            raise ValueError(f"{len(items)} items but {len(suffixes)} texts; give one text per item")
        loaded: list[Any] = []
        counts: list[int] = []
        for row, item in enumerate(items):
            before = len(loaded)
            for source in pictures(item):
                picture = load_image(source)
                loaded.append(augment(picture, row) if augment is not None else picture)
            counts.append(len(loaded) - before)
        tensors: dict[str, Tensor] = {}
        shapes: list[Shape] = []
        if loaded:
            tensors, shapes = self.pictures.encode(loaded)

        prompts, start = [], 0
        for item, count in zip(items, counts, strict=True):
            prompts.append(self._prompt(item, tuple(shapes[start : start + count])))
            start += count
        width = max(len(ids) + len(suffix) for (ids, _), suffix in zip(prompts, suffixes, strict=True))
        input_ids = np.full((len(items), width), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(input_ids)
        labels = np.full_like(input_ids, IGNORE)
        axes = 3 if self.positions == "mrope" else 1
        position_ids = np.zeros((axes, len(items), width), dtype=np.int64)
        for row, ((ids, positions), suffix) in enumerate(zip(prompts, suffixes, strict=True)):
            first, cut = width - len(ids) - len(suffix), width - len(suffix)
            input_ids[row, first:cut] = ids
            input_ids[row, cut:] = suffix
            mask[row, first:] = 1
            labels[row, cut + unlabelled :] = suffix[unlabelled:]
            position_ids[:, row, first:cut] = positions
            position_ids[:, row, cut:] = positions.max() + 1 + np.arange(len(suffix))
        tensors["input_ids"] = torch.from_numpy(input_ids)
        tensors["attention_mask"] = torch.from_numpy(mask)
        tensors["position_ids"] = torch.from_numpy(position_ids if axes == 3 else position_ids[0])
        emb_position = torch.full((len(items),), width - 1 if embed else -1, dtype=torch.int64)
        return ModelInputs(tensors=tensors, emb_position=emb_position, labels=torch.from_numpy(labels))

    def _prompt(self, item: Item, shapes: tuple[Shape, ...]) -> tuple[Ids, Ids]:
        """Token ids [L] and position ids [3 or 1, L] of an item's prompt."""
        words = tuple(
            part.text if isinstance(part, Text) else len(part.frames) if isinstance(part, Video) else 1
            for part in item.parts
        )
        key = (item.instruction, words, shapes)
        found = self._prompts.get(key)
        if found is None:
            found = self._render(item, shapes)
            if len(self._prompts) >= _CACHE_LIMIT:
                self._prompts.clear()
            self._prompts[key] = found
        return found

    def _render(self, item: Item, shapes: tuple[Shape, ...]) -> tuple[Ids, Ids]:
        messages = render(item)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text":
                    part["text"] = self._plain(part["text"])
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )
        pieces = text.split(self.image_token)
        if len(pieces) != len(shapes) + 1:
            raise ValueError(
                f"the chat template wrote {len(pieces) - 1} picture placeholders for {len(shapes)} pictures; "
                f"use a template that writes one per picture"
            )
        text = pieces[0] + "".join(
            self.pictures.placeholder(shape) + piece for shape, piece in zip(shapes, pieces[1:], strict=True)
        )
        ids = self._encode(text)
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"a prompt of {len(ids)} tokens is longer than max_prompt_tokens={self.max_prompt_tokens} "
                f"(it begins with {item.instruction[:40] + ' ' + item.text[:40]!r}); shorten it or raise the limit"
            )
        if self.positions == "mrope":
            return ids, mrope_positions(ids, image_id=self.image_id, grids=[self.pictures.grid(s) for s in shapes])
        return ids, np.arange(len(ids), dtype=np.int64)[None]

    def _tokenise(self, text: str) -> Ids:
        found = self._texts.get(text)
        if found is None:
            found = self._encode(self._plain(text))[: self.max_rationale_tokens]
            if len(self._texts) >= _CACHE_LIMIT:
                self._texts.clear()
            self._texts[text] = found
        return found

    def _encode(self, text: str) -> Ids:
        return np.array(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def _plain(self, text: str) -> str:
        """Makes special tokens in a user's text ordinary characters: ``<emb>`` becomes ``< emb>``."""
        return self._special.sub(lambda match: match[0][0] + " " + match[0][1:], text)


def mrope_positions(ids: Ids, *, image_id: int, grids: Sequence[Shape]) -> Ids:
    """Position ids [3, L] (time, height, width) of a row with pictures of the given token grids.

    Text counts one by one on all three axes. A picture of r x c tokens keeps the time and counts rows and columns from
    there. The text that follows continues after max(r, c) (Qwen2-VL, arXiv 2409.12191, section 2.1).
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    is_picture = ids == image_id
    column, current = 0, 0
    for rows, columns in grids:
        start = column + int(np.argmax(is_picture[column:]))
        positions[:, column:start] = current + np.arange(start - column)
        current += start - column
        end = start + rows * columns
        positions[0, start:end] = current
        positions[1, start:end] = current + np.repeat(np.arange(rows), columns)
        positions[2, start:end] = current + np.tile(np.arange(columns), rows)
        current += max(rows, columns)
        column = end
    positions[:, column:] = current + np.arange(len(ids) - column)
    return positions
