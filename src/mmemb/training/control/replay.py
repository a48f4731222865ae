"""Runs a pass with gradients over rollouts: decision, rationale tokens and embeddings.

The prompt of a query is encoded once, and its cache is forked for those rollouts of the query that reason. No logits
are kept. Those of the prompt are never computed. Those of rationales are computed a few tokens at a time, and again in
the backward pass. The pass runs in evaluation mode, without dropout, so that its ratios are 1 if there is no update in
between. It runs without gradient checkpointing, which cannot be used with a cache. The chunk size bounds its memory.

Legend: n queries of a chunk, G rollouts per query, r rollouts of the chunk that reason, L longest rationale with its
end token, H hidden width, D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmemb.inference.encoder import evaluating
from mmemb.inference.prompts import embed_items, embed_states, encode_prompts
from mmemb.inference.rollout import Rollouts, rollout_tokens, token_log_probs
from mmemb.interfaces import Backbone, Model
from mmemb.types import Item, ModelInputs

TOKENS_AT_ONCE = 1024
"""Number of rationale tokens whose logits exist at the same time: 0.6 GB in float32 at a vocabulary of 150,000."""


@dataclass
class Replay:
    """The current outputs of the model for a chunk's rollouts, with a graph if gradients are on.

    Attributes:
        decision_logits: [n, 2] float32, logits of ``<think>`` and ``<emb>`` after the prompt.
        log_prob: [r, L] float32, log-probabilities of the rationale tokens; 0 beyond the end.
        direct: [n, D], direct embeddings. None if not requested.
        reasoned: [r, D], embeddings after the rationales. None if not requested.
    """

    decision_logits: Tensor
    log_prob: Tensor
    direct: Tensor | None = None
    reasoned: Tensor | None = None


@contextmanager
def differentiable(*modules: torch.nn.Module) -> Iterator[None]:
    """Sets evaluation mode and enables gradients inside the context."""
    with evaluating(*modules), torch.enable_grad():
        # Autocast's cached copies have no graph and would cut the weights off from the graph of this pass.
        torch.clear_autocast_cache()
        yield
        torch.clear_autocast_cache()


def replay(
    model: Model,
    prompt: ModelInputs,
    rollouts: Rollouts,
    thinking: Tensor,
    source: Tensor,
    *,
    items: Sequence[Item] | None,
) -> Replay:
    """Runs the model over a chunk's rollouts again.

    Args:
        model: backbone and pooler.
        prompt: the chunk's n prompts, without ``<emb>``.
        rollouts: the rollouts of the whole batch, on the model's device.
        thinking: [r] int64, rows of ``rollouts`` that belong to the chunk and reasoned.
        source: [r] int64, the chunk's query of each of these rollouts.
        items: the chunk's n queries. None leaves the embeddings out.
    """
    backbone, pooler = model.backbone, model.pooler
    prompts = replace(encode_prompts(model, prompt), items=items)
    mask = rollouts.token_mask[thinking]
    log_prob = torch.zeros(mask.shape, device=mask.device)
    found = Replay(prompts.decision_logits, log_prob, None if items is None else prompts.direct())
    if not len(thinking):
        return found
    fed = rollout_tokens(backbone, rollouts, thinking)
    states, _ = backbone.extend(backbone.fork(prompts.prefix, source), fed.tokens, fed.mask)
    written = states[:, : mask.shape[1]][mask[:, : states.shape[1]]]
    chosen = rollouts.token_ids[thinking][mask]
    found.log_prob = log_prob.masked_scatter(mask, _log_probs(backbone, written, chosen, rollouts.temperature))
    if items is not None and not pooler.needs_all_states:
        found.reasoned = embed_states(pooler, states[torch.arange(len(states)), fed.emb_column])
    elif items is not None:
        queries = [items[row] for row in source.tolist()]
        thoughts = [rollouts.rationale[row] for row in thinking.tolist()]
        found.reasoned = embed_items(model, queries, thoughts)
    return found


def _log_probs(backbone: Backbone, hidden: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Computes `token_log_probs` [m] of states [m, H], a few tokens at a time, and again in the backward pass."""

    def some(states: Tensor, tokens: Tensor) -> Tensor:
        return token_log_probs(backbone, states, tokens, temperature=temperature)

    pieces = zip(hidden.split(TOKENS_AT_ONCE), token_ids.split(TOKENS_AT_ONCE), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([some(*piece) for piece in pieces])
    return torch.cat([checkpoint(some, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces])


class ReferencePolicy:
    """The model that rationales stay close to: the model without its adapters, or a frozen copy of the model.

    Args:
        backbone: the model at the start of the phase.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._copy: Backbone | None = None
        if not backbone.has_adapters:
            self._copy = copy.deepcopy(backbone).eval().requires_grad_(False)

    @contextmanager
    def model(self, backbone: Backbone) -> Iterator[Backbone]:
        """Provides the reference inside the context, without gradients."""
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
            else:
                with evaluating(backbone), backbone.without_adapters():
                    yield backbone

    def state(self) -> dict[str, Any]:
        """Returns the weights of the copy. Empty if the reference is the model without its adapters."""
        return {} if self._copy is None else dict(self._copy.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the weights of a `state`."""
        if self._copy is not None:
            self._copy.load_state_dict(state)
