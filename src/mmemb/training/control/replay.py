"""One pass with gradients over rollouts: decision, rationale tokens and embeddings, each prompt encoded once.

The prompt of a query is encoded once and its cache forked for the query's rollouts that thought. No logits are kept:
those of the prompt are never made, those of rationales are made a few tokens at a time and once more in the backward
pass. The pass runs in evaluation mode, so that without an update in between its ratios are 1 (no dropout), and without
gradient checkpointing, which a cache rules out: the chunk size bounds its memory.

Legend: n queries of a chunk, G rollouts of each, r rollouts of them that thought, L longest rationale and its end
token, H hidden width, D embedding width.
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
"""Rationale tokens whose logits exist at a time: 0.6 GB in float32 at a vocabulary of 150,000."""


@dataclass
class Replay:
    """What the model makes of a chunk's rollouts now, with a graph where gradients are on.

    Attributes:
        decision_logits: [n, 2] float32, of ``<think>`` and ``<emb>`` after the prompt.
        log_prob: [r, L] float32, of the rationale tokens; 0 beyond.
        direct: [n, D], direct embeddings; None if not asked for.
        reasoned: [r, D], embeddings after the rationales; None if not asked for.
    """

    decision_logits: Tensor
    log_prob: Tensor
    direct: Tensor | None = None
    reasoned: Tensor | None = None


@contextmanager
def differentiable(*modules: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, with gradients."""
    with evaluating(*modules), torch.enable_grad():
        # Autocast's copies made without a graph would cut the weights off from this pass's graph.
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
    """Passes over a chunk's rollouts once more.

    Args:
        model: backbone and pooler.
        prompt: the chunk's n prompts, without ``<emb>``.
        rollouts: the whole batch's, on the model's device.
        thinking: [r] int64, rows of ``rollouts`` that belong to the chunk and reasoned.
        source: [r] int64, the chunk's query each belongs to.
        items: the chunk's n queries; None leaves the embeddings out.
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
    """`token_log_probs` [m] of states [m, H], a few tokens' logits at a time, made again in the backward pass."""

    def some(states: Tensor, tokens: Tensor) -> Tensor:
        return token_log_probs(backbone, states, tokens, temperature=temperature)

    pieces = zip(hidden.split(TOKENS_AT_ONCE), token_ids.split(TOKENS_AT_ONCE), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([some(*piece) for piece in pieces])
    return torch.cat([checkpoint(some, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces])


class ReferencePolicy:
    """The model that rationales keep close to: the base under the adapters, or a frozen copy of the model.

    Args:
        backbone: the model when the phase begins.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._copy: Backbone | None = None
        if not backbone.has_adapters:
            self._copy = copy.deepcopy(backbone).eval().requires_grad_(False)

    @contextmanager
    def model(self, backbone: Backbone) -> Iterator[Backbone]:
        """The reference, without gradients, inside the context."""
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
            else:
                with evaluating(backbone), backbone.without_adapters():
                    yield backbone

    def state(self) -> dict[str, Any]:
        """The copy's weights; nothing where the adapters are switched off."""
        return {} if self._copy is None else dict(self._copy.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up the weights of `state`."""
        if self._copy is not None:
            self._copy.load_state_dict(state)
