"""What a training would find missing only at its end, or never: refused before its first step."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.strategies import FSDPStrategy, Strategy

from mmemb.interfaces import Controller, Selector
from mmemb.rationales.settings import PoolSettings


def check_strategy(strategy: Strategy) -> None:
    """Refuses strategies that a gradient cache cannot run in.

    Raises:
        ValueError: the strategy is FSDP's first version.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy is fsdp, which makes the whole training step one forward pass; the gradient cache runs "
            "backward passes inside it, which FSDP does not allow. Use ddp; for a model that is too large, lora, "
            "quantization or gradient_checkpointing of the backbone"
        )


def check_choice(selector: Selector | None, pool: PoolSettings | None) -> None:
    """Refuses a selector that has nothing to choose from.

    Raises:
        ValueError: there is a selector and no pool.
    """
    if selector is not None and pool is None:
        raise ValueError(
            f"model.selector is {selector.name or type(selector).__name__}, but model.pool is null and there is "
            "nothing to choose from; name a pool, or set model.selector to null to train the direct path alone"
        )


def check_calibrated(controllers: Mapping[str, Controller]) -> None:
    """For evaluation without validation queries: refuses a controller that must be fitted on them.

    Raises:
        ValueError: there is one.
    """
    for name, controller in controllers.items():
        if controller.needs_calibration:
            raise ValueError(
                f"model.controllers: {name} is fitted on validation queries, and there is no data.validation; "
                "give it a source, or leave the controller out"
            )
