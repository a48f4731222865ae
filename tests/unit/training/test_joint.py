"""The joint objective: cached gradients equal plain gradients, on one rank and on two, and every term trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from mmemb.components.backbones.tiny import FOLDER, TinyBackbone
from mmemb.components.backbones.transformers import TransformersBackbone
from mmemb.components.poolers.mean import Mean
from mmemb.components.workers.metadata import MetadataWorker
from mmemb.data.bundled import load_pairs
from mmemb.interfaces import Choose, SetupContext
from mmemb.kernels import infonce
from mmemb.training.joint.batch import TrainBatch, TrainChunk
from mmemb.training.joint.query_paths import SeparatePaths, SharedPrompts
from mmemb.training.objective import StepContext, next_token_loss
from mmemb.types import Rationale
from tests.unit.training.small import (
    largest_difference,
    metadata_choice,
    small_data,
    small_module,
    small_trainer,
    weights,
)


@pytest.fixture(scope="module")
def pairs() -> list:
    found = load_pairs("train", tasks=["name", "flagattr"], scenes_per_task=1)
    return found[:7] + found[-6:]


def apart(pairs: list) -> list:
    """One pair per positive."""
    return list({pair.positive_id: pair for pair in pairs}.values())


def plain_loss(module, batch: TrainBatch) -> torch.Tensor:
    """The objective written in one piece: a single chunk, and autograd through everything."""
    (chunk,) = batch.chunks
    paths = chunk.query
    assert isinstance(paths, SeparatePaths)
    model, objective = module.model, module.phases[0].objective

    def embed(inputs):
        hidden = model.backbone(inputs)
        return hidden, model.pooler(hidden, inputs.tensors["attention_mask"], inputs.emb_position)

    hidden, direct = embed(paths.direct)
    reasoned_hidden, reasoned = embed(paths.reasoned)
    _, target = embed(chunk.target)
    temperature = objective.infonce.temperature
    loss = torch.zeros(())
    for queries, rows in ((direct, torch.arange(len(direct))), (reasoned, paths.rows)):
        loss = loss + infonce(
            queries,
            target,
            temperature=temperature,
            positive=batch.positive[rows],
            query_id=batch.query_id[rows],
            candidate_id=batch.candidate_id,
        )
    skipped = torch.ones(len(direct), dtype=torch.bool)
    skipped[paths.rows] = False
    nll = next_token_loss(model.backbone, hidden, paths.direct, skipped)
    nll = nll + next_token_loss(model.backbone, reasoned_hidden, paths.reasoned)
    tokens = int((paths.reasoned.labels != -100).sum()) + int(skipped.sum())
    return loss + objective.next_token_weight * nll / tokens


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def separately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the model from sharing a prompt between its paths."""
    monkeypatch.setattr(TinyBackbone, "keeps_cache_in_training", False)


@pytest.mark.parametrize(
    ("chunk_size", "kept", "shared"), [(13, 1, True), (5, 1, True), (1, 1, True), (5, 1, False), (5, 3, True)]
)
def test_a_cached_step_has_the_gradients_of_the_plain_loss(
    pairs: list, chunk_size: int, kept: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small_module()
    # Some pairs have no rationale. The others may have two.
    module.phases[0].objective.setup(
        SetupContext(choose=lambda pair, seed: metadata_choice(pair, seed) * (1 + seed % 2))
    )
    module.phases[0].objective.augment = None  # off, because chunks draw it for their own rows
    module.phases[0].objective.chunk_size = len(pairs)
    with monkeypatch.context() as apart:
        separately(apart)
        whole = module.phases[0].objective.collate(module.model, pairs, 0)
    expected_loss = plain_loss(module, whole)
    expected_loss.backward()
    expected = gradients(module)
    module.zero_grad()
    module.phases[0].objective.chunk_size = chunk_size
    module.phases[0].objective.kept_graphs = kept
    if not shared:
        separately(monkeypatch)
    batch = module.phases[0].objective.collate(module.model, pairs, 0)
    assert all(isinstance(chunk.query, SharedPrompts) == shared for chunk in batch.chunks)
    logs = module.phases[0].objective.step(module.model, batch, StepContext())
    assert float(logs["loss"]) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    found = gradients(module)
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert largest_difference(found, expected) <= 1e-5 * scale
    assert "objectives.0.infonce.log_temperature" in found


def test_a_pooler_that_needs_every_state_gets_both_paths_whole(pairs: list, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for keeps in (True, False):
        monkeypatch.setattr(TinyBackbone, "keeps_cache_in_training", keeps)
        module = small_module(pooler=Mean())
        batch = module.phases[0].objective.collate(module.model, pairs, 0)
        assert all(isinstance(chunk.query, SeparatePaths) for chunk in batch.chunks)
        results.append(float(module.phases[0].objective.step(module.model, batch, StepContext())["loss"]))
    assert results[0] == results[1]


def test_both_kinds_of_paths_augment_a_picture_in_the_same_way(pairs: list, monkeypatch: pytest.MonkeyPatch) -> None:
    module = small_module()
    module.phases[0].objective.setup(SetupContext(choose=lambda pair, seed: [(Rationale("a flag"), 1.0)]))
    shared = module.phases[0].objective.collate(module.model, pairs[:4], 0).chunks[0].query.prompt
    separately(monkeypatch)
    whole = module.phases[0].objective.collate(module.model, pairs[:4], 0).chunks[0].query
    for inputs in (whole.direct, whole.reasoned):
        assert torch.equal(inputs.tensors["pixel_values"], shared.tensors["pixel_values"])


def test_gradient_checkpointing_prevents_a_shared_prompt() -> None:
    assert TinyBackbone(weights="random").keeps_cache_in_training
    backbone = TransformersBackbone(str(FOLDER), weights="random", gradient_checkpointing=True)
    assert not backbone.keeps_cache_in_training


def test_pairs_without_a_rationale_train_the_direct_path_and_the_decision_not_to_reason(pairs: list) -> None:
    module = small_module()
    module.phases[0].objective.setup(SetupContext(choose=lambda pair, seed: []))
    batch = module.phases[0].objective.collate(module.model, pairs, 0)
    assert all(len(chunk.query.rows) == 0 for chunk in batch.chunks)
    logs = module.phases[0].objective.step(module.model, batch, StepContext())
    assert "infonce_reasoned" not in logs
    # Each row has one label, <emb>. With random weights the loss is near log V.
    assert float(logs["next_token"]) == pytest.approx(
        float(torch.tensor(module.backbone.logits(torch.zeros(1, module.backbone.hidden_size)).shape[-1]).log()),
        rel=0.2,
    )


def test_the_selectors_weight_scales_the_reasoned_loss_of_a_row(pairs: list) -> None:
    rows = apart(pairs)[:4]
    texts = [MetadataWorker().propose([pair.query], 1, seed=0)[0][0] for pair in rows]

    def weighted(heavy: float) -> Choose:
        return lambda pair, seed: [(texts[rows.index(pair)], heavy if pair is rows[0] else 1.0)]

    results = []
    for heavy in (1.0, 5.0):
        module = small_module()
        module.phases[0].objective.setup(SetupContext(choose=weighted(heavy)))
        batch = module.phases[0].objective.collate(module.model, rows, 0)
        results.append(float(module.phases[0].objective.step(module.model, batch, StepContext())["infonce_reasoned"]))
    assert results[0] != pytest.approx(results[1], rel=1e-6)


def test_a_pair_may_train_several_rationales_as_weighted_rows(pairs: list) -> None:
    rows = apart(pairs)[:4]
    texts = [MetadataWorker().propose([pair.query], 1, seed=0)[0][0] for pair in rows]
    several = [[(texts[0], 0.25), (texts[0], 0.75)], [], [(texts[2], 1.0)], [(texts[3], 1.0)]]
    single = [[(texts[0], 1.0)], *several[1:]]
    results = []
    for chosen in (several, single):
        module = small_module()
        module.phases[0].objective.next_token_weight = 0.0
        module.phases[0].objective.setup(
            SetupContext(choose=lambda pair, seed, chosen=chosen: chosen[rows.index(pair)])
        )
        batch = module.phases[0].objective.collate(module.model, rows, 0)
        assert sum(len(chunk.query.rows) for chunk in batch.chunks) == sum(map(len, chosen))
        logs = module.phases[0].objective.step(module.model, batch, StepContext())
        results.append((float(logs["infonce_reasoned"]), gradients(module)))
    (one, first), (other, second) = results
    assert one == pytest.approx(other, rel=1e-5)  # a text twice, with its weight split, counts as the text once
    scale = max(float(value.abs().max()) for value in second.values())
    assert largest_difference(first, second) <= 1e-5 * scale


def test_batches_are_equal_for_equal_seeds_and_differ_otherwise(pairs: list) -> None:
    module = small_module()
    first, again, other = (module.phases[0].objective.collate(module.model, pairs, seed) for seed in (3, 3, 4))
    pixels = [batch.chunks[0].query.prompt.tensors["pixel_values"] for batch in (first, again, other)]
    assert torch.equal(pixels[0], pixels[1])
    assert not torch.equal(pixels[0], pixels[2])


def test_duplicated_targets_are_not_negatives(pairs: list) -> None:
    module = small_module()
    module.phases[0].objective.setup(SetupContext(choose=lambda pair, seed: []))
    module.phases[0].objective.next_token_weight = 0.0
    twice = [pairs[0], pairs[0]]
    logs = module.phases[0].objective.step(
        module.model, module.phases[0].objective.collate(module.model, twice, 0), StepContext()
    )
    assert float(logs["infonce_direct"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(tmp_path: Path) -> None:
    one = small_module()
    small_trainer(tmp_path / "one").fit(one, datamodule=small_data(batch_size=16))
    two = small_module()
    start = weights(two)
    strategy = DDPStrategy(start_method="spawn")
    trainer = small_trainer(tmp_path / "two", devices=2, strategy=strategy)
    trainer.fit(two, datamodule=small_data(batch_size=8))
    moved = largest_difference(start, weights(one))
    assert moved > 1e-3
    assert largest_difference(weights(one), weights(two)) <= 1e-5 * max(1.0, moved)


def test_a_batch_moves_to_the_device_without_its_chunks(pairs: list) -> None:
    module = small_module()
    batch = module.phases[0].objective.collate(module.model, pairs, 0).to("meta")
    assert batch.query_id.is_meta
    assert batch.positive.is_meta
    assert not any(chunk.target.emb_position.is_meta or chunk.query.rows.is_meta for chunk in batch.chunks)


def test_a_step_moves_each_chunk_to_the_device_just_before_it_uses_it(
    pairs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, moved = small_module(), []
    batch = module.phases[0].objective.collate(module.model, pairs, 0)
    of_class = TrainChunk.to

    def to(chunk: TrainChunk, device: torch.device) -> TrainChunk:
        moved.append((batch.chunks.index(chunk), device))
        return of_class(chunk, device)

    monkeypatch.setattr(TrainChunk, "to", to)
    monkeypatch.setattr(TrainChunk, "__eq__", object.__eq__)  # by identity: == on tensors gives no bool
    module.phases[0].objective.step(module.model, batch, StepContext())
    assert [number for number, _ in moved] == [0, 1, 2, 3, 0, 1, 2]  # the last chunk keeps its graph
    assert {device for _, device in moved} == {batch.query_id.device}


@pytest.mark.gpu
def test_a_step_on_a_gpu_has_the_loss_of_the_cpu(pairs: list) -> None:
    logs = []
    for device in ("cpu", "cuda"):
        module = small_module().to(device)
        batch = module.phases[0].objective.collate(module.model, pairs, 0).to(device)
        logs.append(module.phases[0].objective.step(module.model, batch, StepContext()))
    for name, value in logs[0].items():
        torch.testing.assert_close(logs[1][name].cpu(), value, rtol=1e-3, atol=1e-4)
