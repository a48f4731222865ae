"""What each of two and of three gloo ranks does for the tests of this folder, and the global batch they share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mmemb.kernels import InfoNCEBatch, InfoNCEResult, reference
from mmemb.losses import CachedLoss, ChunkOutput, InfoNCE, cached_step, gradient_hold
from mmemb.losses.collectives import all_sum, gather_rows
from mmemb.losses.distributed import distributed_infonce_with_grads
from mmemb.training.optimization import clip_gradient_norm
from mmemb.training.random_state import random_state, restore_random_state
from tests.unit.kernels.cases import split

QUERIES = {2: [3, 5], 3: [2, 1, 5]}
CANDIDATES = {2: [4, 9], 3: [3, 4, 6]}
POSITIVES = {2: [1, 0, 3, 8, 2, 0, 5, 1], 3: [1, 0, 3, 5, 2, 0, 4, 1]}
"""Rows by rank, and each query's row of its own rank's candidates, by number of ranks; hard negatives are uneven."""

MOST = 3

OPTIONS: dict[str, dict[str, Any]] = {
    "margin": {"margin": 0.05},
    "hardness": {"hardness": 2.0},
    "query negatives": {"query_negatives": True},
    "candidate negatives": {"candidate_negatives": True},
    "dims": {"dims": [2, 6]},
    "all": {"margin": 0.3, "hardness": 1.0, "query_negatives": True, "candidate_negatives": True, "dims": [3, 5]},
}
"""Options of the loss by name; each is tried in one direction and symmetric."""


def batch(world: int) -> dict[str, Tensor]:
    """The global batch in float64; positives are rows of a rank's own candidates."""
    generator = torch.Generator().manual_seed(1)

    def rows(n: int) -> Tensor:
        return normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1)

    return {
        "query": rows(8),
        "candidate": rows(13),
        "positive": torch.tensor(POSITIVES[world]),
        "query_id": torch.randint(4, (8,), generator=generator),
        "candidate_id": torch.randint(4, (13,), generator=generator),
        "weight": torch.rand(8, generator=generator, dtype=torch.float64) + 0.1,
    }


def share(values: dict[str, Tensor], world: int, rank: int) -> dict[str, Any]:
    """A rank's rows of the global batch."""
    return {
        name: value.split((CANDIDATES if name.startswith("candidate") else QUERIES)[world])[rank]
        for name, value in values.items()
    }


def own_queries(world: int, rank: int) -> slice:
    """A rank's rows of all queries."""
    start = sum(QUERIES[world][:rank])
    return slice(start, start + QUERIES[world][rank])


def joined_positive(values: dict[str, Tensor], world: int) -> dict[str, Any]:
    """The global batch with positives counted over all candidates."""
    offsets = torch.tensor([sum(CANDIDATES[world][:rank]) for rank in range(world)])
    return values | {"positive": values["positive"] + offsets.repeat_interleave(torch.tensor(QUERIES[world]))}


class Encoder(nn.Module):
    """Two layers; a third that only some ranks use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second, self.sometimes = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.double()

    def forward(self, x: Tensor, sometimes: bool = False) -> Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        return normalize(hidden + self.sometimes(x) if sometimes else hidden, dim=1)


class Whole(nn.Module):
    """Encoder and loss in one module, as a trainer wraps them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.loss = Encoder(), InfoNCE(temperature=0.1).double()
        self.encoder.sometimes.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def train(
    encode: Callable[..., Tensor],
    contrast: InfoNCE,
    x: Tensor,
    y: Tensor,
    chunk: int,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    kept: int = 1,
    **arguments: bool,
) -> None:
    """A cached step on queries x and targets y."""

    def forward(piece: tuple[Tensor, Tensor], final: bool) -> ChunkOutput:
        query, target = encode(torch.cat(piece), **arguments).split(len(piece[0]))
        return ChunkOutput({"query": query, "target": target})

    def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
        result = contrast.with_grads(embeddings["query"], embeddings["target"])
        gradients = {"query": result.query_grad, "target": result.candidate_grad}
        return CachedLoss(result.loss, gradients, contrast.temperature_term(result))

    chunks = list(zip(x.split(chunk), y.split(chunk), strict=True))
    cached_step(chunks, forward, loss, no_sync=no_sync, kept_graphs=kept)


def plain_gradients(world: int) -> dict[str, Tensor]:
    """What one process finds with one backward pass over the global batch, in which the last rank uses every layer."""
    encoder, contrast = Encoder(), InfoNCE(temperature=0.1).double()
    x, y = batch(world)["query"], batch(world)["candidate"][:8]
    last = own_queries(world, world - 1)
    query, target = (
        torch.cat([encoder(values[: last.start]), encoder(values[last], sometimes=True)]) for values in (x, y)
    )
    reference.infonce(query, target, temperature=contrast.temperature).backward()
    named = [*encoder.named_parameters(), *contrast.named_parameters()]
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def plain_step(world: int) -> dict[str, Tensor]:
    """The gradients of one process, every rank's rows through the same layers."""
    whole = Whole()
    x, y = batch(world)["query"], batch(world)["candidate"][:8]
    reference.infonce(whole(x), whole(y), temperature=whole.loss.temperature).backward()
    return {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def assert_equal_gradients(given: dict[str, Tensor], expected: dict[str, Tensor], factor: int = 1) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], factor * value, rtol=1e-6, atol=1e-9)


def refusal(call: Callable[[], object]) -> str:
    """What a call that must fail says."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def distributed_grads(
    *,
    averaged: bool = True,
    gather_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    **arguments: Any,
) -> InfoNCEResult:
    """The loss across ranks, with its options written next to the other arguments."""
    options, rest = split(arguments)
    return distributed_infonce_with_grads(
        InfoNCEBatch(**rest), options, averaged=averaged, gather_dtype=gather_dtype, grad_dtype=grad_dtype
    )


def losses(world: int, rank: int, device: str = "cpu") -> dict[str, Any]:
    """The loss across ranks in every form."""
    result: dict[str, Any] = {}
    local = {name: value.to(device) for name, value in share(batch(world), world, rank).items()}
    for averaged in (True, False):
        for symmetric in (False, True):
            grads = distributed_grads(**local, temperature=0.1, averaged=averaged, symmetric=symmetric)
            result[f"{averaged} {symmetric}"] = list(grads)
    for name, options in OPTIONS.items():
        for symmetric in (False, True):
            grads = distributed_grads(**local, temperature=0.1, symmetric=symmetric, **options)
            result[f"{name} {symmetric}"] = list(grads)
    result["rounded"] = list(distributed_grads(**local, temperature=0.1, gather_dtype=torch.bfloat16))
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in local.items()}
    result["half"] = list(distributed_grads(**half, temperature=0.1, averaged=False))
    single = {name: x.float() if x.is_floating_point() else x for name, x in local.items()}
    for symmetric in (False, True):
        grads = distributed_grads(**single, temperature=0.1, averaged=False, symmetric=symmetric)
        result[f"float32 {symmetric}"] = list(grads)
    diagonal = {name: local[name] for name in ("query", "candidate")}
    result["diagonal"] = list(distributed_grads(**diagonal, temperature=0.1))
    # One rank without queries, and one whose weights are all 0.
    lone = local | {name: local[name][:0] for name in ("query", "positive", "query_id", "weight")}
    for symmetric in (False, True):
        given = lone if rank == 0 else local
        grads = distributed_grads(**given, temperature=0.1, symmetric=symmetric)
        result[f"lone {symmetric}"] = list(grads)
        bare = {name: value[:0] for name, value in local.items()} if rank == 0 else local
        grads = distributed_grads(**bare, temperature=0.1, symmetric=symmetric)
        result[f"bare {symmetric}"] = list(grads)
    unweighted = local | {"weight": local["weight"] * float(rank > 0)}
    result["unweighted"] = list(distributed_grads(**unweighted, temperature=0.1))
    wrong = [local | {"weight": local["weight"] * 0}, local | {"positive": local["positive"] + 9}]
    result["errors"] = [
        refusal(lambda given=given: distributed_grads(**given, temperature=0.1))  # type: ignore[misc]
        for given in wrong
    ]
    vague: Any = "no" if rank == 0 else True
    result["errors"].append(refusal(lambda: distributed_grads(**local, temperature=0.1, averaged=vague)))
    broken = local | {"query": local["query"] * (torch.nan if rank == 0 else 1.0)}
    result["errors"].append(refusal(lambda: distributed_grads(**broken, temperature=0.1)))
    short = local | {"candidate_id": local["candidate_id"][: -1 if rank == 0 else None]}
    result["errors"].append(refusal(lambda: distributed_grads(**short, temperature=0.1)))
    unknown = torch.nan if rank == 0 else 0.1
    result["errors"].append(refusal(lambda: distributed_grads(**local, temperature=unknown)))
    nothing = {name: value[:0] for name, value in local.items()}
    result["errors"].append(refusal(lambda: distributed_grads(**nothing, temperature=0.1)))
    nowhere = {name: value.to("meta") for name, value in local.items()} if rank == 0 else local
    result["nowhere"] = refusal(lambda: distributed_grads(**nowhere, temperature=0.1))
    # Neighbours are within the tolerance, the first and the third of three ranks are not.
    apart = 0.1 * (1 + 0.7e-3 * rank)
    result["apart"] = refusal(lambda: distributed_grads(**local, temperature=apart))
    differing: dict[str, dict[str, Any]] = {
        "width": {name: local[name][:, : 5 if rank == 0 else 6] for name in ("query", "candidate")},
        "dtype": {
            name: local[name].to(half["query"] if rank == 0 else local["query"]) for name in ("query", "candidate")
        },
        "temperature": {"temperature": 0.2 if rank == 0 else 0.1},
        "ids": {"query_id": None, "candidate_id": None} if rank == 0 else {},
        "margin": {"margin": 0.1 if rank == 0 else None},
        "query_negatives": {"query_negatives": rank == 0},
        "candidate_negatives": {"candidate_negatives": rank == 0},
        "hardness": {"hardness": 1.0 if rank == 0 else 0.0},
        "symmetric": {"symmetric": rank == 0},
        "averaged": {"averaged": rank == 0},
        "dims": {"dims": [2, 6] if rank == 0 else [3, 6]},
        "gather_dtype": {"gather_dtype": torch.bfloat16 if rank == 0 else None},
    }
    result["differing"] = {
        name: refusal(lambda given=given: distributed_grads(**{**local, "temperature": 0.1, **given}))  # type: ignore[misc]
        for name, given in differing.items()
    }
    other = SimpleNamespace(__name__="mmemb.kernels.triton.engine")
    with patch("mmemb.losses.agreement.choose", lambda *_, **__: other) if rank == 0 else nullcontext():
        call = partial(distributed_grads, **local, temperature=0.1)
        result["differing"]["engine"] = refusal(call)
    with patch("mmemb.losses.agreement._served", lambda: [device.partition(":")[0], "meta"]):
        result["differing"]["device"] = refusal(lambda: distributed_grads(**nowhere, temperature=0.1))
    own: dict[str, Any] = {"temperature": 0.1 * (1 + 1e-15), "grad_dtype": torch.float32, "workspace_bytes": 1000}
    given = {**local, "positive": None, "weight": None, **own} if rank == 0 else {**local, "temperature": 0.1}
    result["own"] = list(distributed_grads(**given))
    result["rows"] = gather_rows(local["query_id"])
    result["empty"] = gather_rows(local["query"][: 2 * rank])
    result["sum"] = all_sum(torch.tensor(float(rank + 1), device=device))
    return result


def data_parallel(world: int, rank: int) -> dict[str, Any]:
    """Cached steps under DDP: gradients, and how often they were reduced."""
    result: dict[str, Any] = {}
    reductions: list[int] = []

    def counted(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reductions.append(bucket.index())
        done = dist.all_reduce(bucket.buffer().div_(world), async_op=True)
        assert done is not None
        return done.get_future().then(lambda future: future.value()[0])

    def wrap(module: nn.Module, **options: bool) -> DistributedDataParallel:
        wrapped = DistributedDataParallel(module, **options)
        wrapped.register_comm_hook(None, lambda _, bucket: counted(bucket))
        return wrapped

    own = own_queries(world, rank)
    x, y = batch(world)["query"][own], batch(world)["candidate"][:8][own]
    chunk = [1, 2, 3][rank]  # 2 or 3 chunks here, 1 or 2 there
    whole = Whole()
    wrapped = wrap(whole)
    train(wrapped, whole.loss, x, y, chunk, wrapped.no_sync)
    result["trained"] = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    result["reductions"] = len(reductions)
    # The same in chunks of one row, all graphs but one kept.
    reductions.clear()
    whole.zero_grad()
    train(wrapped, whole.loss, x, y, 1, wrapped.no_sync, kept=len(x))
    result["kept"] = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    result["kept reductions"] = len(reductions)
    # Two steps' gradients accumulated, reduced once.
    reductions.clear()
    whole.zero_grad()
    hold = gradient_hold(wrapped)
    with hold():
        train(wrapped, whole.loss, x, y, chunk, hold)
    train(wrapped, whole.loss, x, y, chunk, hold)
    result["accumulated"] = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    result["accumulated reductions"] = len(reductions)
    # Layers that a rank leaves out: the loss then stays outside the wrapped module.
    encoder, contrast = Encoder(), InfoNCE(temperature=0.1).double()
    wrapped = wrap(encoder, find_unused_parameters=True)
    train(wrapped, contrast, x, y, chunk, wrapped.no_sync, sometimes=rank == world - 1)
    named = [*encoder.named_parameters(), *contrast.named_parameters()]
    result["outside"] = {name: p.grad for name, p in named if p.grad is not None}
    return result


def resumed(rank: int) -> dict[str, Any]:
    """Numbers drawn after a state was taken, and again after it was restored."""
    torch.manual_seed(100 + rank)
    states = random_state(torch.device("cpu"))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    restore_random_state(states, torch.device("cpu"), rank=rank)
    return {"drawn": drawn, "drawn again": torch.rand(3)}


class Reductions(TorchDispatchMode):
    """Counts the reduce-scatters inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def sharded(world: int, rank: int) -> dict[str, Any]:
    """Cached steps under FSDP2, reducing every chunk's gradients or once a step."""
    result: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (world,))
    own = own_queries(world, rank)
    x, y = batch(world)["query"][own], batch(world)["candidate"][:8][own]
    # Every forward pass gathers parameters, so the ranks need equally many: three chunks each; three ranks have one.
    chunk = {2: [1, 2], 3: [2, 1, 5]}[world][rank]
    for held, kept in ((False, 1), (True, 1), (False, 2), (True, 2), (False, 3)):
        encoder, contrast = Encoder(), InfoNCE(temperature=0.1).double()
        for part in (encoder.first, encoder.second):
            fully_shard(part, mesh=mesh)
        fully_shard(encoder, mesh=mesh).set_reduce_scatter_unused_params(True)
        hold = gradient_hold(encoder) if held else nullcontext
        with Reductions() as reductions:
            train(encoder, contrast, x, y, chunk, hold, kept, sometimes=rank == world - 1)
        result[f"{held} {kept} reductions"] = reductions.count
        named = [*encoder.named_parameters(), *contrast.named_parameters()]
        result[f"{held} {kept}"] = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in named
            if p.grad is not None
        }
        parameters = [*encoder.parameters(), *contrast.parameters()]
        result["norm"] = clip_gradient_norm(parameters, maximum=0.01)
        result["clipped norm"] = clip_gradient_norm(parameters, maximum=1.0)
        result["own rows"] = [len(p.to_local()) for p in encoder.parameters() if isinstance(p, DTensor)]
    return result


def worker(rank: int, folder: str) -> None:
    """Joins the two-rank group, if it is of it, then that of all, and writes what it found."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    for world in (2, MOST):
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{world}", rank=rank, world_size=world)
        try:
            found = losses(world, rank) | data_parallel(world, rank) | resumed(rank)
            found["sharded"] = sharded(world, rank)
            torch.save(found, f"{folder}/{world}-{rank}.pt")
        finally:
            dist.destroy_process_group()


def nccl_worker(rank: int, folder: str) -> None:
    """Joins a group of two GPUs and writes what it found."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.save(losses(2, rank, f"cuda:{rank}"), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
