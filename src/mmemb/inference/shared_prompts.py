"""Encodes many continuations of few prompts. Each distinct prompt is encoded once.

The cache of a prompt is forked for every row that has this prompt. An evaluator scores one pair without a rationale,
with each rationale candidate and with placebos. These are about a dozen rows with the same prompt and pictures. For a
prompt of T tokens with R continuations of L tokens, the work is T + R L tokens instead of R (T + L). The price is one
copy of the prompt's cache per row (`benchmarks/score.py` measures it).

Rows share a prompt if they have the same `Item` object. Comparing pictures would cost more than it saves.

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
    """Computes the state after the last token of each row's continuation.

    Args:
        backbone: the model. Its training mode is restored.
        items: N prompts. Rows with the same object share its encoding.
        continuations: token ids that follow each prompt, at least one per row.
        batch_size: number of rows that are encoded together.

    Returns:
        the states [N, H], on the backbone's device.
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
    """Computes the log-likelihood of each row's continuation, in nats.

    It is the sum of the log-probabilities of the continuation's tokens after the first.

    Args:
        backbone: the model. Its training mode is restored.
        items: N prompts. Rows with the same object share its encoding.
        continuations: token ids that follow each prompt, at least one per row. The first token is not scored.
        batch_size: number of rows that are encoded together.
    """
    found = [0.0] * len(items)
    for rows, hidden, tokens, mask in continuation_states(backbone, items, continuations, batch_size=batch_size):
        row, column = (mask[:, :-1] & mask[:, 1:]).bool().nonzero(as_tuple=True)  # states that predict a real token
        nats = torch.zeros(len(rows), dtype=torch.float64)
        # The vocabulary is large, so the logits are computed for some tokens at a time. The sum runs on the CPU, in a
        # fixed order.
        for r, c in zip(row.split(_TOKENS_AT_ONCE), column.split(_TOKENS_AT_ONCE), strict=True):
            with torch.no_grad():
                of_token = backbone.logits(hidden[r, c]).float().log_softmax(-1).gather(1, tokens[r, c + 1, None])
            nats.index_add_(0, r.cpu(), of_token[:, 0].cpu().double())
        for index, value in zip(rows, nats.tolist(), strict=True):
            found[index] = value
    return found


def encode_arms(encoder: Encoder, items: Sequence[Item], rationales: Sequence[str | None]) -> Tensor:
    """Embeds queries as `Encoder.encode_queries` does, but encodes each distinct prompt only once.

    A pooler that reads every state (``needs_all_states``) needs the states of the prompt in every row. Then nothing is
    shared.

    Args:
        encoder: the model.
        items: N queries. Rows with the same object share its encoding.
        rationales: for each row, a text or None.

    Returns:
        the embeddings [N, D] float32, on the CPU.
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
    """Encodes the continuations in batches, left-padded. The arguments are those of `last_states`.

    Yields:
        for each batch: row numbers, states [B, L, H], token ids [B, L] and mask [B, L].
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
    """Yields the rows of each batch. Rows with the same prompt are together, and prompts are sorted by length.

    A prompt whose rows fall into two batches is encoded twice.
    """
    rows_of: dict[int, list[int]] = {}
    for row, item in enumerate(items):
        rows_of.setdefault(id(item), []).append(row)
    groups = list(rows_of.values())
    order = [row for group in length_order([items[group[0]] for group in groups]) for row in groups[group]]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
