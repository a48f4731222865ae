"""Refreshes the rationale pool during fit: the model in training proposes rationales for the pairs it will see next.

Without a refresh, a pool is made once by a model that then changes in training. The MMEmb-R1 paper (arXiv 2604.06156)
names this offline pipeline as its main limit. With refreshes, training is a loop in the style of
expectation-maximisation (our choice). The current model proposes rationales, they are scored against the counterfactual
arms, and the model trains on those that survive.

A run's own candidates are in its folder, as one small pool per refresh and rank. They never change the pool that the
run was given. A refresh affects the batches after it and none before it. Batches that data-loader workers had prepared
ahead are dropped: the loader restarts. So a run that was stopped and resumed trains on the same candidates as an
uninterrupted one.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from mmemb.common.checks import check_numbers
from mmemb.common.digests import seed_of
from mmemb.data.datamodule import PairDataModule
from mmemb.interfaces import Evaluator, Selector, Worker
from mmemb.losses.collectives import all_sum
from mmemb.rationales.gains import gains
from mmemb.rationales.generate import generate
from mmemb.rationales.pool import RationalePool
from mmemb.rationales.score import evaluator_name, score
from mmemb.training.module import EmbeddingModule
from mmemb.types import Candidates, Pair

FOLDER = "refreshed"
"""Folder of a run's own candidates, inside the run's folder."""

_STEP = re.compile(r"step-(\d+)")


class GrownPool:
    """A pool together with the candidates that a run has added.

    A pair's candidates are those of the base pool, followed by those of the newest refresh that has the pair. Texts
    that the base pool already has are left out. The scores of a refresh are shifted so that each candidate keeps its
    gain over its own arm without a rationale. This is needed because the model in training scores differently from the
    evaluator that scored the pool. A pool without scores stays without scores.

    Args:
        base: the pool before the run.
        refreshed: one pool per refresh, oldest first.
    """

    def __init__(self, base: RationalePool, refreshed: Sequence[RationalePool]) -> None:
        self.base = base
        self.refreshed = list(refreshed)

    def candidates(self, pair_id: str) -> Candidates:
        """Returns a pair's candidates, as `RationalePool.candidates` does."""
        there = self.base.candidates(pair_id)
        newest = next((pool for pool in reversed(self.refreshed) if pair_id in pool), None)
        return there if newest is None else _joined(there, newest.candidates(pair_id))

    def added(self, pair_id: str) -> int:
        """Counts the candidates of a pair that the run has added."""
        return len(self.candidates(pair_id).rationales) - len(self.base.candidates(pair_id).rationales)


def _joined(there: Candidates, own: Candidates) -> Candidates:
    known = {rationale.text for rationale in there.rationales}
    new = [row for row, rationale in enumerate(own.rationales) if rationale.text not in known]
    shift = there.score_none - own.score_none  # nan if the pool has no scores
    scores = [own.scores[row] + shift for row in new]
    placebos: tuple[float, ...] = ()
    if there.scores_placebo or not there.rationales:
        placebos = there.scores_placebo + tuple(own.scores_placebo[row] + shift for row in new if own.scores_placebo)
    return replace(
        there,
        rationales=there.rationales + tuple(own.rationales[row] for row in new),
        scores=there.scores + tuple(scores),
        scores_placebo=placebos,
    )


class RefreshPool(L.Callback):
    """Every few steps, adds candidates that the model in training proposes for the coming pairs to the pool.

    The coming pairs are those of the steps until the next refresh. The first `most_pairs` of them get new candidates.
    The rest keep the candidates that they have.

    Each refresh logs shares over *all* coming pairs of all ranks: ``refresh/covered`` (share of pairs that get new
    candidates), ``refresh/self_made`` (the run's own share of their candidates) and ``refresh/self_made_chosen`` (the
    run's own share of the candidates that the selector chooses). For the new candidates it logs ``refresh/mean_gain``
    (nats) and ``refresh/keep_rate`` (share with a positive gain). It also logs ``refresh/seconds``.

    Args:
        refresh_every_n_steps: steps from one refresh to the next.
        worker: proposes the candidates. The worker ``model`` uses the model in training.
        evaluator: scores the candidates. ``retrieval`` without its own embedder uses the model in training.
        candidates: K, candidates per pair.
        most_pairs: maximum number of pairs per refresh and rank, soonest first. It bounds the cost of a refresh. null
            takes all coming pairs.
        keep: number of newest refreshes that are read. A much older model proposed the earlier ones.
        seed: seed of every sampled candidate.

    Raises:
        ValueError: a number is below one.
    """

    def __init__(
        self,
        refresh_every_n_steps: int,
        *,
        worker: Worker,
        evaluator: Evaluator,
        candidates: int = 1,
        most_pairs: int | None = 512,
        keep: int = 8,
        seed: int = 0,
    ) -> None:
        check_numbers(
            "refresh",
            at_least=1,
            refresh_every_n_steps=refresh_every_n_steps,
            candidates=candidates,
            most_pairs=most_pairs,
            keep=keep,
        )
        self.refresh_every_n_steps = refresh_every_n_steps
        self.worker = worker
        self.evaluator = evaluator
        self.candidates = candidates
        self.most_pairs = most_pairs
        self.keep = keep
        self.seed = seed
        self.steps: list[int] = []
        self.folder: Path | None = None
        self._earlier: Path | None = None

    # -- start and resume of a run -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The steps of the refreshes so far, and the folder of their candidates."""
        return {"steps": list(self.steps), "folder": None if self.folder is None else str(self.folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the refreshes of a `state_dict`."""
        self.steps = list(state_dict["steps"])
        self._earlier = None if state_dict["folder"] is None else Path(state_dict["folder"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the candidates of the run that is resumed, and lets the selector choose among them.

        Raises:
            FileNotFoundError: the candidates of the run that is resumed are gone.
            ValueError: the run has no pool or no selector.
        """
        module = cast(EmbeddingModule, pl_module)
        if module.pool is None or module.selector is None:
            raise ValueError("refresh: there is nothing to refresh; give model.pool and model.selector")
        self.folder = (Path(trainer.log_dir or trainer.default_root_dir) / FOLDER).resolve()
        if trainer.is_global_zero:
            self._take_up(self.folder, trainer.ckpt_path)
        trainer.strategy.barrier()
        self._use(module)

    def _take_up(self, folder: Path, checkpoint: str | Path | None) -> None:
        """Copies the refreshes that the checkpoint lists into this run's folder, and removes any others there."""
        source = self._source(folder, checkpoint)
        for step in self.steps:
            if not (source / _name(step)).is_dir():
                raise FileNotFoundError(
                    2, "the checkpoint was trained on candidates that are gone; restore them or start a new run",
                    str(source / _name(step)),
                )  # fmt: skip
        for path in folder.glob("step-*"):
            found = _STEP.fullmatch(path.name)
            if found and (source != folder or int(found[1]) not in self.steps):
                shutil.rmtree(path)
        if source != folder:
            for step in self.steps:
                shutil.copytree(source / _name(step), folder / _name(step))

    def _source(self, folder: Path, checkpoint: str | Path | None) -> Path:
        """Finds the earlier run's candidates: where it wrote them or, if the run was moved, next to its checkpoint."""
        places = [self._earlier or folder]
        if checkpoint is not None:
            places += [parent / FOLDER for parent in Path(checkpoint).resolve().parents[:2]]  # run/checkpoints/x.ckpt
        places.append(folder)
        whole = (place for place in places if all((place / _name(step)).is_dir() for step in self.steps))
        return next(whole, places[0])

    def _use(self, module: EmbeddingModule) -> GrownPool:
        """Makes the selector choose among the pool's candidates and the run's own, from the next batch on."""
        assert self.folder is not None
        assert module.pool is not None
        assert module.selector is not None
        name = evaluator_name(self.evaluator)
        read = [path for step in self.steps[-self.keep :] for path in sorted((self.folder / _name(step)).iterdir())]
        grown = GrownPool(module.pool.reopen(), [RationalePool.open(path, evaluator=name) for path in read])
        module.use_choice(module.pool.choice(grown, module.selector))
        return grown

    # -- refreshing --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the refresh that was due at the step where the resumed run had ended."""
        if trainer.global_step > 0:
            self._refresh_if_due(trainer, cast(EmbeddingModule, pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes if it is due and training continues."""
        if not 0 <= trainer.max_steps <= trainer.global_step:
            self._refresh_if_due(trainer, cast(EmbeddingModule, pl_module))

    def _refresh_if_due(self, trainer: L.Trainer, module: EmbeddingModule) -> None:
        step = trainer.global_step
        if step % self.refresh_every_n_steps or step in self.steps:
            return
        data: PairDataModule = module.datamodule
        coming = data.coming_pairs(self.refresh_every_n_steps)
        if not coming:  # the phase that reads the pool is over
            return
        pairs = coming[: self.most_pairs]
        assert self.folder is not None
        assert module.pool is not None
        started = time.monotonic()
        path = self.folder / _name(step) / f"rank-{trainer.global_rank}"
        if path.exists():  # left by a run that was killed before it could write a checkpoint
            shutil.rmtree(path)
        try:
            generate(
                pairs,
                [self.worker],
                self.candidates,
                pool=path,
                seed=seed_of(self.seed, step),
                model=module.model,
                leaks=module.pool.leaks,
                progress=False,
            )
            added = score(pairs, self.evaluator, path, model=module.model, progress=False)
        finally:  # training needs the memory of their own models
            self.worker.release()
            self.evaluator.release()
        trainer.strategy.barrier()
        self.steps.append(step)
        grown = self._use(module)
        data.restart()
        self._report(trainer, module, coming, added, grown, seconds=time.monotonic() - started)

    def _report(
        self,
        trainer: L.Trainer,
        module: EmbeddingModule,
        coming: Sequence[Pair],
        added: RationalePool,
        grown: GrownPool,
        *,
        seconds: float,
    ) -> None:
        """Logs what all ranks have added. Each rank knows its own pairs only, and only rank zero's loggers write."""
        assert module.selector is not None
        gained = [gain for pair_id in added for gain in gains(added.candidates(pair_id))]
        own = counts_of(grown, module.selector, coming, seed=seed_of(self.seed, trainer.global_step))
        new = (len(coming), len(added), len(gained), sum(gain > 0 for gain in gained), math.fsum(gained))
        # One collective, on the device that the strategy's backend supports: NCCL does not support the CPU.
        device = trainer.strategy.root_device if trainer.world_size > 1 else "cpu"  # some devices have no float64
        *summed, total_gain = all_sum(torch.tensor([*own, *new], dtype=torch.float64, device=device)).tolist()
        every, made, chosen, made_chosen, pairs, covered, candidates, helping = map(round, summed)
        values = {
            "covered": _share(covered, pairs),
            "self_made": _share(made, every),
            "self_made_chosen": _share(made_chosen, chosen),
            "mean_gain": _share(total_gain, candidates),
            "keep_rate": _share(helping, candidates),
            "seconds": seconds,
        }
        for logger in trainer.loggers:
            finite = {f"refresh/{name}": value for name, value in values.items() if math.isfinite(value)}
            logger.log_metrics(finite, step=trainer.global_step)
        worth = f", mean gain {values['mean_gain']:+.3f}, {values['keep_rate']:.0%} help" if candidates else ""
        of_all = f"{values['self_made']:.0%} of all candidates" if every else "no candidates"
        of_chosen = f", {values['self_made_chosen']:.0%} of those chosen" if chosen else ", none chosen"
        rank_zero_info(
            f"Step {trainer.global_step}: {candidates} new candidates for {covered} of {pairs} coming pairs"
            f"{worth}. The run's own are {of_all}{of_chosen}. It took {seconds:.1f} s."
        )


class Counts(NamedTuple):
    """Candidates of some pairs and the run's own among them (``made``), in all and among those chosen."""

    every: int
    made: int
    chosen: int
    made_chosen: int


def counts_of(grown: GrownPool, selector: Selector, pairs: Sequence[Pair], *, seed: int) -> Counts:
    """Counts the candidates that the pairs train on, and those among them that the run has made."""
    every = made = chosen = made_chosen = 0
    for pair in pairs:
        there, both = len(grown.base.candidates(pair.id).rationales), grown.candidates(pair.id)
        every += len(both.rationales)
        made += len(both.rationales) - there
        for selection in selector.select_many(both, seed=seed_of(seed, pair.id)):
            if selection.index is not None:
                chosen += 1
                made_chosen += selection.index >= there  # the pool's own candidates come first
    return Counts(every, made, chosen, made_chosen)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
