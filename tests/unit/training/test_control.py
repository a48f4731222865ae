"""The control phase: on-policy passes, gradients independent of chunks, advantages, reference, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.backbones.tuning import LoraSettings
from mmemb.data.sources import Source, Stream
from mmemb.interfaces import Model, SetupContext
from mmemb.losses.grpo import GRPO
from mmemb.losses.infonce import InfoNCE
from mmemb.training.control import replay as policy
from mmemb.training.control.objective import Control
from mmemb.training.control.rewards import Outcome, Retrieval, Reward, Utility
from mmemb.training.module import EmbeddingModule
from mmemb.training.objective import StepContext
from mmemb.training.phases import Phase
from mmemb.types import THINK, EvaluationTask, Item, ModelInputs, Pair, Text
from tests.unit.inference.fakes import WORDS, FakeBackbone, FakeMeanPooler, FakePooler
from tests.unit.training.small import largest_difference, small_data, small_module, small_trainer, weights


class WhereItPays(Reward):
    """1 for reasoning on the task ``hard`` and for skipping reasoning on other tasks."""

    def __call__(self, outcome: Outcome) -> Tensor:
        hard = torch.tensor([pair.task == "hard" for pair in outcome.pairs])[outcome.query]
        return (outcome.think == hard).float()


class Nothing(Reward):
    """The same reward for every rollout."""

    def __call__(self, outcome: Outcome) -> Tensor:
        return torch.full((len(outcome.think),), 0.1)


def pairs(count: int = 6) -> list[Pair]:
    """Queries of two tasks. Their first word says which task it is."""
    made = []
    for number in range(count):
        task = ("hard", "easy")[number % 2]
        words = ["what" if task == "hard" else "red", *WORDS[number % 5 : number % 5 + 1 + number % 3]]
        answer = WORDS[-1 - number % 4]
        made.append(Pair(str(number), task, Item("", (Text(" ".join(words)),)), Item("", (Text(answer),)), answer))
    return made


def tasks(rows: list[Pair]) -> list[EvaluationTask]:
    found = []
    for name in ("hard", "easy"):
        candidates = {pair.positive_id: pair.positive for pair in rows if pair.task == name}
        queries = [pair for pair in rows if pair.task == name]
        found.append(EvaluationTask(name, queries, list(candidates.values()), list(candidates)))
    return found


def parts(pooler: type[FakePooler] = FakePooler) -> Model:
    built = pooler()
    built.setup(SetupContext(hidden_size=16))
    return Model(FakeBackbone(), built)


def control(rows: list[Pair], **settings: Any) -> Control:
    options = {"infonce": InfoNCE(temperature=0.2), "group_size": 4, "max_new_tokens": 6, "rewards": [Retrieval()]}
    made = Control(**{**options, **settings})
    made.setup(SetupContext(tasks=tasks(rows)))
    return made


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def one_step(rows: list[Pair], *, pooler: type[FakePooler] = FakePooler, **settings: Any) -> Any:
    made, own = control(rows, **settings), parts(pooler)
    logs = made.step(own, made.collate(own, rows, 3), StepContext(steps=10))
    return logs, gradients(own.backbone), made


@pytest.mark.parametrize("pooler", [FakePooler, FakeMeanPooler])
@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_gradients_do_not_depend_on_chunks(pooler: type[FakePooler], kl_weight: float) -> None:
    rows = pairs(7)
    settings: dict[str, Any] = {"grpo": GRPO(kl_weight=kl_weight), "pooler": pooler}
    logs, whole, _ = one_step(rows, chunk_size=7, **settings)
    scale = max(float(value.abs().max()) for value in whole.values())
    for chunk_size in (3, 1):
        again, cut, _ = one_step(rows, chunk_size=chunk_size, **settings)
        assert cut.keys() == whole.keys()
        assert largest_difference(cut, whole) <= 1e-4 * scale
        assert float(again["loss"]) == pytest.approx(float(logs["loss"]), rel=1e-4)


def test_the_first_pass_is_on_policy() -> None:
    """The ratios are 1: nothing is clipped, the KL to a fresh copy is 0, and the loss is minus the mean advantage."""
    logs, _, _ = one_step(pairs(), grpo=GRPO(kl_weight=1.0, clip_low=1e-4, clip_high=1e-4))
    assert float(logs["decision_clip_share"]) == float(logs["rationale_clip_share"]) == 0
    assert float(logs["kl"]) == pytest.approx(0, abs=1e-8)


def test_every_measure_is_logged() -> None:
    logs, _, made = one_step(pairs(), rewards=[Retrieval(), Utility()], grpo=GRPO(kl_weight=0.1))
    assert set(logs) >= {
        *(f"{kind}/{name}" for kind in ("reward", "reward_spread") for name in ("retrieval", "utility", "total")),
        *(
            "zero_spread_share",
            "kl",
            "decision_entropy",
            "decision_clip_share",
            "rationale_clip_share",
            "invocation_rate",
        ),
        *("think_probability", "tokens_per_query", "regret", "infonce_direct", "infonce_reasoned", "exploration"),
    }
    assert all(value.isfinite() for value in logs.values())
    assert float(logs["regret"]) >= 0
    assert float(logs["exploration"]) == made.exploration
    assert "kl" not in one_step(pairs())[0]  # what is not measured is not logged


def test_equal_rewards_give_no_gradient() -> None:
    logs, found, _ = one_step(pairs(), rewards=[Nothing()], direct_weight=0.0, reasoned_weight=0.0)
    assert float(logs["zero_spread_share"]) == 1
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize(("decision_weight", "rationale_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_decision_and_rationale_have_separate_advantages(decision_weight: float, rationale_weight: float) -> None:
    _, found, _ = one_step(
        pairs(),
        decision_weight=decision_weight,
        rationale_weight=rationale_weight,
        direct_weight=0.0,
        reasoned_weight=0.0,
    )
    # If only the decision is rewarded, the rationale has nothing to learn.
    _, told, _ = one_step(
        pairs(),
        rewards=[WhereItPays()],
        decision_weight=decision_weight,
        rationale_weight=rationale_weight,
        direct_weight=0.0,
        reasoned_weight=0.0,
    )
    assert any(value.any() for value in found.values())
    assert any(value.any() for value in told.values()) is (decision_weight > 0)


def test_the_model_learns_the_decision_that_is_known_to_be_best() -> None:
    rows = pairs(8)
    made, own = control(rows, rewards=[WhereItPays()], rationale_weight=0.0, final_exploration=0.0), parts()
    optimizer = torch.optim.Adam(own.backbone.parameters(), lr=0.02)
    first = {}
    for step in range(40):
        optimizer.zero_grad()
        logs = made.step(own, made.collate(own, rows, 100 * step), StepContext(step=step, steps=40))
        first = first or logs
        optimizer.step()
    assert float(first["reward/where_it_pays"]) < 0.8
    assert float(logs["reward/where_it_pays"]) > 0.93
    assert float(logs["regret"]) < 0.05
    assert float(logs["decision_entropy"]) < float(first["decision_entropy"])


def test_the_decision_starts_undecided_even_if_the_model_has_a_preference() -> None:
    """A shift of all decision logits shifts the policy's center too, so the rollouts stay the same."""
    rows = pairs(8)
    logs, _, made = one_step(rows)
    again, own = control(rows), parts()
    logits = own.backbone.logits

    def shifted(hidden: Tensor) -> Tensor:
        found = logits(hidden).clone()
        found[..., own.backbone.token_id(THINK)] += 7.0
        return found

    own.backbone.logits = shifted  # type: ignore[method-assign]
    moved = again.step(own, again.collate(own, rows, 3), StepContext(steps=10))
    policy, other = made.phase_state()["policy"], again.phase_state()["policy"]
    assert other[0] - policy[0] == pytest.approx(7.0, abs=1e-4)
    assert other[1] == pytest.approx(policy[1], abs=1e-4)
    assert float(moved["think_probability"]) == pytest.approx(float(logs["think_probability"]), abs=1e-4)
    assert 0.3 < float(logs["think_probability"]) < 0.7


def test_a_restored_phase_without_a_step_keeps_its_state() -> None:
    rows = pairs()
    _, _, made = one_step(rows)
    state = made.phase_state()
    again = control(rows)
    again.load_phase_state(state)
    assert again.phase_state() == state
    own = parts()
    again.step(own, again.collate(own, rows, 3), StepContext(step=1, steps=10))
    assert again.phase_state()["policy"] == state["policy"]


def test_further_updates_on_the_same_rollouts_are_off_policy_and_clipped() -> None:
    rows = pairs()
    made, own = control(rows, iterations=3, grpo=GRPO(clip_low=0.01, clip_high=0.01, kl_weight=0.1)), parts()
    optimizer = torch.optim.SGD(own.backbone.parameters(), lr=0.3)
    taken = []

    def update() -> None:
        taken.append(len(gradients(own.backbone)))
        optimizer.step()
        optimizer.zero_grad()

    logs = made.step(own, made.collate(own, rows, 3), StepContext(steps=10, update=update))
    assert len(taken) == 2
    assert float(logs["decision_clip_share"]) > 0
    assert float(logs["kl"]) > 0
    assert "infonce_direct" in logs


def test_logits_are_computed_for_rationales_only_and_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "TOKENS_AT_ONCE", 5)
    _, expected, _ = one_step(pairs())
    sizes: list[int] = []
    logits = FakeBackbone.logits

    def noted(self: FakeBackbone, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            sizes.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(FakeBackbone, "logits", noted)
    _, found, made = one_step(pairs())
    assert sizes
    assert max(sizes) <= max(5, made.chunk_size)
    monkeypatch.setattr(policy, "TOKENS_AT_ONCE", 10_000)
    _, whole, _ = one_step(pairs())
    for other in (found, whole):
        scale = max(float(value.abs().max()) for value in other.values())
        assert largest_difference(expected, other) <= 1e-4 * scale


def test_the_reference_is_the_model_without_its_adapters() -> None:
    torch.manual_seed(0)
    backbone = TinyBackbone(weights="random", lora=LoraSettings(rank=2))
    reference = policy.ReferencePolicy(backbone)
    assert reference.state() == {}
    inputs = backbone.prepare([Item("", (Text("red dog"),))])
    base = backbone(inputs).detach()
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    assert not torch.allclose(backbone(inputs), base)
    with reference.model(backbone) as model:
        torch.testing.assert_close(model(inputs), base)
    assert not torch.allclose(backbone(inputs), base)


def test_invalid_settings_are_refused() -> None:
    for wrong, said in (
        ({"group_size": 1}, "group_size is 1; give 2 or more"),
        ({"exploration": 0.1, "final_exploration": 0.2}, "final_exploration is 0.2; give a number from 0 to 0.1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rewards": []}, "the rewards are none"),
        ({"rewards": [Nothing(), Nothing()]}, "each class once"),
    ):
        with pytest.raises(ValueError, match=said):
            Control(**wrong)  # type: ignore[arg-type]
    own, rows = parts(), pairs()
    made = control(rows, infonce=None)
    with pytest.raises(ValueError, match="give `infonce`"):
        made.step(own, made.collate(own, rows, 0), StepContext())
    with pytest.raises(ValueError, match="phase.steps is -1"):
        Phase(made, steps=-1)


# -- in a run ------------------------------------------------------------------------------------------------------


def two_phases(*, start: int = 2, kl_weight: float = 0.1, lora: bool = True) -> EmbeddingModule:
    """A module with a joint and a control phase. Its joint steps draw random numbers."""
    objective = Control(
        rewards=[Utility()],
        grpo=GRPO(kl_weight=kl_weight),
        group_size=2,
        max_new_tokens=4,
        bank_size=8,
        refresh_every=3,
        chunk_size=2,
        iterations=2,
    )
    torch.manual_seed(1)
    backbone = TinyBackbone(weights="random", lora=LoraSettings(rank=4, dropout=0.3) if lora else None)
    phase = Phase(objective, data="control", learning_rate_factor=0.5, warmup_steps=5)
    return small_module(backbone=backbone, steps=start, following=[phase])


def control_stream(*, batch_size: int, sub_batch_size: int) -> Stream:
    """Two tasks of the bundled control split."""
    sources = [Source(path="bundled:control", tasks=["name", "flagattr"])]
    return Stream(sources, batch_size, sub_batch_size)


def run(
    folder: Path, *, steps: int, resume: str | None = None, lora: bool = True, start: int = 2, **settings: Any
) -> EmbeddingModule:
    module = two_phases(lora=lora, start=start)
    saver = ModelCheckpoint(
        folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", save_on_train_epoch_end=False
    )
    trainer = small_trainer(folder, max_steps=steps, callbacks=[saver], enable_checkpointing=True, **settings)
    data = small_data(batch_size=8, streams={"control": control_stream(batch_size=4, sub_batch_size=2)})
    ckpt_path = None if resume is None else folder / f"step={resume}.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["adapters", "frozen copy"])
def test_a_run_resumed_in_either_phase_equals_the_uninterrupted_one(tmp_path: Path, lora: bool) -> None:
    whole = run(tmp_path, steps=6, lora=lora)
    kept = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert kept["phases"][1]["bank"]["embedded"].keys() == {"name", "flagattr"}
    assert bool(kept["phases"][1]["reference"]) is not lora
    for step in ("1", "2", "4"):  # in the joint phase, at its end, and between two refreshes of the candidates
        torch.manual_seed(99)
        resumed = run(tmp_path, steps=6, resume=step, lora=lora)
        assert largest_difference(weights(whole), weights(resumed)) == 0.0, f"resumed after {step} steps"
    other = torch.load(tmp_path / "step=6-v1.ckpt", weights_only=True)
    assert kept["global_step"] == other["global_step"] == 6, "further updates on a batch are no steps of the run"
    assert str(kept["optimizer_states"]) == str(other["optimizer_states"])
    assert str(kept["phases"]) == str(other["phases"])


def test_a_run_that_ends_before_the_control_phase_does_not_enter_it(tmp_path: Path) -> None:
    module = run(tmp_path, steps=2, start=5)
    assert module.phase_at(2).name == "joint"
    assert torch.load(tmp_path / "step=2.ckpt", weights_only=True)["phases"] == [{}, {}]


@pytest.mark.slow
def test_two_ranks_take_the_same_control_steps_as_one(tmp_path: Path) -> None:
    def trained(folder: str, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        objective = Control(rewards=[Utility()], group_size=4, max_new_tokens=4, bank_size=8, chunk_size=2)
        module = small_module(steps=0, following=[Phase(objective, data="control", warmup_steps=5)])
        before = weights(module)
        batch_size = settings.pop("batch_size")
        data = small_data(batch_size=8, streams={"control": control_stream(batch_size=batch_size, sub_batch_size=4)})
        small_trainer(tmp_path / folder, max_steps=2, **settings).fit(module, datamodule=data)
        return before, weights(module)

    start, one = trained("one", batch_size=8)
    _, two = trained("two", batch_size=4, devices=2, strategy=DDPStrategy(start_method="spawn"))
    moved = largest_difference(start, one)
    assert moved > 1e-4
    assert largest_difference(one, two) <= 1e-3 * moved


def test_a_batch_moves_to_the_device_without_its_chunks() -> None:
    rows = pairs()
    batch = control(rows).collate(parts(), rows, 0).to("meta")
    assert batch.query_id.is_meta
    assert not any(inputs.emb_position.is_meta for chunk in batch.chunks for inputs in chunk)


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
def test_a_step_moves_prompts_and_targets_just_before_it_uses_them(
    kl_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pairs()
    made, own, moved = control(rows, grpo=GRPO(kl_weight=kl_weight), chunk_size=3), parts(), []
    batch = made.collate(own, rows, 0)
    of_class = ModelInputs.to
    named = {
        id(inputs): (number, side) for number, chunk in enumerate(batch.chunks) for side, inputs in enumerate(chunk)
    }

    def to(inputs: ModelInputs, device: torch.device, non_blocking: bool = False) -> ModelInputs:
        if id(inputs) in named:
            moved.append(named[id(inputs)])
        return of_class(inputs, device, non_blocking)

    monkeypatch.setattr(ModelInputs, "to", to)
    made.step(own, batch, StepContext(steps=10))
    prompts = [(0, 0), (1, 0)]
    assert moved == [(0, 1), (1, 1), *(prompts if kl_weight else []), (0, 0), (0, 1), (1, 0), (1, 1)]
