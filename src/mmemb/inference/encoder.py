"""Embeds items in batches with a backbone and a pooler: direct, teacher-forced or adaptive.

Items are sorted by length for batching, and results come back in the order given, on the CPU. Nothing is sampled, so
results are deterministic. The training mode of every submodule is restored afterwards. If a batch does not fit into
memory, this batch and all later ones are halved. Results do not depend on the batch size.
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
"""Number of batches that share their last steps. If one of them does not fit into memory, all of them start again."""
_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Torch's message when a CPU runs out of memory, in a plain `RuntimeError`."""


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Switches modules to eval mode without gradients inside the context.

    Afterwards every submodule gets its own mode back, because the mode of frozen parts may differ from the rest.
    """
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
    """Turns items into embeddings.

    Args:
        backbone: the model. It runs on the device where it is.
        pooler: reads the embedding from the hidden states.
        batch_size: number of prompts in one forward pass. Steps that write rationales may have 50% more rows.
        budget: maximum number of rationale tokens per row, without ``<think>`` and ``</think>``.
        confidence_temperature: temperature of the softmax over the confidence bank, which gives the confidence.
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
        """Embeds B queries on the direct path. Rows with a rationale are teacher-forced.

        Returns:
            the embeddings [B, D] float32.

        Raises:
            ValueError: the numbers of rationales and items differ.
        """
        if rationales is not None and len(rationales) != len(items):
            raise ValueError(
                f"encode_queries: rationales has length {len(rationales)} for {len(items)} items; give a text or None "
                "per item"
            )

        def run(rows: list[int], size: int, reached: Callable[[int], None]) -> Tensor:
            thoughts = None if rationales is None else [rationales[row] for row in rows]
            return embed_items(self.model, [items[row] for row in rows], thoughts).float().cpu()

        order, parts = self._batches(items, run, "encode")
        if not parts:
            return torch.zeros(0, self.pooler.size)
        return torch.cat(parts)[_inverse(order)]

    def encode_targets(self, items: Sequence[Item]) -> Tensor:
        """Embeds targets and returns their embeddings [B, D] float32. Targets skip reasoning."""
        return self.encode_queries(items)

    def encode(
        self, items: Sequence[Item], controller: Controller, *, bank: Tensor | None = None, budget: int | None = None
    ) -> Encoded:
        """Embeds items, and reasons where the controller decides so. No row is encoded twice.

        Args:
            items: B items.
            controller: decides after the prefill.
            bank: [M, D] embeddings over which the confidence is computed. Some controllers need it.
            budget: maximum number of rationale tokens per row. None takes the encoder's own.
        """
        return self._adaptive(items, controller, bank, self.budget if budget is None else budget).encoded()

    def encode_paths(
        self, items: Sequence[Item], controller: Controller | None = None, *, bank: Tensor | None = None
    ) -> AdaptivePaths:
        """Computes both paths in one pass.

        ``state.direct`` holds the direct embeddings of all B items. ``embedding`` holds the reasoned embeddings, after
        rationales that the model wrote.

        Args:
            items: B items.
            controller: decides which rows reason. None: all rows, with the encoder's budget.
            bank: [M, D] embeddings over which the confidence is computed.
        """
        if controller is None:
            controller = create("controller", "always_reason")
        return self._adaptive(items, controller, bank, self.budget)

    def count_tokens(self, text: str) -> int:
        """Counts the tokens of a text with the backbone's tokenizer."""
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
        """Runs batches that are sorted by length.

        Args:
            items: the items.
            run: gets the rows of a window, the batch size, and a function to call with the number of rows done.
            title: title of the progress display.
            window: maximum number of batches in a window.

        Returns:
            the order of the rows, and one result per window.
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
                # This is outside the handler, because the traceback keeps the tensors of the failed batch alive.
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                warnings.warn(f"{size} rows do not fit into memory; continuing with {size // 2} at once", stacklevel=3)
                size //= 2
        return order, results


def _no_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or _CPU_MEMORY in str(error)


def merge_paths(order: Sequence[int], parts: Sequence[AdaptivePaths], *, width: int) -> AdaptivePaths:
    """Joins batches and restores the original order of the rows.

    Args:
        order: a permutation of the N rows: the order in which the batches hold them.
        parts: the batches. Empty for N = 0.
        width: D, needed when there are no batches.
    """
    if not parts:
        no_rows = torch.zeros(0)
        state = PrefillState(torch.zeros(0, 2), torch.zeros(0, width))
        undecided = Decision(no_rows.bool(), no_rows, no_rows.long())
        return AdaptivePaths(state, undecided, torch.zeros(0, width), [], [], no_rows.long(), no_rows.bool())
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
