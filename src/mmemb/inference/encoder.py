"""Batches items through a backbone and a pooler: direct, teacher-forced or adaptive.

Batches are sorted by length and results come back in the order given; nothing is sampled, so results are deterministic,
and the training mode of every submodule is restored afterwards. Embeddings return on the CPU. A batch that does not fit
the memory is halved, and so are those after it: a result does not depend on the batch size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmemb.common import terminal
from mmemb.common.checks import check_numbers
from mmemb.inference.adaptive import AdaptivePaths, adaptive_paths
from mmemb.inference.prompts import embed_items, length_order
from mmemb.interfaces import Backbone, Controller, Model, Pooler
from mmemb.registry import create
from mmemb.types import Decision, Encoded, Item, PrefillState

Result = TypeVar("Result")
_WINDOW = 16
"""Batches that share their last steps; where one of them does not fit the memory, all of them begin again."""
_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What torch says on a CPU, in a plain `RuntimeError`."""


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every submodule has its own mode back (frozen parts differ)."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


class Encoder:
    """Items -> embeddings.

    Args:
        backbone: the model; used where it lives.
        pooler: reads the embedding.
        batch_size: prompts of one forward pass; steps of thinking may have half as many rows more.
        budget: most rationale tokens of a row, ``<think>`` and ``</think>`` not counted.
        confidence_temperature: temperature of the softmax over a reference bank that gives a row's confidence.
        progress: whether to report progress over items (`mmemb.common.terminal`).
    """

    def __init__(
        self,
        backbone: Backbone,
        pooler: Pooler,
        *,
        batch_size: int = 64,
        budget: int = 48,
        confidence_temperature: float = 0.05,
        progress: bool = False,
    ) -> None:
        check_numbers("Encoder", at_least=1, batch_size=batch_size, budget=budget)
        check_numbers("Encoder", above=0, confidence_temperature=confidence_temperature)
        self.backbone = backbone
        self.pooler = pooler
        self.model = Model(backbone, pooler)
        self.batch_size = batch_size
        self.budget = budget
        self.confidence_temperature = confidence_temperature
        self.progress = progress

    def encode_queries(self, items: Sequence[Item], rationales: Sequence[str | None] | None = None) -> Tensor:
        """Embeddings [B, D] float32 of the direct path, or teacher-forced where a row has a rationale.

        Raises:
            ValueError: not one rationale (or None) an item.
        """
        if rationales is not None and len(rationales) != len(items):
            raise ValueError(
                f"encode_queries: {len(rationales)} rationales for {len(items)} items; give one (or None) an item"
            )

        def run(rows: list[int], size: int, reached: Callable[[int], None]) -> Tensor:
            thoughts = None if rationales is None else [rationales[row] for row in rows]
            return embed_items(self.model, [items[row] for row in rows], thoughts).float().cpu()

        order, parts = self._batches(items, run, "encode")
        if not parts:
            return torch.zeros(0, self.pooler.size)
        return torch.cat(parts)[_inverse(order)]

    def encode_targets(self, items: Sequence[Item]) -> Tensor:
        """Embeddings [B, D] float32 of targets: they never think."""
        return self.encode_queries(items)

    def encode(
        self, items: Sequence[Item], controller: Controller, *, bank: Tensor | None = None, budget: int | None = None
    ) -> Encoded:
        """Thinks where the controller says so; no row is encoded twice.

        Args:
            items: B items.
            controller: decides from the prefill.
            bank: [M, D] reference embeddings that give the confidence some controllers ask for.
            budget: most rationale tokens of a row; None: the encoder's own.
        """
        return self._adaptive(items, controller, bank, self.budget if budget is None else budget).encoded()

    def encode_paths(
        self, items: Sequence[Item], controller: Controller | None = None, *, bank: Tensor | None = None
    ) -> AdaptivePaths:
        """Both paths in one pass: ``state.direct`` of all B items, and ``embedding`` after a self-written rationale.

        Args:
            items: B items.
            controller: decides which rows reason; None: all of them, with the encoder's budget.
            bank: [M, D] reference embeddings that give the confidence.
        """
        if controller is None:
            controller = create("controller", "always_reason")
        return self._adaptive(items, controller, bank, self.budget)

    def count_tokens(self, text: str) -> int:
        """Length of a text in the backbone's tokens."""
        return self.backbone.count_tokens(text)

    def _adaptive(
        self, items: Sequence[Item], controller: Controller, bank: Tensor | None, budget: int
    ) -> AdaptivePaths:
        bank = None if bank is None else bank.to(self.backbone.device)

        def run(rows: list[int], size: int, reached: Callable[[int], None]) -> AdaptivePaths:
            return adaptive_paths(
                self.model,
                [items[row] for row in rows],
                controller,
                budget=budget,
                bank=bank,
                confidence_temperature=self.confidence_temperature,
                batch_size=size,
                reached=reached,
            )

        found = self._batches(items, run, "think and encode", window=_WINDOW)
        return merge_paths(*found, width=self.pooler.size)

    def _batches(
        self,
        items: Sequence[Item],
        run: Callable[[list[int], int, Callable[[int], None]], Result],
        title: str,
        *,
        window: int = 1,
    ) -> tuple[list[int], list[Result]]:
        """Runs length-sorted batches; the row order used, and one result a window of batches.

        Args:
            items: the items.
            run: is given the rows of a window, the size of a batch and what to tell how many rows it has reached.
            title: what the progress is called.
            window: most batches of a window.
        """
        order = length_order(items)
        results: list[Result] = []
        start, size = 0, self.batch_size
        shown = terminal.progress(title, len(items), unit="items", show=self.progress and bool(items))
        with evaluating(self.backbone, self.pooler), shown as bar:
            while start < len(order):
                rows = order[start : start + size * window]
                size = min(size, len(rows))

                def reached(count: int, start: int = start) -> None:
                    bar.reach(start + count)

                try:
                    result = run(rows, size, reached)
                except RuntimeError as error:
                    if size == 1 or not _no_memory(error):
                        raise
                else:
                    results.append(result)
                    start += len(rows)
                    bar.reach(start)
                    continue
                # Out of the handler: the traceback kept the failed batch's tensors alive.
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                warnings.warn(f"{size} rows do not fit the memory; going on with {size // 2} at once", stacklevel=3)
                size //= 2
        return order, results


def _no_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or _CPU_MEMORY in str(error)


def merge_paths(order: Sequence[int], parts: Sequence[AdaptivePaths], *, width: int) -> AdaptivePaths:
    """Joins batches whose rows, in turn, are rows ``order`` of the whole; the result is in the original order.

    Args:
        order: a permutation of the N rows.
        parts: the batches; none for N = 0.
        width: D, for the case without batches.
    """
    if not parts:
        no_rows = torch.zeros(0)
        state = PrefillState(torch.zeros(0, 2), torch.zeros(0, width))
        nobody = Decision(no_rows.bool(), no_rows, no_rows.long())
        return AdaptivePaths(state, nobody, torch.zeros(0, width), [], [], no_rows.long(), no_rows.bool())
    back = _inverse(order)
    places = back.tolist()
    confidences = [part.state.confidence for part in parts]
    known = [each for each in confidences if each is not None]
    rationale = [text for part in parts for text in part.rationale]
    token_ids = [ids for part in parts for ids in part.token_ids]
    return AdaptivePaths(
        state=PrefillState(
            decision_logits=torch.cat([part.state.decision_logits for part in parts])[back],
            direct=torch.cat([part.state.direct for part in parts])[back],
            confidence=torch.cat(known)[back] if len(known) == len(parts) else None,
        ),
        decision=Decision(
            think=torch.cat([part.decision.think for part in parts])[back],
            probability=torch.cat([part.decision.probability for part in parts])[back],
            budget=torch.cat([part.decision.budget for part in parts])[back],
        ),
        embedding=torch.cat([part.embedding for part in parts])[back],
        rationale=[rationale[place] for place in places],
        token_ids=[token_ids[place] for place in places],
        tokens=torch.cat([part.tokens for part in parts])[back],
        truncated=torch.cat([part.truncated for part in parts])[back],
        direct_seconds=sum(part.direct_seconds for part in parts),
        think_seconds=sum(part.think_seconds for part in parts),
    )


def _inverse(order: Sequence[int]) -> Tensor:
    inverse = torch.empty(len(order), dtype=torch.int64)
    inverse[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    return inverse
