"""Pairs, a worker and an evaluator for tests of the rationale pipeline. A text's score can be read off the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmemb.common.digests import item_digest, seed_of
from mmemb.interfaces import Evaluator, SetupContext, Worker
from mmemb.types import Item, Pair, Rationale, Text


class Killed(Exception):
    """Simulates a process that is stopped in the middle of its work."""


def make_pairs(count: int, *, tasks: int = 2, first: int = 0) -> list[Pair]:
    return [
        Pair(
            id=f"pair-{number}",
            task=f"task-{number % tasks}",
            query=Item("what is", (Text(f"thing {number}"),), {"rationale": f"it is {number}", "number": str(number)}),
            positive=Item("", (Text(f"target {number}"),)),
            positive_id=f"t{number}",
        )
        for number in range(first, first + count)
    ]


class Numbered(Worker):
    """Proposes 0 to k texts that depend on item, seed and number. Fails at call ``die_at``."""

    def __init__(self, *, label: str = "a", die_at: int | None = None) -> None:
        self.label = label
        self.die_at = die_at
        self.calls: list[int] = []

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        if self.die_at is not None and len(self.calls) == self.die_at:
            raise Killed
        self.calls.append(len(items))
        return [self._of(item, k, seed) for item in items]

    def _of(self, item: Item, k: int, seed: int) -> list[Rationale]:
        seeds = [seed_of(seed, self.label, item_digest(item), number) for number in range(k)]
        count = seeds[0] % (k + 1)
        return [
            Rationale(f"{self.label} {each % 1000}", "numbered", "model@1", each, 3, "length") for each in seeds[:count]
        ]

    @property
    def settings(self) -> dict[str, Any]:
        return {"label": self.label}


class ByNumber(Evaluator):
    """Scores a rationale by its last word / 1000 - 1, and a pair without a rationale by -0.5."""

    def __init__(self, *, shift: float = 0.0, die_at: int | None = None) -> None:
        self.shift = shift
        self.die_at = die_at
        self.bank: list[str] = []
        self.rows = 0
        self.calls = 0

    def setup(self, context: SetupContext) -> None:
        if context.pairs:
            self.bank = [pair.id for pair in context.pairs]

    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        if self.die_at is not None and self.calls == self.die_at:
            raise Killed
        self.calls += 1
        self.rows += len(pairs)
        return [self.value(text) for text in rationales]

    def value(self, text: str | None) -> float:
        return -0.5 if text is None else int(text.split()[-1]) / 1000 - 1 + self.shift

    @property
    def settings(self) -> dict[str, Any]:
        return {"shift": self.shift}
