"""The evaluator without a judge: does the rationale bring the query nearer to its target than to other targets?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.common.digests import module_digest, portable_id, seed_of
from mmemb.inference.embedder import load_encoder
from mmemb.inference.encoder import Encoder
from mmemb.inference.shared_prompts import encode_arms
from mmemb.interfaces import Evaluator, SetupContext
from mmemb.types import Item, Pair


class RetrievalEvaluator(Evaluator, name="retrieval"):
    """Scores the log-probability of the true target among negatives of the pair's own task, under a frozen embedder.

    The formula is our choice. With e = f(q, r) (f(q) without a rationale), t the true target and t' the negatives:

        c(q, t | r) = cos(e, t) / temperature - log(sum over t and all t' of exp(cos(e, .) / temperature))

    Negatives are the first ``negatives`` other targets of the task, in an order drawn by the seed. So they do not
    depend on the order of the data. Each task's targets are embedded once. A task with a single target scores 0 in
    every arm.

    Args:
        embedder: a trained model: a checkpoint or run folder of ``mmemb fit``, or a folder of `Embedder.save`. It may
            also be a bare backbone's folder or hub id, read at ``<emb>``. None for the backbone and pooler given to
            `setup`, with their weights at scoring time.
        temperature: divides the cosines.
        negatives: maximum number of negatives per pair.
        batch_size: rows per forward pass.
        seed: seed of the drawn negatives.
    """

    def __init__(
        self,
        embedder: str | None = None,
        *,
        temperature: float = 0.05,
        negatives: int = 256,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        check_numbers("evaluators.retrieval", above=0, temperature=temperature)
        check_numbers("evaluators.retrieval", at_least=1, negatives=negatives, batch_size=batch_size)
        self.embedder = embedder
        self.temperature = temperature
        self.negatives = negatives
        self.batch_size = batch_size
        self.seed = seed
        self._encoder: Encoder | None = None
        self._bank: dict[str, dict[str, Item]] = {}
        self._embedded: dict[str, tuple[list[str], Tensor]] = {}

    def setup(self, context: SetupContext) -> None:
        """See `Evaluator.setup`. An evaluator with a separate embedder keeps it."""
        if self.embedder is None and context.model is not None:
            self._encoder = Encoder(context.model.backbone, context.model.pooler, batch_size=self.batch_size)
            self._embedded = {}
        if context.pairs:
            self._draw_negatives(context.pairs)

    def _draw_negatives(self, pairs: Sequence[Pair]) -> None:
        every: dict[str, dict[str, Item]] = {}
        for pair in pairs:
            every.setdefault(pair.task, {}).setdefault(pair.positive_id, pair.positive)
        self._bank, self._embedded = {}, {}
        for task, targets in every.items():
            drawn = {target: seed_of(self.seed, task, portable_id(target, item)) for target, item in targets.items()}
            order = sorted(targets, key=lambda target: (drawn[target], target))
            # One more than needed, so that a pair whose own target is drawn has as many negatives as the others.
            self._bank[task] = {target: targets[target] for target in order[: self.negatives + 1]}
            if len(targets) == 1:
                warnings.warn(
                    f"retrieval evaluator: the task {task!r} has only one target, so no rationale can have a gain",
                    stacklevel=2,
                )

    def score(self, pairs: Sequence[Pair], rationales: Sequence[str | None]) -> list[float]:
        """See `Evaluator.score`.

        Raises:
            ValueError: a pair's task is not in the bank, or there is no model yet.
        """
        if not pairs:
            return []
        encoder = self._frozen()
        queries = encode_arms(encoder, [pair.query for pair in pairs], rationales).double()
        truths = self._embed_positives(pairs)
        scores = [0.0] * len(pairs)
        rows_of: dict[str, list[int]] = {}
        for row, pair in enumerate(pairs):
            rows_of.setdefault(pair.task, []).append(row)
        for task, rows in rows_of.items():
            ids, bank = self._task_bank(task)
            query = queries[rows]
            true = (query * truths[rows]).sum(dim=1, keepdim=True)  # [n, 1]
            positives = [pairs[row].positive_id for row in rows]
            logits = torch.cat([true, query @ bank.T], dim=1) / self.temperature  # [n, 1 + M]
            logits[:, 1:].masked_fill_(self._left_out(ids, positives), -torch.inf)
            for row, value in zip(rows, logits.log_softmax(dim=1)[:, 0].tolist(), strict=True):
                scores[row] = value
        return scores

    @property
    def settings(self) -> dict[str, Any]:
        """The embedder's identity, a probe of its weights, its limits, and the arguments that change scores."""
        encoder = self._frozen()
        return {
            "embedder": encoder.backbone.identity,
            "weights": [module_digest(encoder.backbone), module_digest(encoder.pooler)],
            "max_rationale_tokens": encoder.backbone.max_rationale_tokens,
            **encoder.backbone.prompt_settings,
            "temperature": self.temperature,
            "negatives": self.negatives,
            "seed": self.seed,
        }

    def release(self) -> None:
        """Frees a separate embedder, which the next score loads again, and the bank's embeddings."""
        if self.embedder is not None:
            self._encoder = None
        self._embedded = {}

    def _frozen(self) -> Encoder:
        if self._encoder is None:
            if self.embedder is None:
                raise ValueError(
                    "retrieval evaluator: no embedder; pass embedder=, or call setup with the model in training first"
                )
            self._encoder = load_encoder(self.embedder, self.batch_size)
        return self._encoder

    def _task_bank(self, task: str) -> tuple[list[str], Tensor]:
        """Ids of a task's M bank targets and their embeddings [M, D], computed at the first call."""
        if task not in self._bank:
            known = ", ".join(sorted(self._bank)) or "none"
            raise ValueError(
                f"retrieval evaluator: there are no negatives for the task {task!r}, only for: {known}; "
                f"call setup with pairs of every task to be scored"
            )
        if task not in self._embedded:
            items = self._bank[task]
            self._embedded[task] = list(items), self._frozen().encode_targets(list(items.values())).double().cpu()
        return self._embedded[task]

    def _embed_positives(self, pairs: Sequence[Pair]) -> Tensor:
        """Embeddings [B, D] of the true targets, from the bank where possible; each other one is embedded once."""
        known: dict[tuple[str, str], Tensor] = {}
        for task in {pair.task for pair in pairs}:
            ids, bank = self._task_bank(task)
            known.update(((task, target), row) for target, row in zip(ids, bank, strict=True))
        others = {(pair.task, pair.positive_id): pair.positive for pair in pairs}
        others = {key: item for key, item in others.items() if key not in known}
        if others:
            embedded = self._frozen().encode_targets(list(others.values())).double().cpu()
            known.update(zip(others, embedded, strict=True))
        return torch.stack([known[pair.task, pair.positive_id] for pair in pairs])

    def _left_out(self, ids: list[str], positives: list[str]) -> Tensor:
        """[n, M] bool, the bank target that is not a negative of a row: its own target, or else the spare one."""
        left_out = torch.zeros(len(positives), len(ids), dtype=torch.bool)
        place = {target: column for column, target in enumerate(ids)}
        for row, positive in enumerate(positives):
            column = place.get(positive)
            if column is None and len(ids) > self.negatives:
                column = len(ids) - 1
            if column is not None:
                left_out[row, column] = True
        return left_out
