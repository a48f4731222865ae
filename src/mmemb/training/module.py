"""The LightningModule: composes backbone, pooler, objective, selector and controllers, and runs the method's phases.

Optimisation is manual, because the gradient cache needs two passes; everything else of the trainer (strategies,
precision, callbacks, loggers, resume) keeps working. The module knows contracts only: the parts come built.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from mmemb.common.checkpoint import IDENTITY_KEY, refuse_other_backbone
from mmemb.common.checks import check_numbers
from mmemb.data.datamodule import PairDataModule
from mmemb.evaluation import report
from mmemb.evaluation.runner import calibrate, evaluate, merge_results
from mmemb.inference.encoder import Encoder
from mmemb.interfaces import Backbone, Controller, Pooler, Selector, Worker
from mmemb.rationales.settings import PoolSettings
from mmemb.training.objective import Engine, Objective, Parts
from mmemb.training.optimization import clip_gradient_norm, parameter_groups, vector_names
from mmemb.training.phases import Phase, Schedule, Span, scheduler
from mmemb.training.preflight import check_calibrated, check_choice
from mmemb.training.random_state import random_state, restore_random_state
from mmemb.types import EvaluationResults, EvaluationTask, Item, Pair


class EmbeddingModule(L.LightningModule):
    """An embedding model in training.

    Args:
        backbone: the vision-language model.
        objective: what the phase optimises (joint, or next-token pretraining).
        pooler: hidden states -> embedding.
        control: a phase that follows on ``data.control``: when to think, learned by reinforcement; null for none.
        selector: which rationale candidate a pair trains on; null trains the direct path alone.
        controllers: compared in evaluation, each under its short name; calibrated on validation data where needed.
        pool: where rationale candidates come from and are kept.
        reference: worker whose rationales are the evaluation's `true_rationale` row; null leaves the row out.
        optimizer: any torch optimiser by class path, e.g. torch.optim.AdamW or bitsandbytes.optim.AdamW8bit. Its weight
            decay leaves norms, biases and the temperature alone.
        schedule: learning-rate schedule over the steps of the run (those before ``control``), by the transformers
            library.
        warmup_steps: steps of linear warm-up.
        gradient_clip: largest gradient norm; 0 for none.
        encode_batch_size: rows of one forward pass in evaluation.
        budget: most rationale tokens a row may write in evaluation; a controller's own smaller budget holds, and so
            does the backbone's max_rationale_tokens.
        validation_queries: queries a task scored at each validation during training; `mmemb validate` and the final
            evaluation take all.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        objective: Objective,
        pooler: Pooler,
        control: Phase | None = None,
        selector: Selector | None = None,
        controllers: list[Controller] | None = None,
        pool: PoolSettings | None = None,
        reference: Worker | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = "cosine",
        warmup_steps: int = 50,
        gradient_clip: float = 1.0,
        encode_batch_size: int = 64,
        budget: int = 48,
        validation_queries: int = 32,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_numbers("model", at_least=0, warmup_steps=warmup_steps, gradient_clip=gradient_clip)
        check_numbers("model", at_least=1, encode_batch_size=encode_batch_size, validation_queries=validation_queries)
        check_numbers("model", at_least=1, budget=budget)
        # Under LightningCLI these are class paths and plain values, from which a checkpoint rebuilds the parts. Built
        # in Python they would be the parts themselves, which belong in no checkpoint.
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()
        self.backbone = backbone
        self.objective = objective
        self.control = control
        self.control_objective = None if control is None else control.objective
        if self.control_objective is not None:
            self.control_objective.follow(objective)
        self.pooler = pooler
        self.pooler.build(backbone.hidden_size)
        self.selector = selector
        self.controllers: dict[str, Controller] = {}
        for controller in controllers or []:
            name = controller.name or type(controller).__name__
            if name in self.controllers:
                raise ValueError(f"controllers: {name!r} is there twice, and a summary has one row a name; drop one")
            self.controllers[name] = controller
        self.pool = pool
        self.reference = reference
        self.optimizer = optimizer
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.gradient_clip = gradient_clip
        self.encode_batch_size = encode_batch_size
        self.budget = budget
        self.validation_queries = validation_queries
        self.trained_steps = 0
        self.trained_seconds = 0.0
        self.before_training: dict[str, Any] | None = None
        self.before_control: dict[str, Any] = {}
        self._vectors: frozenset[str] = frozenset()
        self._started = time.monotonic()
        self._results: list[EvaluationResults] = []
        self._random_state: dict[str, Tensor] | None = None

    # -- composition -------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        """Backbone and pooler, as objectives take them."""
        return Parts(self.backbone, self.pooler)

    @property
    def in_control(self) -> bool:
        """Whether the step at hand belongs to the control phase."""
        return self.control is not None and self.global_step >= self.control.start

    @property
    def datamodule(self) -> PairDataModule:
        """The trainer's data module."""
        return cast(PairDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]

    def encoder(self, *, progress: bool = False) -> Encoder:
        """An encoder over the model as it is now."""
        return Encoder(
            self.backbone, self.pooler, batch_size=self.encode_batch_size, budget=self.budget, progress=progress
        )

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        self._vectors = vector_names(self)
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy is fsdp, which makes the whole training step one forward pass; the gradient cache "
                "runs backward passes inside it, which FSDP does not allow. Use ddp; for a model that is too large, "
                "lora, quantization or gradient_checkpointing of the backbone"
            )
        if self.objective.needs_rationales:
            check_choice(self.selector, self.pool)
        if self.datamodule.sources["test"] and not self.datamodule.sources["validation"]:
            check_calibrated(self.controllers)
        if isinstance(self.trainer.strategy, DDPStrategy):
            # The backward pass that reduces may belong to a chunk without pictures, which leaves the vision part out.
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        if self.objective.needs_rationales and self.selector is not None and self.pool is not None:
            if self.pool.workers:
                # The trainer moves the model only after this hook; a pool is made where the model will train.
                self.to(self.trainer.strategy.root_device)
            pool = self.pool.open(
                self.datamodule.train_pairs,
                parts=self.parts,
                is_builder=self.trainer.is_global_zero,
                barrier=self.trainer.strategy.barrier,
            )
            self.objective.prepare_choice(self.pool.choice(pool, self.selector))
        if self.control is not None:
            self.datamodule.use_control(self._control_collate, start=self.control.start)
        for objective, split in ((self.objective, "train"), (self.control_objective, "control")):
            if objective is not None and objective.needs_candidates:
                objective.prepare_candidates(self.datamodule.evaluation_tasks(split))

        def collate(pairs: list[Pair], seed: int) -> Any:
            return self.objective.collate(self.parts, pairs, seed)

        self.datamodule.use_collate(collate)

    def _control_collate(self, pairs: list[Pair], seed: int) -> Any:
        assert self.control_objective is not None
        return self.control_objective.collate(self.parts, pairs, seed)

    # -- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        try:
            optimizer = self.optimizer(parameter_groups(self, without_decay=self._vectors))
        except ValueError as error:  # of torch, about a value such as a negative lr
            raise ValueError(f"model.optimizer: {error}") from error
        if self.trainer.estimated_stepping_batches == float("inf"):
            raise ValueError("trainer: the run has no end, and the schedule needs one; give max_steps or max_epochs")
        steps = int(self.trainer.estimated_stepping_batches)
        first = steps if self.control is None else min(self.control.start, steps)
        spans = [Span(first, self.schedule, self.warmup_steps)]
        # A run that never comes to the phase must not end at its rate: resumed with more steps it would begin with it.
        if self.control is not None and first < steps:
            follows = self.control
            spans.append(Span(steps - first, follows.schedule, follows.warmup_steps, follows.learning_rate_factor))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer, spans), "interval": "step"}}

    def on_fit_start(self) -> None:
        self._started = time.monotonic()
        if self.objective.needs_rationales and self.global_step == 0 and self.before_training is None:
            tasks = self.datamodule.evaluation_tasks("test")
            never = {name: part for name, part in self.controllers.items() if name == "never"}
            if tasks and never and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_info("Scoring the model before training (the 'pretrained' row of the summary).")
                results = evaluate(self.encoder(), tasks, controllers=never, true_rationale=None, progress=False)
                self.before_training = results.modes.get("never")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # As late as can be: making loaders and sanity checks draw random numbers that the uninterrupted run did not.
        if self._random_state is not None:
            restore_random_state(self._random_state, self.device, rank=self.global_rank)
            self._random_state = None
        if self.control is not None and self.global_step == self.control.start:
            self._begin_control()

    def _begin_control(self) -> None:
        """Forgets the optimiser's memory of the phase before, and scores the model as it is."""
        cast(LightningOptimizer, self.optimizers()).optimizer.state.clear()
        if self.global_step == 0 or self.before_control or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        tasks = self.datamodule.evaluation_tasks("test")
        paths = {name: part for name, part in self.controllers.items() if name in ("never", "always_reason")}
        if tasks and paths:
            rank_zero_info("Scoring the model before the control phase (the '..._before_control' rows of the summary).")
            results = evaluate(self.encoder(), tasks, controllers=paths, true_rationale=None, progress=False)
            self.before_control = results.modes

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        optimizer.zero_grad()
        phase, objective = ("control", self.control_objective) if self.in_control else ("train", self.objective)
        assert objective is not None
        logs = objective.step(self.parts, batch, self._engine(optimizer))
        optimizer.step()
        schedule = self.lr_schedulers()
        schedule.step()  # type: ignore[union-attr]
        logs["learning_rate"] = torch.tensor(optimizer.param_groups[0]["lr"])
        self.log_dict({f"{phase}/{key}": value for key, value in logs.items()})
        self.log("loss", logs["loss"], prog_bar=True, logger=False)

    def _engine(self, optimizer: torch.optim.Optimizer) -> Engine:
        """What this step's objective needs of the trainer."""
        start = self.control.start if self.control is not None else int(self.trainer.estimated_stepping_batches)

        def update() -> None:
            # Past the wrapper, which would count it as a step of the run.
            raw = getattr(optimizer, "optimizer", optimizer)
            self.trainer.strategy.optimizer_step(raw, lambda: None, model=self)
            optimizer.zero_grad()

        writer: Any = getattr(self.logger, "experiment", None) if self.trainer.is_global_zero else None

        def show(name: str, picture: Any) -> None:
            writer.add_image(name, np.asarray(picture), self.global_step, dataformats="HWC")

        total = int(self.trainer.estimated_stepping_batches)
        return Engine(
            backward=self.manual_backward,
            # Only strategies that reduce gradients have the context; the others have nothing to hold back.
            no_sync=getattr(self.trainer.strategy, "block_backward_sync", nullcontext),
            step=self.global_step - (start if self.in_control else 0),
            steps=total - start if self.in_control else min(start, total),
            update=update,
            show=show if hasattr(writer, "add_image") else None,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here and no earlier: a gradient scaler (precision 16-mixed) has undone its factor by now.
        if self.gradient_clip:
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            clip_gradient_norm(trained, maximum=self.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[IDENTITY_KEY] = self.backbone.identity
        checkpoint["trained_seconds"] = self.trained_seconds + time.monotonic() - self._started
        checkpoint["before_training"] = self.before_training
        if self.control_objective is not None:
            checkpoint["control"] = self.control_objective.phase_state() if self.in_control else {}
            checkpoint["before_control"] = self.before_control
        checkpoint["random_state"] = random_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_backbone(checkpoint, identity=self.backbone.identity)
        self.trained_steps = checkpoint["global_step"]
        self.trained_seconds = checkpoint["trained_seconds"]
        self.before_training = checkpoint["before_training"]
        self.before_control = checkpoint.get("before_control", {})
        if self.control_objective is not None and checkpoint.get("control"):
            self.control_objective.load_phase_state(checkpoint["control"])
        self._random_state = checkpoint["random_state"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's.

        Raises:
            ValueError: the weights are of other parts.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint does not fit the settings ({' '.join(str(error).split())[:300]}); give the config "
                "that it was trained with (config.yaml in its run folder)"
            ) from error

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, task: EvaluationTask, batch_idx: int) -> None:
        fitting = self.trainer.state.fn == "fit"
        most = self.validation_queries if fitting else None
        short = EvaluationTask(task.name, task.queries[:most], task.candidates, task.candidate_ids)
        # While training, the two paths alone: what a controller makes of them needs a calibration.
        controllers = {
            name: part for name, part in self.controllers.items() if not fitting or name in ("never", "always_reason")
        }
        results = evaluate(self.encoder(), [short], controllers=controllers, true_rationale=None, progress=False)
        self._results.append(results)

    def on_validation_epoch_end(self) -> None:
        results = merge_results(self._results)
        self._results = []
        for mode, row in results.modes.items():
            self.log(f"validation/{mode}/hit@1", row["hit@1"], rank_zero_only=True, prog_bar=mode == "never")
            for task, scores in row["by_task"].items():
                self.log(f"validation/{mode}/{task}/hit@1", scores["hit@1"], rank_zero_only=True)

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._calibrate()

    def on_test_start(self) -> None:
        self.trained_seconds += time.monotonic() - self._started
        self._started = time.monotonic()
        self._calibrate()

    def _calibrate(self) -> None:
        tasks = self.datamodule.evaluation_tasks("validation")
        if tasks and self.controllers:
            rank_zero_info("Calibrating controllers on the validation split.")
            calibrate(self.encoder(), tasks, self.controllers)

    def test_step(self, task: EvaluationTask, batch_idx: int) -> None:
        results = evaluate(
            self.encoder(), [task], controllers=self.controllers, true_rationale=self.reference, progress=False
        )
        self._results.append(results)

    def on_test_epoch_end(self) -> None:
        results = merge_results(self._results)
        self._results = []
        if not results.modes or not self.trainer.is_global_zero:
            return
        if self.before_training:
            results.modes["pretrained"] = self.before_training
        for mode, scores in self.before_control.items():
            results.modes[f"{mode}_before_control"] = scores
        step = self.global_step or self.trained_steps  # `mmemb test` takes no step of its own
        settings = {"step": step, "split": "test", **self._settings()}
        seconds = self.trained_seconds + time.monotonic() - self._started
        summary = report.summary(results, settings=settings, seconds=seconds)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        report.publish(folder, summary, results, logger=self.logger, step=step)
        for mode, row in results.modes.items():
            self.log(f"test/{mode}/hit@1", row["hit@1"], rank_zero_only=True)

    def _settings(self) -> dict[str, Any]:
        """What makes a result comparable: the parts by class, the data seed, budgets."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "seed": None if seed is None else int(seed),
            "data_seed": self.datamodule.seed,
            "backbone": self.backbone.identity,
            "pooler": type(self.pooler).__name__,
            "selector": type(self.selector).__name__ if self.selector else None,
            "objective": type(self.objective).__name__,
            "control": type(self.control_objective).__name__ if self.control_objective else None,
            "batch_size": self.datamodule.batch_size,
            "world_size": self.trainer.world_size,
            "budget": self.budget,
            "calibration": {name: part.calibration for name, part in self.controllers.items() if part.calibration},
        }

    def predict_step(self, items: Sequence[Item], batch_idx: int) -> Tensor:
        """Embeddings [B, D] of a batch of items, direct path."""
        return self.encoder().encode_targets(items)
