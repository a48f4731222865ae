"""A small training run with real parts: the tiny model with random weights and two tasks of the bundled data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.controllers.always_reason import AlwaysReason
from mmemb.components.controllers.never import Never
from mmemb.components.poolers.embed_token import EmbedToken
from mmemb.components.workers.metadata import MetadataWorker
from mmemb.data.augment import PictureAugment
from mmemb.data.datamodule import PairDataModule, Source
from mmemb.interfaces import SetupContext
from mmemb.losses.infonce import InfoNCE
from mmemb.training.joint.objective import Joint
from mmemb.training.module import EmbeddingModule
from mmemb.training.phases import Phase
from mmemb.types import Pair, Rationale


def metadata_choice(pair: Pair, seed: int) -> list[tuple[Rationale, float]]:
    """Chooses the pair's own rationale for two pairs in three. The others train the direct path only."""
    if sum(pair.id.encode()) % 3 == 0:
        return []
    return [(MetadataWorker().propose([pair.query], 1, seed=seed)[0][0], 1.0)]


def small_module(*, chunk_size: int = 4, lr: float = 0.05, **settings: Any) -> EmbeddingModule:
    """Makes a module with SGD, so that a difference of weights is a difference of gradients.

    Args:
        chunk_size: chunk size of the joint phase.
        lr: learning rate.
        **settings: ``steps`` of the joint phase, the phases ``following`` it, and arguments of the module.
    """
    torch.manual_seed(0)
    objective = Joint(chunk_size=chunk_size, infonce=InfoNCE(temperature=0.2), augment=PictureAugment())
    objective.setup(SetupContext(choose=metadata_choice))
    steps, following = settings.pop("steps", None), settings.pop("following", [])
    options: dict[str, Any] = {
        "backbone": TinyBackbone(weights="random"),
        "phases": [Phase(objective, steps=steps, schedule="constant", warmup_steps=0), *following],
        "pooler": EmbedToken(),
        "controllers": [Never(), AlwaysReason()],
        "optimizer": partial(torch.optim.SGD, lr=lr, momentum=0.9),
    }
    return EmbeddingModule(**{**options, **settings})


def small_data(*, batch_size: int = 16, sub_batch_size: int = 8, **settings: Any) -> PairDataModule:
    """Data of the tasks name and flagattr, by default with 16 rows per global batch."""
    sources = [Source(path="bundled:train", tasks=["name", "flagattr"])]
    return PairDataModule(train=sources, batch_size=batch_size, sub_batch_size=sub_batch_size, **settings)


def small_trainer(folder: Path, **settings: Any) -> L.Trainer:
    """A trainer without bars and logger, by default with one CPU process."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
    }
    return L.Trainer(default_root_dir=folder, **{**options, **settings})


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of weights."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left if left[name].numel())
