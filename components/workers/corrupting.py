"""The worker that damages another worker's candidates, as a control to test selection."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from mmemb.common.checks import check_numbers
from mmemb.common.digests import item_digest, item_key, seed_of
from mmemb.interfaces import SetupContext, Worker
from mmemb.types import Item, Rationale

Corruption = Literal["wrong_entity", "shuffled", "empty_talk"]

EMPTY_TALK = (
    "let me think about this step by step before i decide",
    "this is an interesting question with several sides to it",
    "there are many things that one could say about this",
    "first i look at the input , then i consider what it means",
    "it is important to pay attention to every detail here",
    "the answer depends on what exactly is being asked",
    "taking everything into account , a careful look is needed",
    "i should compare what i see with what i know",
)
"""Sentences that fit any item and so say nothing about it."""

_DONORS_TRIED = 3  # each costs the other worker one more item, and most of them give a different text


class CorruptingWorker(Worker, name="corrupting"):
    """Damages a share of another worker's candidates and records the damage in `Rationale.corruption`.

    - ``wrong_entity``: the worker's candidate for another item, with the same instruction if there is one.
    - ``shuffled``: the same words in random order (for two words or more).
    - ``empty_talk``: a sentence that says nothing.

    If a kind of damage is impossible for a candidate (one word cannot be shuffled), the next kind is used.

    Args:
        worker: the worker whose candidates are damaged.
        share: probability that a candidate is damaged, from 0 to 1.
        kinds: kinds of damage, all equally likely.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        share: float = 0.5,
        kinds: Sequence[Corruption] = ("wrong_entity", "shuffled", "empty_talk"),
    ) -> None:
        check_numbers("workers.corrupting", at_least=0, at_most=1, share=share)
        if unknown := set(kinds) - {"wrong_entity", "shuffled", "empty_talk"}:
            raise ValueError(
                f"corrupting worker: unknown kinds {sorted(unknown)}; choose from wrong_entity, shuffled, empty_talk"
            )
        if not kinds:
            raise ValueError(
                "corrupting worker: kinds is empty; name at least one of wrong_entity, shuffled, empty_talk"
            )
        self.worker = worker
        self.share = share
        self.kinds = tuple(kinds)
        self._items: list[Item] = []
        self._of_instruction: dict[str, list[int]] = {}

    def setup(self, context: SetupContext) -> None:
        """Sets the other worker up, and keeps the items, from which wrong entities are taken."""
        self.worker.setup(context)
        if not context.items:
            return
        self._items = list(context.items)
        self._of_instruction = {}
        for number, item in enumerate(self._items):
            self._of_instruction.setdefault(item.instruction, []).append(number)

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """See `Worker.propose`: the other worker's candidates, damaged or unchanged, all under this worker's name.

        Raises:
            ValueError: ``kinds`` includes ``wrong_entity`` and `setup` got no items.
        """
        if "wrong_entity" in self.kinds and not self._items and items:
            raise ValueError("corrupting worker: a wrong entity needs other items; call setup with items first")
        proposals = self.worker.propose(items, k, seed=seed)
        donors = [self._donors(item, seed) if "wrong_entity" in self.kinds else [] for item in items]
        foreign = iter(self.worker.propose([donor for of_item in donors for donor in of_item], k, seed=seed))
        others = [[text for _ in of_item for text in next(foreign)] for of_item in donors]
        return [
            self._damaged(item, rationales, strange, seed)
            for item, rationales, strange in zip(items, proposals, others, strict=True)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The other worker's settings, the share and the kinds."""
        return {
            "worker": self.name,
            "of": {"worker": self.worker.name or type(self.worker).__qualname__, **self.worker.settings},
            "share": self.share,
            "kinds": list(self.kinds),
        }

    @property
    def report(self) -> str:
        """The other worker's report, since the damage costs nothing."""
        return self.worker.report

    def release(self) -> None:
        """Releases the memory of the other worker."""
        self.worker.release()

    def _donors(self, item: Item, seed: int) -> list[Item]:
        """Items whose rationales may replace this item's, drawn with a seed made from its content."""
        own = item_key(item)
        alike = self._of_instruction.get(item.instruction, [])
        pool: Sequence[int] = alike if len(alike) > 1 else range(len(self._items))
        draw = random.Random(seed_of(seed, "donors", item_digest(item)))
        drawn = (self._items[number] for number in draw.sample(pool, min(_DONORS_TRIED, len(pool))))
        return [donor for donor in drawn if item_key(donor) != own]

    def _damaged(
        self, item: Item, rationales: Sequence[Rationale], strange: Sequence[Rationale], seed: int
    ) -> list[Rationale]:
        own = item_digest(item)
        taken = {rationale.text for rationale in rationales}
        out = []
        for number, rationale in enumerate(rationales):
            draw = random.Random(seed_of(seed, "corrupt", own, number))
            made = replace(rationale, worker=self.name)
            if draw.random() < self.share:
                first = draw.randrange(len(self.kinds))
                for kind in self.kinds[first:] + self.kinds[:first]:
                    damaged = self._by(kind, made, strange, draw, taken)
                    if damaged is not None:
                        made = damaged
                        taken.add(made.text)
                        break
            out.append(made)
        return out

    @staticmethod
    def _by(
        kind: Corruption, rationale: Rationale, strange: Sequence[Rationale], draw: random.Random, taken: set[str]
    ) -> Rationale | None:
        """The candidate with one kind of damage; None if the damage cannot give a new text."""
        if kind == "wrong_entity":
            other = next((each for each in strange if each.text not in taken), None)
            return None if other is None else replace(other, worker=rationale.worker, corruption=kind)
        if kind == "shuffled":
            words = rationale.text.split()
            draw.shuffle(words)
            texts = [" ".join(words), " ".join(words[::-1])]  # with two words, one order is the candidate's own
        else:
            texts = draw.sample(EMPTY_TALK, len(EMPTY_TALK))
        text = next((each for each in texts if each not in taken), None)
        tokens = rationale.tokens if kind == "shuffled" else 0
        return None if text is None else replace(rationale, text=text, tokens=tokens, corruption=kind)
