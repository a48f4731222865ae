"""Many continuations of few prompts: each distinct prompt is encoded once, its cache forked for every row that has it.

An evaluator looks at one pair without a rationale, with each candidate and with placebos: a dozen rows whose prompt,
pictures and all, is the same. For a prompt of T tokens with R continuations of L tokens the work is T + R L tokens
instead of R (T + L); what it costs is a copy of the prompt's cache a row (`benchmarks/score.py` has the numbers).

Rows share a prompt where they are given the same `Item` object: comparing pictures would cost more than it finds.

Shape legend: N rows, P distinct prompts, L columns of the longest continuation, H hidden width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmemb.inference.encoder import Encoder, evaluating
from mmemb.inference.prompts import embed_states, length_order, pad_tokens, prefill, rationale_tokens, thought_tokens
from mmemb.interfaces import Backbone
from mmemb.types import Item

_TOKENS_AT_ONCE = 512


def last_states(
    backbone: Backbone, items: Sequence[Item], continuations: Sequence[Sequence[int]], *, batch_size: int
) -> Tensor:
    """The state after the last token of each row's continuation, [N, H] on the backbone's device.

    Args:
        backbone: the model; its training mode is restored.
        items: N prompts; rows that are given the same object share its encoding.
        continuations: token ids that follow each prompt, at least one a row.
        batch_size: rows continued together.
    """
    states: Tensor | None = None
    for rows, hidden, _, _ in continuation_states(backbone, items, continuations, batch_size=batch_size):
        if states is None:
            states = hidden.new_zeros(len(items), hidden.shape[-1])
        states[rows] = hidden[:, -1]
    return states if states is not None else torch.zeros(0, backbone.hidden_size, device=backbone.device)


def log_likelihoods(
    backbone: Backbone, items: Sequence[Item], continuations: Sequence[Sequence[int]], *, batch_size: int
) -> list[float]:
    """How likely the model goes on as each row does, in nats: the sum of log p of its tokens after the first.

    Args:
        backbone: the model; its training mode is restored.
        items: N prompts; rows that are given the same object share its encoding.
        continuations: token ids that follow each prompt, at least one a row; the first is given.
        batch_size: rows continued together.
    """
    found = [0.0] * len(items)
    for rows, hidden, tokens, mask in continuation_states(backbone, items, continuations, batch_size=batch_size):
        row, column = (mask[:, :-1] & mask[:, 1:]).bool().nonzero(as_tuple=True)  # states that foretell a real token
        nats = torch.zeros(len(rows), dtype=torch.float64)
        # The vocabulary is wide: not every token's logits at once. Summed on the CPU, in one order.
        for r, c in zip(row.split(_TOKENS_AT_ONCE), column.split(_TOKENS_AT_ONCE), strict=True):
            with torch.no_grad():
                of_token = backbone.logits(hidden[r, c]).float().log_softmax(-1).gather(1, tokens[r, c + 1, None])
            nats.index_add_(0, r.cpu(), of_token[:, 0].cpu().double())
        for index, value in zip(rows, nats.tolist(), strict=True):
            found[index] = value
    return found


def encode_arms(encoder: Encoder, items: Sequence[Item], rationales: Sequence[str | None]) -> Tensor:
    """Embeddings [N, D] float32 on the CPU, as `Encoder.encode_queries` gives them, each prompt encoded once.

    A pooler that looks at every state (``needs_all_states``) needs the prompt's own in every row: nothing is shared.

    Args:
        encoder: the model.
        items: N queries; rows that are given the same object share its encoding.
        rationales: a text or None a row.
    """
    alone = len({id(item) for item in items}) == len(items)
    if alone or encoder.pooler.needs_all_states:
        return encoder.encode_queries(items, rationales)
    backbone, pooler = encoder.backbone, encoder.pooler
    written = {text: rationale_tokens(backbone, text) for text in rationales if text is not None}
    continuations = [thought_tokens(backbone.token_id, None if text is None else written[text]) for text in rationales]
    states = last_states(backbone, items, continuations, batch_size=encoder.batch_size)
    with evaluating(pooler):
        return embed_states(pooler, states).float().cpu()


def continuation_states(
    backbone: Backbone, items: Sequence[Item], continuations: Sequence[Sequence[int]], *, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Batch by batch: row numbers, states [B, L, H], token ids and mask [B, L] of the continuations, left-padded.

    Arguments as `last_states` has them.
    """
    for rows in _batches(items, batch_size):
        with evaluating(backbone):
            distinct = {id(items[row]): items[row] for row in rows}
            prefix = prefill(backbone, list(distinct.values()))
            place = {key: index for index, key in enumerate(distinct)}
            owner = torch.tensor([place[id(items[row])] for row in rows], device=backbone.device)
            tokens, mask = pad_tokens([continuations[row] for row in rows], side="left", device=backbone.device)
            hidden, _ = backbone.extend(backbone.fork(prefix, owner), tokens, mask)
        yield rows, hidden, tokens, mask


def _batches(items: Sequence[Item], batch_size: int) -> Iterator[list[int]]:
    """Rows batch by batch: a prompt's together, prompts by length; one that falls across a border is encoded twice."""
    rows_of: dict[int, list[int]] = {}
    for row, item in enumerate(items):
        rows_of.setdefault(id(item), []).append(row)
    groups = list(rows_of.values())
    order = [row for group in length_order([items[group[0]] for group in groups]) for row in groups[group]]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
