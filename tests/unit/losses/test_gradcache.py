"""The cached step against the plain step: same gradients, same random numbers, one graph at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import normalize

from mmemb.kernels import InfoNCEBatch, infonce_with_grads
from mmemb.losses import CachedLoss, CachedStep, ChunkOutput, InfoNCE, cached_step

RAGGED = [slice(0, 4), slice(4, 5), slice(5, 11), slice(11, 13)]


class Model(nn.Module):
    """Two embeddings and an own loss a chunk, with dropout, and the contrastive loss's temperature."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.head = nn.Linear(8, 1)
        self.contrast = InfoNCE(temperature=0.1)
        self.x, self.y = torch.randn(13, 6), torch.randn(13, 6)

    def encode(self, rows: slice) -> ChunkOutput:
        direct, target = (normalize(self.net(x[rows]).float(), dim=1) for x in (self.x, self.y))
        own = self.head(direct).square().sum() / 13
        embeddings = {"direct": direct, "target": target}
        if rows.start < 5:  # a name that only some chunks have
            embeddings["reasoned"] = normalize(self.net(self.x[rows] + 1).float(), dim=1)
        return ChunkOutput(embeddings, own, {"own": own, "rows": rows.stop - rows.start})

    def forward_chunk(self, rows: slice, final: bool) -> ChunkOutput:
        assert torch.is_grad_enabled() == final
        return self.encode(rows)

    def plain_loss(self, embeddings: dict[str, Tensor]) -> Tensor:
        positive = torch.arange(len(embeddings["reasoned"]))
        return self.contrast(embeddings["direct"], embeddings["target"]) + 0.5 * self.contrast(
            embeddings["reasoned"], embeddings["target"], positive=positive
        )

    def cached_loss(self, embeddings: dict[str, Tensor]) -> CachedLoss:
        assert not any(x.requires_grad for x in embeddings.values())
        a = self.contrast.with_grads(embeddings["direct"], embeddings["target"])
        positive = torch.arange(len(embeddings["reasoned"]))
        b = self.contrast.with_grads(embeddings["reasoned"], embeddings["target"], positive=positive)
        terms = [self.contrast.temperature_term(result) for result in (a, b)]
        assert terms[0] is not None
        assert terms[1] is not None
        gradients = {
            "direct": a.query_grad,
            "reasoned": 0.5 * b.query_grad,
            "target": a.candidate_grad + 0.5 * b.candidate_grad,
        }
        return CachedLoss(a.loss + 0.5 * b.loss, gradients, terms[0] + 0.5 * terms[1], {"direct": float(a.loss)})

    def gradients(self) -> list[Tensor]:
        found = [p.grad.clone() for p in self.parameters() if p.grad is not None]
        self.zero_grad()
        return found


def plain_step(model: Model, chunks: list[slice]) -> tuple[float, list[Tensor]]:
    outputs = [model.encode(rows) for rows in chunks]
    names = ["direct", "target", "reasoned"]
    joined = {name: torch.cat([o.embeddings[name] for o in outputs if name in o.embeddings]) for name in names}
    contrast = model.plain_loss(joined)
    own = torch.stack([o.loss for o in outputs if o.loss is not None]).sum()
    (contrast + own).backward()
    return float(contrast.detach()), model.gradients()


def assert_equal_gradients(given: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(given) == len(expected)
    for a, b in zip(given, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("kept", [1, 3, 13])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("chunks", [RAGGED, [slice(0, 13)], [slice(i, i + 1) for i in range(13)]], ids=len)
def test_the_cached_step_equals_the_plain_step(chunks: list[slice], dropout: float, kept: int) -> None:
    model = Model(dropout)
    torch.manual_seed(5)
    expected_loss, expected = plain_step(model, chunks)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    step = cached_step(chunks, model.forward_chunk, model.cached_loss, kept_graphs=kept)
    assert torch.equal(torch.rand(3), expected_next)  # the random stream goes on as after a plain step
    assert float(step.loss) == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(model.gradients(), expected)


def test_dropout_masks_differ_between_chunks() -> None:
    model = Model(0.4)
    model.x[4:8] = model.x[:4]
    step = cached_step([slice(0, 4), slice(4, 8)], model.forward_chunk, model.cached_loss)
    direct = step.embeddings["direct"]
    assert not torch.allclose(direct[:4], direct[4:])


def test_what_a_step_reports() -> None:
    model = Model(0.0)
    step: CachedStep = cached_step(RAGGED, model.forward_chunk, model.cached_loss)
    assert {name: tuple(x.shape) for name, x in step.embeddings.items()} == {
        "direct": (13, 8),
        "target": (13, 8),
        "reasoned": (5, 8),
    }
    assert step.chunk_loss is not None
    own = model.encode(slice(0, 13)).loss
    assert own is not None
    torch.testing.assert_close(step.chunk_loss, own.detach())
    assert step.logs["rows"] == 13
    assert float(step.logs["own"]) == pytest.approx(own.item())
    assert step.logs["direct"] == pytest.approx(
        model.contrast(step.embeddings["direct"], step.embeddings["target"]).item()
    )
    assert not step.loss.requires_grad


@pytest.mark.parametrize("kept", [1, 4])
def test_under_autocast_every_weight_gets_its_gradient(kept: int) -> None:
    # Weights cast without a graph stay in autocast's cache; taken from there their gradient would be lost.
    model = Model(0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, expected = plain_step(model, RAGGED)
        cached_step(RAGGED, model.forward_chunk, model.cached_loss, kept_graphs=kept)
    assert_equal_gradients(model.gradients(), expected, tolerance=2e-2)  # bfloat16 products summed in another order


def test_gradients_are_added_to_those_there_are() -> None:
    model = Model(0.0)
    _, expected = plain_step(model, RAGGED)
    for _ in range(2):
        cached_step(RAGGED, model.forward_chunk, model.cached_loss)
    assert_equal_gradients(model.gradients(), [2 * x for x in expected])


@pytest.mark.parametrize(
    ("kept", "passes"),
    [
        (1, [(0, False), (4, False), (5, False), (11, True), (0, True), (4, True), (5, True)]),
        (2, [(0, False), (4, False), (5, True), (11, True), (0, True), (4, True)]),
        (9, [(0, True), (4, True), (5, True), (11, True)]),
    ],
)
def test_chunks_that_keep_their_graph_are_encoded_once_the_others_twice(
    kept: int, passes: list[tuple[int, bool]]
) -> None:
    model = Model(0.0)
    seen: list[tuple[int, bool]] = []

    def forward(rows: slice, final: bool) -> ChunkOutput:
        seen.append((rows.start, final))
        return model.forward_chunk(rows, final)

    cached_step(RAGGED, forward, model.cached_loss, kept_graphs=kept)
    assert seen == passes


@pytest.mark.parametrize("kept", [1, 2, 9])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_backward_pass_is_synchronised_and_it_is_the_last(count: int, kept: int) -> None:
    model = Model(0.0)
    quiet = False
    backward: list[bool] = []
    forward: list[bool] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        nonlocal quiet
        quiet = True
        yield
        quiet = False

    def run_backward(loss: Tensor) -> None:
        backward.append(quiet)
        loss.backward()

    def run_forward(rows: slice, final: bool) -> ChunkOutput:
        if final:
            forward.append(quiet)
        return model.forward_chunk(rows, final)

    cached_step(
        RAGGED[:count],
        run_forward,
        model.cached_loss,
        backward=run_backward,
        no_sync=no_sync,
        kept_graphs=kept,
    )
    expected = [True] * (count - 1) + [False]
    assert backward == expected
    assert forward == expected


@pytest.mark.parametrize(
    ("kept", "expected"), [(1, [1, 1, 1, 1]), (2, [1, 2, 1, 1]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])]
)
def test_no_more_graphs_live_than_asked_for(kept: int, expected: list[int]) -> None:
    model = Model(0.0)
    alive: list[int] = []
    live = 0

    def forward(rows: slice, final: bool) -> ChunkOutput:
        nonlocal live
        output = model.forward_chunk(rows, final)
        if final:
            live += 1
            alive.append(live)
        return output

    def backward(loss: Tensor) -> None:
        nonlocal live
        loss.backward()
        live -= 1

    cached_step(RAGGED, forward, model.cached_loss, backward=backward, kept_graphs=kept)
    assert alive == expected


class Meter:
    """Bytes that graphs hold for their backward passes: now, and at most."""

    def __init__(self) -> None:
        self.now, self.most = 0, 0

    def pack(self, tensor: Tensor) -> Held:
        return Held(tensor.detach(), self)

    def __enter__(self) -> Meter:
        self.hooks = saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class Held:
    """A tensor that a graph has saved; the meter forgets it with the graph."""

    def __init__(self, tensor: Tensor, meter: Meter) -> None:
        self.tensor, self.meter, self.bytes = tensor, meter, tensor.nbytes
        meter.now += self.bytes
        meter.most = max(meter.most, meter.now)

    def __del__(self) -> None:
        self.meter.now -= self.bytes


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
def test_what_graphs_hold_is_flat_in_the_number_of_chunks(cached: bool) -> None:
    most = []
    for count in (2, 8, 32):
        model = Model(0.4)
        model.x, model.y = torch.randn(4 * count, 6), torch.randn(4 * count, 6)
        chunks = [slice(start, start + 4) for start in range(0, 4 * count, 4)]
        with Meter() as meter:
            if cached:
                cached_step(chunks, model.forward_chunk, model.cached_loss)
            else:
                plain_step(model, chunks)
        assert meter.now == 0
        most.append(meter.most)
    if cached:
        assert max(most) <= 1.1 * most[0]
    else:
        assert most[2] > 10 * most[0]


def test_an_embedding_that_is_a_view_keeps_no_chunk_in_memory() -> None:
    weight = nn.Parameter(torch.ones(8))
    states: list[StorageWeakRef] = []

    def forward(rows: slice, final: bool) -> ChunkOutput:
        assert sum(not state.expired() for state in states) <= 2  # the one before, and that of the kept graph
        hidden = weight * torch.ones(rows.stop - rows.start, 50, 8)
        states.append(StorageWeakRef(hidden.untyped_storage()))
        return ChunkOutput({"query": hidden[:, -1]})

    def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
        assert sum(not state.expired() for state in states) == 1  # of the chunk whose graph is kept
        return CachedLoss(embeddings["query"].sum(), {"query": torch.ones_like(embeddings["query"])})

    cached_step([slice(row, row + 1) for row in range(6)], forward, loss)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.full((8,), 6.0))


def test_a_name_without_gradient_and_chunks_without_own_loss() -> None:
    net = nn.Linear(3, 2)
    x = torch.randn(4, 3)

    def forward(rows: slice, final: bool) -> ChunkOutput:
        return ChunkOutput({"used": net(x[rows]), "ignored": net(x[rows])})

    def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
        return CachedLoss(embeddings["used"].sum(), {"used": torch.ones_like(embeddings["used"])})

    step = cached_step([slice(0, 3), slice(3, 4)], forward, loss)
    assert step.chunk_loss is None
    assert net.weight.grad is not None
    torch.testing.assert_close(net.weight.grad, x.sum(0).expand(2, 3))


def test_float16_embeddings_take_a_scaled_loss() -> None:
    """Gradients that float16 holds only times 65536, which is itself too large for it."""
    rows = torch.eye(8, dtype=torch.float16)
    query = nn.Parameter(rows.clone())
    contrast = InfoNCE(temperature=0.05)

    def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
        found = contrast.with_grads(embeddings["query"], rows)
        return CachedLoss(found.loss, {"query": found.query_grad})

    cached_step(
        [slice(0, 3), slice(3, 8)],
        lambda part, final: ChunkOutput({"query": query[part] * 1.0}),
        loss,
        backward=lambda term: (term * 2.0**16).backward(),
    )
    expected = infonce_with_grads(InfoNCEBatch(rows.double(), rows.double(), 0.05)).query_grad
    assert query.grad is not None
    torch.testing.assert_close(query.grad.double() / 2**16, expected, rtol=1e-3, atol=0)


def test_mistakes_are_named() -> None:
    model = Model(0.0)
    with pytest.raises(ValueError, match="cached_step got no chunks"):
        cached_step([], model.forward_chunk, model.cached_loss)
    with pytest.raises(ValueError, match=r"cached_step\.kept_graphs is 0; give 1 or more"):
        cached_step(RAGGED, model.forward_chunk, model.cached_loss, kept_graphs=0)
    with pytest.raises(
        ValueError, match=r"gradient 'direct' of shape \(1,\); the embeddings are .*'direct': \(13, 8\)"
    ):
        cached_step(RAGGED, model.forward_chunk, lambda e: CachedLoss(torch.ones(()), {"direct": torch.ones(1)}))
    with pytest.raises(ValueError, match="chunk 3 has neither an embedding with a gradient nor a loss"):
        cached_step(
            RAGGED,
            lambda rows, final: ChunkOutput({"direct": model.encode(rows).embeddings["direct"]}),
            lambda embeddings: CachedLoss(torch.ones(()), {}),
        )


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_replayed() -> None:
    model = Model(0.4).cuda()
    model.x, model.y = model.x.cuda(), model.y.cuda()
    torch.manual_seed(5)
    _, expected = plain_step(model, RAGGED)
    torch.manual_seed(5)
    cached_step(RAGGED, model.forward_chunk, model.cached_loss)
    assert_equal_gradients(model.gradients(), expected, tolerance=1e-4)  # TF32 is off; products in another order
