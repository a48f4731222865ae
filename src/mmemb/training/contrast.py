"""Computes InfoNCE on several paths of the same queries against one set of targets, with gradients for a cached step.

Legend: N queries, n rows of a path, M targets, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmemb.losses.collectives import all_sum
from mmemb.losses.gradcache import CachedLoss
from mmemb.losses.infonce import InfoNCE


class Identities(Protocol):
    """The part of a training batch that says which target is the positive of which query.

    Attributes:
        query_id: [N] int64.
        candidate_id: [M] int64.
        positive: [N] int64, row of each query's positive among the targets.
    """

    query_id: Tensor
    candidate_id: Tensor
    positive: Tensor


@dataclass(frozen=True)
class PathLoss:
    """One way to embed queries.

    Attributes:
        label: the loss of the path is logged as ``infonce_<label>``.
        name: name of its embeddings [n, D]. They are absent if no query of this rank takes the path.
        scale: weight of its loss.
        rows: [n] int64, the query that each row embeds.
        weight: [n], weight of each row. None for equal weights.
    """

    label: str
    name: str
    scale: float
    rows: Tensor
    weight: Tensor | None = None


def contrast(
    infonce: InfoNCE, embeddings: dict[str, Tensor], identities: Identities, paths: Sequence[PathLoss]
) -> CachedLoss:
    """Computes the weighted sum of the paths' losses against ``embeddings["target"]``, over all ranks.

    Args:
        infonce: the loss. The term of the cached loss carries the gradient of its temperature.
        embeddings: detached embeddings by name: ``target`` [M, D] and one entry per path.
        identities: identities of all N queries and M targets.
        paths: the paths. Every rank must name the same ones.

    Raises:
        ValueError: the loss is symmetric and a query has several rows of a path. They share a positive, and in the
            symmetric loss a positive can have only one query.
    """
    target = embeddings["target"]
    gradients = {name: torch.zeros_like(value, dtype=InfoNCE.grad_dtype(value)) for name, value in embeddings.items()}
    total = torch.zeros((), device=target.device)
    terms: list[Tensor] = []
    logs: dict[str, float | Tensor] = {}
    for path in paths:
        if not path.scale:
            continue
        # Every rank must take part in a path's collectives, even without rows, and all must see a refusal.
        count, repeated = len(path.rows), len(path.rows) - len(path.rows.unique())
        count, repeated = all_sum(torch.tensor([count, repeated], device=target.device)).tolist()
        if count == 0:
            continue
        if infonce.options.symmetric and repeated:
            raise ValueError(
                f"infonce.symmetric is true and several rows of the {path.label} path share a query and its "
                "positive; set symmetric to false or, in the joint phase, use a selector that chooses one rationale "
                "per pair, not `all`"
            )
        result = infonce.with_grads(
            embeddings.get(path.name, target.new_zeros(0, target.shape[1])),
            target,
            positive=identities.positive[path.rows],
            query_id=identities.query_id[path.rows],
            candidate_id=identities.candidate_id,
            weight=path.weight,
        )
        if path.name in gradients:
            gradients[path.name] += path.scale * result.query_grad
        gradients["target"] += path.scale * result.candidate_grad
        term = infonce.temperature_term(result)
        if term is not None:
            terms.append(path.scale * term)
        total = total + path.scale * result.loss
        logs[f"infonce_{path.label}"] = result.loss
    return CachedLoss(loss=total, gradients=gradients, term=torch.stack(terms).sum() if terms else None, logs=logs)
