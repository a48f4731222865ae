"""Compares adaptive decoding with other methods and with its floor: throughput, equal embeddings, memory.

    python -m benchmarks.inference [--smoke] [--device cpu] [--repeats 5] [--output FOLDER]

The bundled model embeds the same rows (queries of all tasks, mixed) with every method, and all methods must give the
same embeddings. ``reason`` says which rows reason: ``always`` means all of them. ``half`` is the model's own decision,
with its logit shifted so that half of the rows reason. The methods:

    mmemb           `mmemb.inference.encoder.Encoder`: one prefill; the rows that reason continue from its cache
    floor           the same prefills, then batch by batch only the forward passes of the tokens that were needed;
                    ours can be faster, because the last rows of a batch share the steps of the next batch
    row_read        one row at a time through ``model.generate``; the state at <emb> is read from its hidden states
    row_reencode    one row at a time through ``model.generate``; then the whole text is encoded again
    batch_reencode  batches through ``model.generate`` in the order of the rows; then the whole text is encoded again
    batch_sorted    the same with the batches that mmemb makes, sorted by length, to show how much the sorting gives

The library's generation gets everything that helps it: greedy search, a grammar that allows only
``<think> ... </think> <emb>``, and an end as soon as all rows of a batch are done. The direct rows of ``half`` are
generated with the others, since one pass serves all. Their first token is ``<emb>``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from benchmarks import harness
from mmemb.data.bundled import evaluation_tasks
from mmemb.inference.adaptive import AdaptivePaths
from mmemb.inference.encoder import Encoder, evaluating
from mmemb.inference.prompts import embed_states, length_order, prefill
from mmemb.inference.token_loop import COMPACT_SHARE
from mmemb.interfaces import Backbone, Controller, Model, Pooler
from mmemb.registry import create
from mmemb.types import EMB, END_THINK, THINK, Item

TOLERANCE = 1e-4
_MEMORY = ("mmemb", "floor", "batch_reencode", "batch_sorted")
"""Methods whose peak memory is measured, because they hold a whole batch."""
Way = Callable[[], Tensor]


class Grammar(LogitsProcessor):
    """Makes ``generate`` write only ``<emb>``, or ``<think>``, at most ``budget`` tokens, ``</think>`` and ``<emb>``.

    Args:
        backbone: the model, which knows the special tokens.
        prompt: number of columns of the prompts.
        budget: maximum number of rationale tokens per row.
        offset: number added to the logit of ``<think>`` at the decision.
    """

    def __init__(self, backbone: Backbone, prompt: int, *, budget: int, offset: float) -> None:
        self.think, self.end, self.emb = (backbone.token_id(token) for token in (THINK, END_THINK, EMB))
        self.ends = torch.tensor([self.end, *backbone.special_ids], device=backbone.device)
        self.prompt, self.budget, self.offset = prompt, budget, offset

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Restricts the scores [B, V] of the token after input_ids [B, T]."""
        written = input_ids.shape[1] - self.prompt
        allowed = torch.full_like(scores, -torch.inf)
        if written == 0:
            allowed[:, self.think] = scores[:, self.think] + self.offset
            allowed[:, self.emb] = scores[:, self.emb]
            return allowed
        last = input_ids[:, -1:]
        scores = scores.clone()
        stops = scores[:, self.ends].amax(1)  # any special token ends the rationale, as it does in mmemb
        scores[:, self.ends] = -torch.inf
        scores[:, self.end] = stops
        scores[:, [self.think, self.emb]] = -torch.inf
        if written > self.budget:
            scores = allowed.clone().index_fill_(1, torch.tensor([self.end], device=scores.device), 0.0)
        closed = allowed.index_fill_(1, torch.tensor([self.emb], device=scores.device), 0.0)
        return torch.where((last == self.end) | (last == self.emb), closed, scores)


class AfterEmb(StoppingCriteria):
    """Ends a row when the state at ``<emb>`` has been computed."""

    def __init__(self, emb: int) -> None:
        self.emb = emb

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """[B] bool, whether the last token but one is ``<emb>``."""
        return input_ids[:, -2] == self.emb


class Ways:
    """All methods to compute the embeddings of the same rows.

    Args:
        backbone: the model.
        pooler: reads the embedding; it needs only the state at ``<emb>``.
        items: the rows.
        controller: decides which rows reason.
        offset: number that the controller adds to the logit of ``<think>`` at the decision.
        batch_size: rows per batch.
        budget: maximum number of rationale tokens per row.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooler: Pooler,
        items: Sequence[Item],
        controller: Controller,
        *,
        offset: float,
        batch_size: int,
        budget: int,
    ) -> None:
        self.backbone, self.pooler, self.items, self.controller = backbone, pooler, items, controller
        self.offset, self.batch_size, self.budget = offset, batch_size, budget
        self.encoder = Encoder(backbone, pooler, batch_size=batch_size, budget=budget)
        self.paths = self.mmemb()
        self.emb = backbone.token_id(EMB)

    def mmemb(self) -> AdaptivePaths:
        """Ours."""
        return self.encoder.encode_paths(self.items, self.controller)

    def ways(self) -> dict[str, Way]:
        """All methods by name; each returns embeddings [B, D]."""
        return {
            "mmemb": lambda: self.mmemb().embedding,
            "floor": self.floor,
            "row_read": lambda: self.generated(1, read=True),
            "row_reencode": lambda: self.generated(1, read=False),
            "batch_reencode": lambda: self.generated(self.batch_size, read=False, in_order=True),
            "batch_sorted": lambda: self.generated(self.batch_size, read=False),
        }

    def batches(self, size: int, *, in_order: bool = False) -> Iterator[list[int]]:
        """Yields the rows of each batch that mmemb makes, or of batches in the order of the rows."""
        order = list(range(len(self.items))) if in_order else length_order(self.items)
        yield from (order[start : start + size] for start in range(0, len(order), size))

    def floor(self) -> Tensor:
        """Runs one prefill and only the forward passes of the tokens that are needed."""
        whole = torch.zeros(len(self.items), self.pooler.size)
        with evaluating(self.backbone, self.pooler):
            for rows in self.batches(self.batch_size):
                prefix = prefill(self.backbone, [self.items[row] for row in rows])
                whole[rows] = embed_states(self.pooler, self._fed(prefix, rows)).cpu()
        return whole

    def _fed(self, prefix: Any, rows: Sequence[int]) -> Tensor:
        """Returns the states at ``<emb>`` [R, H].

        The known tokens are fed one column per step, and rows that are done leave the batch.
        """
        think, end = self.backbone.token_id(THINK), self.backbone.token_id(END_THINK)
        device = self.backbone.device
        thinks = self.paths.decision.think
        texts = [[think, *self.paths.token_ids[row], end, self.emb] if thinks[row] else [self.emb] for row in rows]
        states = torch.zeros(len(rows), self.backbone.hidden_size, device=device)
        direct = [place for place, text in enumerate(texts) if len(text) == 1]
        alive = [place for place, text in enumerate(texts) if len(text) > 1]
        if direct:
            at = torch.tensor(direct, device=device)
            hidden, _ = self.backbone.extend(
                self.backbone.fork(prefix, at), torch.full((len(at), 1), self.emb, device=device)
            )
            states[at] = hidden[:, -1]
        if direct and alive:
            prefix = self.backbone.fork(prefix, torch.tensor(alive, device=device))
        step = 0
        while alive:
            feed = torch.tensor([[texts[place][min(step, len(texts[place]) - 1)]] for place in alive], device=device)
            hidden, prefix = self.backbone.extend(prefix, feed)
            step += 1
            ending = [index for index, place in enumerate(alive) if len(texts[place]) == step]
            if ending:
                states[[alive[index] for index in ending]] = hidden[ending, -1]
            left = [index for index, place in enumerate(alive) if len(texts[place]) > step]
            if not left:
                break
            if len(alive) - len(left) >= COMPACT_SHARE * len(alive):
                prefix = self.backbone.fork(prefix, torch.tensor(left, device=device))
                alive = [alive[index] for index in left]
        return states

    @torch.no_grad()
    def generated(self, size: int, *, read: bool, in_order: bool = False) -> Tensor:
        """Embeds with the library's ``generate``, then from its hidden states or by encoding again."""
        whole = torch.zeros(len(self.items), self.pooler.size)
        with evaluating(self.backbone, self.pooler):
            for rows in self.batches(size, in_order=in_order):
                whole[rows] = embed_states(self.pooler, self._generated([self.items[row] for row in rows], read)).cpu()
        return whole

    def _generated(self, items: Sequence[Item], read: bool) -> Tensor:
        inputs = self.backbone.prepare(items, embed=False).to(self.backbone.device).tensors
        del inputs["position_ids"]  # the library's own position ids are part of the comparison
        prompt = inputs["input_ids"]
        model: Any = self.backbone.model
        done = model.generate(
            **inputs,
            mm_token_type_ids=(prompt == model.config.image_token_id).int(),
            do_sample=False,
            max_new_tokens=self.budget + 4,
            eos_token_id=None if read else self.emb,
            pad_token_id=self.emb,
            logits_processor=LogitsProcessorList(
                [Grammar(self.backbone, prompt.shape[1], budget=self.budget, offset=self.offset)]
            ),
            stopping_criteria=StoppingCriteriaList([AfterEmb(self.emb)] if read else []),
            output_hidden_states=read,
            return_dict_in_generate=True,
        )
        if read:
            return done.hidden_states[-1][-1][:, -1]
        ids = done.sequences
        new = ids[:, prompt.shape[1] :]
        first = (new == self.emb).int().argmax(1)  # <emb> is also the padding, so what follows it is masked
        real = torch.arange(new.shape[1], device=ids.device) <= first[:, None]
        pictures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        hidden = model.model(
            input_ids=ids,
            attention_mask=torch.cat([inputs["attention_mask"], real.long()], dim=1),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            use_cache=False,
            **pictures,
        ).last_hidden_state
        return hidden[torch.arange(len(ids), device=ids.device), prompt.shape[1] + first]


def rows(count: int) -> list[Item]:
    """Queries from all tasks of the validation split, mixed."""
    tasks = evaluation_tasks("validation")
    return [task.queries[row].query for row in range(-(-count // len(tasks))) for task in tasks][:count]


def measure(
    reason: str, *, count: int, batch_size: int, budget: int, repeats: int, device: str
) -> list[dict[str, Any]]:
    """Measures all methods; one row per method.

    Raises:
        AssertionError: a method gave different embeddings.
    """
    backbone: Any = create("backbone", "tiny")
    pooler = create("pooler", "embed_token")
    Model.assemble(backbone, pooler)
    backbone.to(device).eval()
    items = rows(count)
    offset = 1e4 if reason == "always" else _even_offset(backbone, pooler, items, batch_size)
    controller = create("controller", "rl", offset=offset, budget=budget)
    every = Ways(backbone, pooler, items, controller, offset=offset, batch_size=batch_size, budget=budget)
    ways = every.ways()
    embeddings = {name: way() for name, way in ways.items()}
    difference = {name: float((value - embeddings["mmemb"]).abs().max()) for name, value in embeddings.items()}
    assert max(difference.values()) <= TOLERANCE, f"embeddings differ: {difference}"
    times = harness.paired(ways, repeats=repeats, device=device)
    written = every.paths.tokens.float()
    return [
        {
            "rival": name,
            "reason": reason,
            "rows": len(items),
            "batch": batch_size if "row" not in name else 1,
            "thought": round(float(every.paths.decision.think.float().mean()), 3),
            "tokens": round(float(written.mean()), 2),
            "seconds": statistics.median(times[name]),
            "rows_per_second": len(items) / harness.busy_seconds(statistics.median(times[name]), device=device),
            "ratio_to_floor": harness.median_ratio(times[name], times["floor"]),
            "ratio_to_mmemb": harness.median_ratio(times[name], times["mmemb"]),
            "difference": difference[name],
            "peak_mb": harness.peak_megabytes(way, device=device) if name in _MEMORY else None,
        }
        for name, way in ways.items()
    ]


def judged(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The required and the measured numbers of our method, one row per bound and ``reason``."""
    ratio = {(row["reason"], row["rival"]): row for row in found}
    rows = []
    for reason in dict.fromkeys(row["reason"] for row in found):
        measured = {
            "floor": (ratio[reason, "mmemb"]["ratio_to_floor"], "time / floor", "at most", 1.25),
            **{
                way: (ratio[reason, way]["ratio_to_mmemb"], f"{way} / ours", "at least", least)
                for way, least in (("row_read", 5.0), ("row_reencode", 5.0), ("batch_reencode", 2.0))
            },
        }
        for value, what, direction, bound in measured.values():
            holds = value <= bound if direction == "at most" else value >= bound
            claim = f"{reason}: {what}"
            rows.append(
                {
                    "claim": claim,
                    "asked": f"{direction} {bound:g}",
                    "measured": value,
                    "holds": "yes" if holds else "no",
                }
            )
    return rows


def _even_offset(backbone: Backbone, pooler: Pooler, items: Sequence[Item], batch_size: int) -> float:
    """The logit offset with which half of the rows reason.

    It lies between the logits of two rows, so that rounding changes no decision.
    """
    never = create("controller", "never")
    logits = Encoder(backbone, pooler, batch_size=batch_size).encode_paths(items, never).state.decision_logits
    lean = (logits[:, 1] - logits[:, 0]).sort().values
    middle = len(lean) // 2
    return float(lean[middle - 1 : middle + 1].mean())


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the rows and appends them to ``inference.jsonl``."""
    options = harness.arguments(str(__doc__), argv)
    sizes = (
        {"count": 4, "batch_size": 2, "budget": 3} if options.smoke else {"count": 128, "batch_size": 64, "budget": 48}
    )
    found: list[dict[str, Any]] = []
    for reason in ("always", "half"):
        found += measure(reason, repeats=options.repeats, device=options.device, **sizes)
    path = harness.append(found, output=options.output, name="inference", smoke=options.smoke, device=options.device)
    print(harness.table(found), harness.table(judged(found)), f"appended to {path}", sep="\n\n")


if __name__ == "__main__":
    main()
