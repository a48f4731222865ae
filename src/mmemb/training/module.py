"""The LightningModule: combines backbone, pooler, phases, selector and controllers, and runs the phases in order.

Optimisation is manual, because the gradient cache needs two passes. Other features of the trainer keep working:
strategies, precision, callbacks, loggers and resume. The module depends on interfaces only and receives built parts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from mmemb.common import vocabulary
from mmemb.common.checkpoint import IDENTITY_KEY, refuse_other_backbone
from mmemb.common.checks import check_numbers
from mmemb.data.datamodule import PairDataModule, PhaseBatches
from mmemb.evaluation import report
from mmemb.evaluation.runner import calibrate, evaluate, merge_results
from mmemb.inference.encoder import Encoder
from mmemb.interfaces import Backbone, Choose, Controller, Model, Pooler, Selector, SetupContext, Worker
from mmemb.rationales.settings import PoolSettings
from mmemb.training.optimization import clip_gradient_norm, parameter_groups, vector_names
from mmemb.training.phases import Phase, PhaseSpan, phase_spans, scheduler, span_at
from mmemb.training.preflight import check_calibrated, check_choice, check_strategy
from mmemb.training.random_state import random_state, restore_random_state
from mmemb.training.step_context import step_context
from mmemb.types import EvaluationResults, EvaluationTask, Item, Pair

BOTH_PATHS = ("never", "always_reason")
"""The controllers that score a single path. They need no calibration."""


class EmbeddingModule(L.LightningModule):
    """An embedding model in training.

    Args:
        backbone: the vision-language model.
        pooler: turns hidden states into an embedding.
        phases: what is trained, in order. Each phase has its own objective, data and length.
        selector: chooses the rationale candidate that a pair trains on. null trains the direct path only.
        controllers: compared in evaluation, each under its short name, and calibrated on validation data if needed.
        pool: where rationale candidates come from and where they are kept.
        true_rationale: worker whose rationales are the evaluation's `true_rationale` row. null leaves the row out.
        optimizer: any torch optimiser, e.g. AdamW or bitsandbytes.optim.AdamW8bit. Norms, biases and the temperature
            get no weight decay.
        gradient_clip: maximum gradient norm. 0 means no clipping.
        encode_batch_size: rows per forward pass in evaluation.
        budget: maximum number of rationale tokens per row in evaluation. A controller's smaller budget and the
            backbone's max_rationale_tokens still apply.
        validation_queries: queries per task that each validation during training scores. `mmemb validate` and the final
            evaluation score all queries.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        pooler: Pooler,
        phases: list[Phase],
        selector: Selector | None = None,
        controllers: list[Controller] | None = None,
        pool: PoolSettings | None = None,
        true_rationale: Worker | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        gradient_clip: float = 1.0,
        encode_batch_size: int = 64,
        budget: int = 48,
        validation_queries: int = 32,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_numbers("model", at_least=0, gradient_clip=gradient_clip)
        check_numbers("model", at_least=1, encode_batch_size=encode_batch_size, validation_queries=validation_queries)
        check_numbers("model", at_least=1, budget=budget)
        # Under LightningCLI the hyperparameters are class paths and plain values. A checkpoint rebuilds the parts from
        # them. In Python they would be the parts themselves, which do not belong in a checkpoint.
        if _given_hyperparameters.get() is not None:
            self.save_hyperparameters()
        phase_spans(phases)
        self.backbone = backbone
        self.objectives = nn.ModuleList(phase.objective for phase in phases)
        self.pooler = pooler
        self.model = Model.assemble(backbone, pooler)
        self.phases = phases
        self.selector = selector
        self.controllers: dict[str, Controller] = {}
        for controller in controllers or []:
            name = controller.name or type(controller).__name__
            if name in self.controllers:
                raise ValueError(
                    f"controllers: {name!r} is there twice, and a summary has one row per name; remove one"
                )
            self.controllers[name] = controller
        self.pool = pool
        self.true_rationale = true_rationale
        self.optimizer = optimizer
        self.gradient_clip = gradient_clip
        self.encode_batch_size = encode_batch_size
        self.budget = budget
        self.validation_queries = validation_queries
        self.trained_steps = 0
        self.trained_seconds = 0.0
        self.earlier_rows: dict[str, Any] = {}
        self._contexts: list[SetupContext] = []
        self._vectors: frozenset[str] = frozenset()
        self._started = time.monotonic()
        self._results: list[EvaluationResults] = []
        self._random_state: dict[str, Tensor] | None = None

    # -- composition -------------------------------------------------------------------------------------------------

    @property
    def run_steps(self) -> int:
        """Number of optimiser steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def spans(self) -> list[PhaseSpan]:
        """The first step and the length of each phase within the run."""
        return phase_spans(self.phases, run_steps=self.run_steps)

    def phase_at(self, step: int) -> PhaseSpan:
        """The phase that a step of the run belongs to."""
        return span_at(self.spans, step)

    @property
    def datamodule(self) -> PairDataModule:
        """The trainer's data module."""
        return cast(PairDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]

    def encoder(self, *, progress: bool = False) -> Encoder:
        """Returns an encoder that uses the current weights of the model."""
        return Encoder(
            self.backbone, self.pooler, batch_size=self.encode_batch_size, budget=self.budget, progress=progress
        )

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        self._vectors = vector_names(self)
        check_strategy(self.trainer.strategy)
        if any(phase.objective.needs_rationales for phase in self.phases):
            check_choice(self.selector, self.pool)
        if self.datamodule.sources["test"] and not self.datamodule.sources["validation"]:
            check_calibrated(self.controllers)
        if isinstance(self.trainer.strategy, DDPStrategy):
            # The backward pass that reduces may be of a chunk without pictures, which does not use the vision part.
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        choose = self._open_pool()
        self._contexts = []
        previous = None
        for phase in self.phases:
            tasks = self.datamodule.evaluation_tasks(phase.data) if phase.objective.needs_candidates else ()
            context = SetupContext(model=self.model, tasks=tasks, choose=choose, previous=previous)
            phase.objective.setup(context)
            self._contexts.append(context)
            previous = phase.objective
        self.datamodule.use_phases(
            [
                PhaseBatches(span.first_step, span.phase.data, self._collate(span.phase), self._reads_pool(span.phase))
                for span in phase_spans(self.phases)
            ]
        )

    def _reads_pool(self, phase: Phase) -> bool:
        return phase.objective.needs_rationales and self.selector is not None and self.pool is not None

    def _open_pool(self) -> Choose | None:
        """Makes or opens the rationale pool for the pairs of the phases that read it. None if no phase reads it."""
        if self.pool is None or self.selector is None or not any(map(self._reads_pool, self.phases)):
            return None
        if self.pool.workers:
            # The trainer moves the model only after this hook, but the pool is made on the device of the training.
            self.to(self.trainer.strategy.root_device)
        pool = self.pool.open(
            self.rationale_pairs(self.datamodule),
            model=self.model,
            is_builder=self.trainer.is_global_zero,
            barrier=self.trainer.strategy.barrier,
        )
        return self.pool.choice(pool, self.selector)

    def rationale_pairs(self, datamodule: PairDataModule) -> Sequence[Pair]:
        """The pairs of every phase that trains on rationales. Call the data module's ``setup("fit")`` first."""
        streams = list(dict.fromkeys(phase.data for phase in self.phases if phase.objective.needs_rationales))
        if len(streams) == 1:
            return datamodule.stream_pairs(streams[0])
        return [pair for name in streams for pair in datamodule.stream_pairs(name)]

    def use_choice(self, choose: Choose) -> None:
        """Sets up the phases that train on rationales again, with another choice, because the pool has grown."""
        for number, phase in enumerate(self.phases):
            if phase.objective.needs_rationales:
                self._contexts[number] = replace(self._contexts[number], choose=choose)
                phase.objective.setup(self._contexts[number])

    def _collate(self, phase: Phase) -> Any:
        def collate(pairs: list[Pair], seed: int) -> Any:
            return phase.objective.collate(self.model, pairs, seed)

        return collate

    # -- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        try:
            optimizer = self.optimizer(parameter_groups(self, without_decay=self._vectors))
        except ValueError as error:  # from torch, about a value such as a negative lr
            raise ValueError(f"model.optimizer: {error}") from error
        if self.trainer.estimated_stepping_batches == float("inf"):
            raise ValueError(
                "trainer: the run has no end, and the schedule needs one; set the steps of every phase, or "
                "trainer.max_steps or trainer.max_epochs"
            )
        schedule = scheduler(optimizer, self.spans)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self._started = time.monotonic()
        if self.phases[0].objective.needs_rationales and self.global_step == 0:
            self._score_before({"never": vocabulary.BEFORE_TRAINING})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # As late as possible: loaders and sanity checks draw random numbers that the uninterrupted run did not draw.
        if self._random_state is not None:
            restore_random_state(self._random_state, self.device, rank=self.global_rank)
            self._random_state = None
        span = self.phase_at(self.global_step)
        if span.number and self.global_step == span.first_step:
            # The optimiser's moments from another objective would distort the first steps of this one.
            cast(LightningOptimizer, self.optimizers()).optimizer.state.clear()
            if self.global_step > 0:
                self._score_before({row: vocabulary.before_phase(row, span.name) for row in BOTH_PATHS})

    def _score_before(self, names: Mapping[str, str]) -> None:
        """Scores the current model on the test split for extra rows of the summary, once even if the run is resumed.

        Args:
            names: controller -> name of its row. Controllers that the run does not have are left out.
        """
        controllers = {name: part for name, part in self.controllers.items() if name in names}
        known = any(row in self.earlier_rows for row in names.values())
        tasks = self.datamodule.evaluation_tasks("test")
        if known or not controllers or not tasks or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rank_zero_info(f"Scoring the model for the summary: {', '.join(names.values())}.")
        results = evaluate(self.encoder(progress=True), tasks, controllers=controllers, true_rationale=None)
        self.earlier_rows |= {names[mode]: scores for mode, scores in results.modes.items()}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = cast(torch.optim.Optimizer, self.optimizers())
        optimizer.zero_grad()
        span = self.phase_at(self.global_step)
        logs = span.phase.objective.step(self.model, batch, step_context(self, optimizer, span))
        optimizer.step()
        schedule = self.lr_schedulers()
        schedule.step()  # type: ignore[union-attr]
        logs["learning_rate"] = torch.tensor(optimizer.param_groups[0]["lr"])
        self.log_dict({f"{span.name}/{key}": value for key, value in logs.items()})
        self.log("loss", logs["loss"], prog_bar=True, logger=False)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Not earlier: only here has a gradient scaler (precision 16-mixed) removed its factor.
        if self.gradient_clip:
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            clip_gradient_norm(trained, maximum=self.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[IDENTITY_KEY] = self.backbone.identity
        checkpoint["trained_seconds"] = self.trained_seconds + time.monotonic() - self._started
        checkpoint["earlier_rows"] = self.earlier_rows
        reached = self.phase_at(self.global_step).number
        checkpoint["phases"] = [
            phase.objective.phase_state() if number <= reached else {} for number, phase in enumerate(self.phases)
        ]
        checkpoint["random_state"] = random_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_backbone(checkpoint, identity=self.backbone.identity)
        self.trained_steps = checkpoint["global_step"]
        self.trained_seconds = checkpoint["trained_seconds"]
        self.earlier_rows = checkpoint["earlier_rows"]
        for phase, state in zip(self.phases, checkpoint["phases"], strict=False):
            if state:
                phase.objective.load_phase_state(state)
        self._random_state = checkpoint["random_state"]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the weights as torch does.

        Raises:
            ValueError: the weights belong to other parts.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint does not fit the settings ({' '.join(str(error).split())[:300]}); give the config "
                "that it was trained with (config.yaml in the folder of its run)"
            ) from error

    # -- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, task: EvaluationTask, batch_idx: int) -> None:
        fitting = self.trainer.state.fn == "fit"
        most = self.validation_queries if fitting else None
        short = EvaluationTask(task.name, task.queries[:most], task.candidates, task.candidate_ids)
        # During training only the two paths are scored: other controllers need calibration first.
        controllers = {name: part for name, part in self.controllers.items() if not fitting or name in BOTH_PATHS}
        results = evaluate(self.encoder(progress=True), [short], controllers=controllers, true_rationale=None)
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
            rank_zero_info("Calibrating the controllers on the validation split.")
            calibrate(self.encoder(progress=True), tasks, self.controllers)

    def test_step(self, task: EvaluationTask, batch_idx: int) -> None:
        results = evaluate(
            self.encoder(progress=True), [task], controllers=self.controllers, true_rationale=self.true_rationale
        )
        self._results.append(results)

    def on_test_epoch_end(self) -> None:
        results = merge_results(self._results)
        self._results = []
        if not results.modes or not self.trainer.is_global_zero:
            return
        results.modes |= self.earlier_rows
        step = self.global_step or self.trained_steps  # `mmemb test` takes no training step
        settings = {"step": step, "split": "test", **self._settings()}
        seconds = self.trained_seconds + time.monotonic() - self._started
        summary = report.summary(results, settings=settings, seconds=seconds)
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        report.publish(folder, summary, results, logger=self.logger, step=step)
        for mode, row in results.modes.items():
            self.log(f"test/{mode}/hit@1", row["hit@1"], rank_zero_only=True)

    def _settings(self) -> dict[str, Any]:
        """The settings that make a result comparable: the classes of the parts, the seeds and the budget."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "seed": None if seed is None else int(seed),
            "data_seed": self.datamodule.seed,
            "backbone": self.backbone.identity,
            "pooler": type(self.pooler).__name__,
            "selector": type(self.selector).__name__ if self.selector else None,
            "phases": [
                {"name": span.name, "objective": type(span.phase.objective).__name__, "steps": span.phase.steps}
                for span in phase_spans(self.phases)
            ],
            "batch_size": self.datamodule.batch_size,
            "world_size": self.trainer.world_size,
            "budget": self.budget,
            "calibration": {name: part.calibration for name, part in self.controllers.items() if part.calibration},
        }

    def predict_step(self, items: Sequence[Item], batch_idx: int) -> Tensor:
        """Returns the embeddings [B, D] of a batch of items on the direct path."""
        return self.encoder().encode_targets(items)
