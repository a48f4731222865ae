"""Gradient caching: one optimiser step whose loss sees a batch far larger than one backward pass holds.

The loss needs all embeddings of a batch. The backward pass of a chunk only needs the loss's gradient with respect to
the chunk's embeddings. So a step has three parts:

1. Encode every chunk without a graph.
2. Compute the loss and its gradients with respect to the embeddings (`mmemb.kernels.infonce_with_grads`, no graph).
3. Encode each chunk again, from the same random state, and back-propagate sum(embedding * gradient).

The last chunk keeps its graph in the first pass and is not encoded again. Its backward pass comes first, so only one
chunk's graph exists at any time. With the batch, memory grows by the embeddings and their gradients alone. If there is
memory for more, the last K chunks keep their graphs (``kept_graphs``). C chunks then cost 2 C - K forward passes, and
with K = C the step is a plain step.

Under DDP and FSDP every forward pass with a graph and every backward pass communicates. `gradient_hold`, given as
``no_sync``, leaves one reduction per step.

The idea is GradCache (Gao et al., 2021, arXiv 2101.06983). Nothing is kept between calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mmemb.common.checks import check_numbers
from mmemb.kernels.problem import work_dtype

C = TypeVar("C")
Logs: TypeAlias = Mapping[str, float | Tensor]


@dataclass
class ChunkOutput:
    """The model's output for one chunk.

    Attributes:
        embeddings: by name, [n, D]. A name may be missing in some chunks, and n may differ between names.
        loss: a further loss of this chunk alone, scaled so that the chunks' losses can be summed. Ignored in the pass
            without a graph.
        logs: values to report, summed over chunks. Ignored in the pass without a graph.
    """

    embeddings: dict[str, Tensor]
    loss: Tensor | None = None
    logs: Logs = field(default_factory=dict)


@dataclass
class CachedLoss:
    """The loss over all embeddings.

    Attributes:
        loss: value, 0-d.
        gradients: by name, in the shape of the embeddings. Give float32 for embeddings in 16 bits: the backward pass
            rounds them. A missing name gets no gradient.
        term: a scalar with a graph to the loss's own parameters (`InfoNCE.temperature_term`). The last backward pass
            includes it.
        logs: values to report.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    term: Tensor | None = None
    logs: Logs = field(default_factory=dict)


@dataclass
class CachedStep:
    """The results of a step. The gradients are in the parameters.

    Attributes:
        loss: the loss over all embeddings, 0-d, detached.
        chunk_loss: sum of the chunks' own losses, 0-d, detached; None if no chunk had one.
        embeddings: by name [N, D], detached, rows in chunk order.
        logs: the logs of the loss and of the chunks. If names are equal, the loss's value counts.
    """

    loss: Tensor
    chunk_loss: Tensor | None
    embeddings: dict[str, Tensor]
    logs: dict[str, float | Tensor]


@dataclass
class _RandomState:
    """The state of torch's generators on the CPU and every CUDA device. Python's and numpy's are not included."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> _RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def cached_step(
    chunks: Sequence[C],
    forward: Callable[[C, bool], ChunkOutput],
    loss: Callable[[dict[str, Tensor]], CachedLoss],
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
    kept_graphs: int = 1,
) -> CachedStep:
    """Adds the same gradients to the parameters as one backward pass over all chunks at once would.

    It differentiates ``loss`` of all embeddings plus the chunks' own losses. The result equals the plain step up to
    rounding, dropout included, if ``forward`` draws from torch's generators only and uses no batch statistics. It works
    under autocast and with gradient accumulation: it never sets gradients to zero.

    Args:
        chunks: the batch in pieces, each small enough for one backward pass. Sizes may differ.
        forward: ``forward(chunk, final)``. ``final`` is False in the pass without a graph, whose losses and logs are
            ignored and need not be computed. It is True when the graph is kept. Both calls for a chunk must draw the
            same random numbers until the embeddings are made.
        loss: called once, with the detached embeddings of all chunks by name, concatenated in chunk order.
        backward: back-propagates a scalar; ``self.manual_backward`` in a LightningModule.
        no_sync: a context for every forward and backward pass with a graph except the last, so that gradients are
            reduced over ranks once per step (`gradient_hold`).
        kept_graphs: maximum number of graphs that exist at once, 1 or more. Each one beyond the first saves a forward
            pass. With ``no_sync``, at least one of several chunks is encoded again: DDP reduces after the last pass it
            saw.

    Raises:
        ValueError: there is no chunk, ``kept_graphs`` is below 1, a chunk has nothing to back-propagate, or a
            gradient's shape is not its embeddings'.
    """
    if not chunks:
        raise ValueError("cached_step got no chunks; give at least one")
    check_numbers("cached_step", at_least=1, kept_graphs=kept_graphs)
    states: list[_RandomState] = []
    rows: list[dict[str, int]] = []
    detached: dict[str, list[Tensor]] = {}
    last = len(chunks) - 1
    kept_from = max(len(chunks) - kept_graphs, 0 if no_sync is nullcontext else min(1, last))
    kept: dict[int, ChunkOutput] = {}
    for index, chunk in enumerate(chunks):
        states.append(_RandomState.now())
        # DDP needs the forward pass inside its no_sync too.
        with no_sync() if last > 0 and index >= kept_from else nullcontext():
            output = _encode(forward, chunk, final=index >= kept_from)
        if index >= kept_from:
            kept[index] = output
        rows.append({name: len(embedding) for name, embedding in output.embeddings.items()})
        for name, embedding in output.embeddings.items():
            # A copy: a view (`hidden[:, -1]`) would keep its whole base in memory until the step ends.
            detached.setdefault(name, []).append(embedding.detach().clone())
    embeddings = {name: torch.cat(detached.pop(name)) for name in list(detached)}
    cached = loss(embeddings)
    after = _RandomState.now()
    gradients = _split(cached.gradients, embeddings, rows)

    chunk_loss: Tensor | None = None
    logs: dict[str, float | Tensor] = {}
    order = (last, *range(kept_from, last), *range(kept_from))
    for index in order:
        synchronised = index == order[-1]
        if index in kept:
            output = kept.pop(index)
        else:
            states[index].restore()
            with nullcontext() if synchronised else no_sync():
                output = _encode(forward, chunks[index], final=True)
        # In float32: a gradient scaler's 65536, infinite in float16, then multiplies before anything is rounded.
        terms = [
            (output.embeddings[name] * gradient.to(work_dtype(gradient.dtype))).sum()
            for name, gradient in gradients[index].items()
        ]
        if output.loss is not None:
            chunk_loss = output.loss.detach() if chunk_loss is None else chunk_loss + output.loss.detach()
            terms.append(output.loss)
        if not terms:
            raise ValueError(f"chunk {index} has neither an embedding with a gradient nor a loss; leave it out")
        if synchronised and cached.term is not None:
            terms.append(cached.term)
        for name, value in output.logs.items():
            logs[name] = logs.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)
        with nullcontext() if synchronised else no_sync():
            backward(functools.reduce(torch.add, terms))
        del output, terms
    after.restore()
    return CachedStep(cached.loss.detach(), chunk_loss, embeddings, logs | dict(cached.logs))


def gradient_hold(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Returns a context in which backward passes do not reduce gradients over ranks. Contexts may be nested.

    To accumulate the gradients of several cached steps with a single reduction, hold all steps except the last.

    Args:
        module: DDP and FSDP2 (`torch.distributed.fsdp.fully_shard`) may be the module or anywhere inside it. DDP holds
            by its ``no_sync``. FSDP2 keeps whole gradients on every rank until the last backward pass. Without the
            context it reduces once per chunk, which costs communication instead of memory. Any other module reduces
            nothing, and nothing is held.
    """
    replicated = [part for part in module.modules() if isinstance(part, DistributedDataParallel)]
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    depth = 0

    @contextmanager
    def hold() -> Iterator[None]:
        nonlocal depth
        depth += 1
        for part in sharded:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            with ExitStack() as stack:
                for replica in replicated:
                    stack.enter_context(replica.no_sync())
                yield
        finally:
            depth -= 1
            for part in sharded:
                part.set_requires_gradient_sync(depth == 0, recurse=False)

    return hold


def _encode(forward: Callable[[C, bool], ChunkOutput], chunk: C, *, final: bool) -> ChunkOutput:
    # Autocast caches low-precision copies of weights. A copy made without a graph would cut the weight off from the
    # graph of the next pass.
    torch.clear_autocast_cache()
    with torch.set_grad_enabled(final):
        output = forward(chunk, final)
    torch.clear_autocast_cache()
    return output


def _split(
    gradients: dict[str, Tensor], embeddings: dict[str, Tensor], rows: list[dict[str, int]]
) -> list[dict[str, Tensor]]:
    """Splits the gradients by chunk and name."""
    split: list[dict[str, Tensor]] = [{} for _ in rows]
    for name, gradient in gradients.items():
        if name not in embeddings or gradient.shape != embeddings[name].shape:
            shapes = {known: tuple(embedding.shape) for known, embedding in embeddings.items()}
            raise ValueError(
                f"the loss gave a gradient {name!r} of shape {tuple(gradient.shape)}; the embeddings are {shapes}"
            )
        holders = [index for index, counts in enumerate(rows) if name in counts]
        parts = gradient.split([rows[index][name] for index in holders])
        for index, part in zip(holders, parts, strict=True):
            split[index][name] = part
    return split
