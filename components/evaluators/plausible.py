"""Another evaluator's confidence, checked: is the text sound, and is it about this query?"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Sequence
from typing import Any

from mmemb.digests import item_digest, module_digest, seed_of
from mmemb.inference.embedder import load_encoder
from mmemb.inference.shared import log_likelihoods
from mmemb.interfaces import Backbone, Evaluator, Pooler
from mmemb.types import END_THINK, THINK, Item, Pair

_SPARE = 8  # times as many queries are kept as are compared: those with the pair's own target do not count


class PlausibleEvaluator(Evaluator, name="plausible"):
    """Another evaluator's confidence, less the nats by which other words or another query suit the writer better.

    A gain says that a rationale helps, not that it is right: an embedder finds the target by the right words in any
    order, and where it is unsure without a rationale, even nonsense may help. With p the model that writes, r' the
    words of r rearranged, q' other queries of the task with another target, and [x]+ = max(0, x) [D]:

        c'(q, t | r) = c(q, t | r) - [max over r' of log p(r' | q) - log p(r | q)]+
                                   - [max over q' of log p(r | q') - log p(r | q)]+
        c'(q, t | none) = c(q, t | none)

    Either part is a permutation test (Fisher 1935): words in random order, or a text that has nothing to do with its
    query, pass it with probability 1 / (alternatives + 1). A text that passes both is worth what it was. A single word
    has no other order, and a task with one target no other query: such a part is 0.

    Args:
        evaluator: gives the confidence c.
        writer: the model p: a checkpoint or run folder of ``mmemb fit``, a folder of `Embedder.save`, or a bare
            backbone's folder or hub id. None: the backbone given to `bind`, as it is when scoring.
        alternatives: most rearrangements, and most other queries, a rationale. Each costs a continuation of its length.
        batch_size: rows of one forward pass.
        seed: another seed draws other alternatives.

    Raises:
        ValueError: no alternative is asked for.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        writer: str | None = None,
        alternatives: int = 15,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if alternatives < 1:
            raise ValueError(f"plausible evaluator: alternatives is {alternatives}, expected 1 or more")
        self.evaluator = evaluator
        self.writer = writer
        self.alternatives = alternatives
        self.batch_size = batch_size
        self.seed = seed
        self._backbone: Backbone | None = None
        self._queries: dict[str, list[tuple[str, Pair]]] = {}  # by task: digest of the query, a pair that asks it

    def bind(self, backbone: Backbone, pooler: Pooler) -> None:
        """Gives the model in training to both; a writer of its own is kept."""
        self.evaluator.bind(backbone, pooler)
        if self.writer is None:
            self._backbone = backbone

    def prepare_bank(self, pairs: Sequence[Pair]) -> None:
        """See `Evaluator.prepare_bank`; draws the other queries too, whatever the order of the pairs."""
        self.evaluator.prepare_bank(pairs)
        every: dict[str, dict[str, Pair]] = {}
        for pair in sorted(pairs, key=lambda pair: pair.id):
            every.setdefault(pair.task, {}).setdefault(item_digest(pair.query), pair)
        self._queries = {}
        for task, asked in every.items():
            drawn = ((seed_of(self.seed, task, query), query) for query in asked)
            first = heapq.nsmallest(_SPARE * self.alternatives, drawn)
            self._queries[task] = [(query, asked[query]) for _, query in first]

    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        """See `Evaluator.score`.

        Raises:
            ValueError: a pair's task is not in the bank, or no model is there.
        """
        scores = self.evaluator.score(pairs, rationales)
        distinct = {(id(pair), text): pair for pair, text in zip(pairs, rationales, strict=True) if text is not None}
        doubts = self._doubts([(pair, text) for (_, text), pair in distinct.items()]) if distinct else []
        doubt_of = dict(zip(distinct, doubts, strict=True))
        return [
            score if text is None else score - doubt_of[id(pair), text]
            for score, pair, text in zip(scores, pairs, rationales, strict=True)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The other evaluator's, the writer (identity, a probe of its weights, its limits) and the arguments."""
        backbone = self._model()
        return {
            "of": {"evaluator": self.evaluator.name or type(self.evaluator).__qualname__, **self.evaluator.settings},
            "writer": backbone.identity,
            "weights": module_digest(backbone),
            "max_rationale_tokens": backbone.max_rationale_tokens,
            **backbone.prompt_settings,
            "alternatives": self.alternatives,
            "seed": self.seed,
        }

    def release(self) -> None:
        """Drops a writer of its own, which the next score loads again, and what the other evaluator can spare."""
        self.evaluator.release()
        if self.writer is not None:
            self._backbone = None

    def _model(self) -> Backbone:
        if self._backbone is None:
            if self.writer is None:
                raise ValueError("plausible evaluator: no writer; pass writer= or bind(backbone, pooler) first")
            self._backbone = load_encoder(self.writer, self.batch_size).backbone
        return self._backbone

    def _doubts(self, asked: Sequence[tuple[Pair, str]]) -> list[float]:
        """Nats >= 0 to take off, a (pair, text)."""
        backbone = self._model()
        think, end_think = backbone.token_id(THINK), backbone.token_id(END_THINK)
        items: list[Item] = []
        continuations: list[list[int]] = []

        def ask(item: Item, text: str) -> int:
            items.append(item)
            continuations.append([think, *backbone.tokenize(text), end_think])
            return len(items) - 1

        distinct = {id(pair): pair for pair, _ in asked}
        others_of = {key: self._other_queries(pair) for key, pair in distinct.items()}
        rows = []  # of each text: its own row, those of other orders, those of other queries
        for pair, text in asked:
            # As a rearrangement has it: what is longer than a rationale may be cut, blanks between words one each.
            words = backbone.decode(backbone.tokenize(text)[: backbone.max_rationale_tokens]).split()
            own = " ".join(words)
            orders = [ask(pair.query, other) for other in self._rearranged(words)]
            queries = [ask(other, own) for other in others_of[id(pair)]]
            rows.append((ask(pair.query, own), orders, queries))
        nats = log_likelihoods(backbone, items, continuations, batch_size=self.batch_size)
        return [
            sum(max(0.0, max(nats[row] for row in others) - nats[own]) for others in (orders, queries) if others)
            for own, orders, queries in rows
        ]

    def _rearranged(self, words: Sequence[str]) -> Iterator[str]:
        """Other orders of the words, distinct, drawn by the words."""
        draw = random.Random(seed_of(self.seed, "order", *words))
        seen, shuffled = {" ".join(words)}, list(words)
        for _ in range(4 * self.alternatives):  # few words have few orders
            if len(seen) > self.alternatives:
                return
            draw.shuffle(shuffled)
            text = " ".join(shuffled)
            if text not in seen:
                seen.add(text)
                yield text

    def _other_queries(self, pair: Pair) -> list[Item]:
        """Queries of the task that ask something else and have another target."""
        if pair.task not in self._queries:
            known = ", ".join(sorted(self._queries)) or "none"
            raise ValueError(
                f"plausible evaluator: no other queries for the task {pair.task!r}, only for: {known}; "
                f"call prepare_bank with the pairs of every task to be scored"
            )
        own = item_digest(pair.query)
        others = [
            other.query
            for query, other in self._queries[pair.task]
            if query != own and other.positive_id != pair.positive_id
        ]
        return others[: self.alternatives]
