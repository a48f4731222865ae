"""The InfoNCE losses that are compared: ours, the usual code by hand, and those of other projects.

Legend: N queries, M = N candidates, D width; the positive of query i is candidate i.

Every rival computes the same mean loss and both embedding gradients. A peer's own code runs as published. If a peer has
no package that takes embeddings, its published algorithm is written here and its row says so. If a peer is not
installed or refuses an input, its row says why.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from mmemb.kernels import InfoNCEBatch, LossOptions, infonce_with_grads, reference

TEMPERATURE = 0.05

INSTALL = "not installed (pip install -e .[bench])"
"""The note in the row of a missing peer."""


class Answer(NamedTuple):
    """The result of a rival: the loss, 0-d, and the embedding gradients, whole [N, D] or in pieces of rows."""

    loss: Tensor
    query: Sequence[Tensor]
    candidate: Sequence[Tensor]


Call: TypeAlias = Callable[[], Answer]
Make: TypeAlias = Callable[[Tensor, Tensor, bool], Call]
"""``make(query, candidate, symmetric)`` returns the call that is timed."""


@dataclass(frozen=True)
class Rival:
    """One column of the comparison.

    Attributes:
        name: name in the rows.
        make: builds the timed call for embeddings [N, D] and a direction; the building itself is not timed.
        matrices: number of N x M matrices that exist at once, in the input's dtype: a lower bound of its memory.
        distribution: distribution that must be installed; None if torch suffices.
        module: module that is imported.
        cuda: whether it runs only on a GPU.
        both: whether it has a symmetric form.
        normalises: whether it normalises its input; its gradients are then those of the normalised embeddings.
    """

    name: str
    make: Make
    matrices: int = 0
    distribution: str | None = None
    module: str | None = None
    cuda: bool = False
    both: bool = True
    normalises: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package can be imported."""
        return self.module is None or importlib.util.find_spec(self.module) is not None


def _ours(query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
    options = LossOptions(symmetric=symmetric)

    def run() -> Answer:
        result = infonce_with_grads(InfoNCEBatch(query, candidate, TEMPERATURE), options)
        return Answer(result.loss, [result.query_grad], [result.candidate_grad])

    return run


def _by_autograd(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Answer]:
    """Turns a differentiable loss into a rival's call on (query, candidate)."""

    def run(query: Tensor, candidate: Tensor) -> Answer:
        leaves = [x.detach().requires_grad_() for x in (query, candidate)]
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        return Answer(value.detach(), [gradients[0]], [gradients[1]])

    return run


def _labels(query: Tensor) -> Tensor:
    return torch.arange(len(query), device=query.device)


def full_matrix(query: Tensor, candidate: Tensor) -> Tensor:
    """The loss as one would write it by hand, in one direction."""
    return cross_entropy(query @ candidate.T / TEMPERATURE, _labels(query))


def full_matrix_both(query: Tensor, candidate: Tensor) -> Tensor:
    """The symmetric loss as one would write it by hand."""
    logits, labels = query @ candidate.T / TEMPERATURE, _labels(query)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def _naive(query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
    run = _by_autograd(full_matrix_both if symmetric else full_matrix)
    return lambda: run(query, candidate)


def _compiled(query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
    # The recompile limit counts per code object, so later cases would silently run eagerly.
    torch._dynamo.reset()
    loss = torch.compile(full_matrix_both if symmetric else full_matrix, dynamic=False)
    run = _by_autograd(loss)
    return lambda: run(query, candidate)


def _gradcache(query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
    """Step 2 of GradCache (Gao et al., 2021, section 3.2): full matrix, cross entropy, backward to the embeddings.

    The published loss has no temperature, so the queries are divided by it, which costs N x D operations.
    """
    del symmetric

    def loss(query: Tensor, candidate: Tensor) -> Tensor:
        return cross_entropy((query / TEMPERATURE) @ candidate.T, _labels(query))

    run = _by_autograd(loss)
    return lambda: run(query, candidate)


def _cached_multiple_negatives(mini_batch: int) -> Make:
    """CachedMultipleNegativesRankingLoss.calculate_loss of sentence-transformers, called as its forward calls it."""

    def make(query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
        losses: Any = importlib.import_module("sentence_transformers.sentence_transformer.losses")
        further: dict[str, Any] = {}
        if symmetric:
            further = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        # The embeddings are given, so the loss only asks for the model's first module.
        owner = losses.CachedMultipleNegativesRankingLoss(
            nn.Sequential(nn.Identity()), scale=1 / TEMPERATURE, mini_batch_size=mini_batch, **further
        )

        def run() -> Answer:
            pieces = [[x.detach().requires_grad_() for x in side.split(mini_batch)] for side in (query, candidate)]
            value = owner.calculate_loss(pieces, with_backward=True)
            return Answer(value, *([x.grad for x in side] for side in pieces))

        return run

    return make


def _both_ways(loss: Callable[[Tensor, Tensor], Tensor], query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
    """Calls a peer that has one direction only twice for the symmetric loss."""
    run = _by_autograd((lambda q, k: (loss(q, k) + loss(k, q)) / 2) if symmetric else loss)
    return lambda: run(query, candidate)


def _inf_cl(query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
    """Inf-CL (Cheng et al., 2024): ``cal_flash_loss`` with its default head_dim of 256."""
    package: Any = importlib.import_module("inf_cl")
    head = min(256, query.shape[1])
    if query.shape[1] % head:
        raise ValueError(f"width {query.shape[1]} is not a multiple of {head}")

    def loss(query: Tensor, candidate: Tensor) -> Tensor:
        return package.cal_flash_loss(query, candidate, scale=1 / TEMPERATURE, head_dim=head).mean()

    return _both_ways(loss, query, candidate, symmetric)


def _liger(query: Tensor, candidate: Tensor, symmetric: bool) -> Call:
    """Liger-Kernel's fused linear scaled cross entropy: the candidates are the vocabulary."""
    ops: Any = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = ops.LigerFusedLinearScaledCrossEntropyFunction

    def loss(query: Tensor, candidate: Tensor) -> Tensor:
        return function.apply(query, candidate, _labels(query), TEMPERATURE).mean()

    return _both_ways(loss, query, candidate, symmetric)


SENTENCE_TRANSFORMERS: dict[str, Any] = {
    "distribution": "sentence-transformers",
    "module": "sentence_transformers",
    "normalises": True,
}

RIVALS = (
    Rival("mmemb", _ours),
    Rival("naive", _naive, matrices=3),
    Rival("gradcache-loss", _gradcache, matrices=2, both=False),
    Rival("sentence-transformers-32", _cached_multiple_negatives(32), **SENTENCE_TRANSFORMERS),
    Rival("sentence-transformers-512", _cached_multiple_negatives(512), **SENTENCE_TRANSFORMERS),
    Rival("torch.compile", _compiled, matrices=1, cuda=True),
    Rival("inf-cl", _inf_cl, distribution="inf-cl", module="inf_cl", cuda=True),
    Rival("liger-kernel", _liger, distribution="liger-kernel", module="liger_kernel", cuda=True),
)
"""All rivals, in the order of the table."""


def error(rival: Rival, query: Tensor, candidate: Tensor, *, symmetric: bool) -> float:
    """Largest relative error (by norm) of the rival's loss and gradients, against float64 on the same input."""
    answer = rival.make(query, candidate, symmetric)()
    leaves = [x.detach().double().requires_grad_() for x in (query, candidate)]
    inputs = [normalize(x, dim=1) for x in leaves] if rival.normalises else leaves
    loss = reference.infonce(inputs[0], inputs[1], temperature=TEMPERATURE, symmetric=symmetric)
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    found = [answer.loss, torch.cat(list(answer.query)), torch.cat(list(answer.candidate))]
    return max(float((mine.double() - true).norm() / true.norm()) for mine, true in zip(found, expected, strict=True))
