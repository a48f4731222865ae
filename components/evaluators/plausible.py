"""The evaluator that checks another evaluator's confidence: is the text sound, and is it about this query?"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import random
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from mmemb.common.checks import check_numbers
from mmemb.common.digests import item_digest, item_key, module_digest, seed_of
from mmemb.inference.embedder import load_encoder
from mmemb.inference.prompts import thought_tokens
from mmemb.inference.shared_prompts import log_likelihoods
from mmemb.interfaces import Backbone, Evaluator, SetupContext
from mmemb.types import Item, Pair

_SPARE = 8  # keeps this many times the queries that are compared, since those with the pair's own target do not count


class _Asked(NamedTuple):
    """A query, the first pair that has it, and every target that it comes with."""

    query: Item
    pair_id: str
    targets: set[str]


class PlausibleEvaluator(Evaluator, name="plausible"):
    """Lowers another evaluator's confidence by the nats by which alternatives are more likely under the writer.

    A gain says that a rationale helps, not that it is right. An embedder finds the target by the right words in any
    order, and where it is unsure without a rationale, even nonsense may help. The check is our choice. With p the model
    that writes, r' the words of r rearranged, q' other queries of the task with another target, and
    [x]+ = max(0, x):

        c'(q, t | r) = c(q, t | r) - [max over r' of log p(r' | q) - log p(r | q)]+
                                   - [max over q' of log p(r | q') - log p(r | q)]+
        c'(q, t | none) = c(q, t | none)

    Each part is a permutation test (Fisher 1935). Words in random order, or a text that is unrelated to its query, pass
    it with probability 1 / (n + 1). Here n is the number of alternatives, at most ``alternatives``. Two words have one
    other order. A single word has none, and then that part is 0. A text that passes both parts keeps its confidence. A
    text that fails loses the nats by which it fails, and a larger gain can outweigh them.

    A writer in half precision rounds its logits, so small differences between alternatives are noise.

    Args:
        evaluator: gives the confidence c.
        writer: the model p: a checkpoint or run folder of ``mmemb fit``, a folder of `Embedder.save`, or a bare
            backbone's folder or hub id. None for the backbone given to `setup`, with its weights at scoring time.
        alternatives: maximum number of rearrangements, and of other queries, per rationale. Each costs a continuation
            as long as the rationale, and so does the rationale itself.
        batch_size: rows per forward pass.
        seed: seed of the drawn alternatives.

    Raises:
        ValueError: ``alternatives`` is below 1.
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
        check_numbers("evaluators.plausible", at_least=1, alternatives=alternatives, batch_size=batch_size)
        self.evaluator = evaluator
        self.writer = writer
        self.alternatives = alternatives
        self.batch_size = batch_size
        self.seed = seed
        self._backbone: Backbone | None = None
        self._queries: dict[str, list[_Asked]] = {}  # by task

    def setup(self, context: SetupContext) -> None:
        """See `Evaluator.setup`; sets the other evaluator up too. A separate writer is kept.

        The other queries are drawn from ``context.pairs``. The order of the pairs has no effect.
        """
        self.evaluator.setup(context)
        if self.writer is None and context.model is not None:
            self._backbone = context.model.backbone
        if context.pairs:
            self._draw_queries(context.pairs)

    def _draw_queries(self, pairs: Sequence[Pair]) -> None:
        every: dict[str, dict[Hashable, _Asked]] = {}
        for pair in sorted(pairs, key=lambda pair: pair.id):
            asked = every.setdefault(pair.task, {})
            asked.setdefault(item_key(pair.query), _Asked(pair.query, pair.id, set())).targets.add(pair.positive_id)
        self._queries = {}
        for task, asked in every.items():
            drawn = functools.partial(self._drawn, task)
            self._queries[task] = heapq.nsmallest(_SPARE * self.alternatives, asked.values(), key=drawn)

    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        """See `Evaluator.score`.

        Raises:
            ValueError: a pair's task is not in the bank, there is no model yet, or a likelihood is not finite.
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
        """The other evaluator's settings, the writer's identity, weight probe and limits, and the arguments."""
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
        """Frees a separate writer, which the next score loads again, and the memory of the other evaluator."""
        self.evaluator.release()
        if self.writer is not None:
            self._backbone = None

    def _model(self) -> Backbone:
        if self._backbone is None:
            if self.writer is None:
                raise ValueError(
                    "plausible evaluator: no writer; pass writer=, or call setup with the model in training first"
                )
            self._backbone = load_encoder(self.writer, self.batch_size).backbone
        return self._backbone

    def _doubts(self, asked: Sequence[tuple[Pair, str]]) -> list[float]:
        """Nats >= 0 to subtract, for each (pair, text)."""
        backbone = self._model()
        items: list[Item] = []
        continuations: list[list[int]] = []

        def ask(item: Item, text: str) -> int:
            items.append(item)
            continuations.append(thought_tokens(backbone.token_id, backbone.tokenize(text))[:-1])  # without ``<emb>``
            return len(items) - 1

        distinct = {id(pair): pair for pair, _ in asked}
        others_of = {key: self._other_queries(pair) for key, pair in distinct.items()}
        rows = []  # for each text: its own row, the rows of other orders, the rows of other queries
        for pair, text in asked:
            # In the form of a rearrangement: cut to the rationale's maximum length, with one blank between words.
            words = backbone.decode(backbone.tokenize(text)[: backbone.max_rationale_tokens]).split()
            own = " ".join(words)
            orders = [ask(pair.query, other) for other in self._rearranged(words)]
            queries = [ask(other, own) for other in others_of[id(pair)]]
            rows.append((ask(pair.query, own), orders, queries))
        nats = log_likelihoods(backbone, items, continuations, batch_size=self.batch_size)
        if not all(map(math.isfinite, nats)):
            raise ValueError(
                f"plausible evaluator: {backbone.identity} gives a likelihood that is not finite; "
                f"load the writer in bfloat16 or float32"
            )
        return [
            sum(max(0.0, max(nats[row] for row in others) - nats[own]) for others in (orders, queries) if others)
            for own, orders, queries in rows
        ]

    def _rearranged(self, words: Sequence[str]) -> Iterator[str]:
        """Distinct other orders of the words, drawn with a seed made from the words."""
        draw = random.Random(seed_of(self.seed, "order", *words))
        seen, shuffled = {" ".join(words)}, list(words)
        for _ in range(4 * self.alternatives):  # a few words have only a few orders
            if len(seen) > self.alternatives:
                return
            draw.shuffle(shuffled)
            text = " ".join(shuffled)
            if text not in seen:
                seen.add(text)
                yield text

    def _other_queries(self, pair: Pair) -> list[Item]:
        """Other queries of the task, with different content and another target."""
        if pair.task not in self._queries:
            known = ", ".join(sorted(self._queries)) or "none"
            raise ValueError(
                f"plausible evaluator: there are no other queries for the task {pair.task!r}, only for: {known}; "
                f"call setup with pairs of every task to be scored"
            )
        own = item_key(pair.query)
        others = (
            other.query
            for other in self._queries[pair.task]
            if pair.positive_id not in other.targets and item_key(other.query) != own
        )
        return list(itertools.islice(others, self.alternatives))

    def _drawn(self, task: str, asked: _Asked) -> tuple[int, str]:
        """A query's rank in the drawn order, which does not depend on the disk.

        Ids break the ties between pictures of the same name.
        """
        return seed_of(self.seed, task, item_digest(asked.query)), asked.pair_id
