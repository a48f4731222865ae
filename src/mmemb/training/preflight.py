"""Checks the settings before the first step for mistakes that training would notice at its end, or never."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.strategies import FSDPStrategy, Strategy

from mmemb.interfaces import Controller, Selector
from mmemb.rationales.settings import PoolSettings


def check_strategy(strategy: Strategy) -> None:
    """Refuses strategies that the gradient cache does not support.

    Raises:
        ValueError: the strategy is the first version of FSDP.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            "trainer.strategy is fsdp, which makes the whole training step one forward pass. The gradient cache runs "
            "backward passes inside it, and FSDP does not allow that. Use ddp. If the model is too large, set lora, "
            "quantization or gradient_checkpointing of the backbone"
        )


def check_choice(selector: Selector | None, pool: PoolSettings | None) -> None:
    """Refuses a selector that has nothing to choose from.

    Raises:
        ValueError: there is a selector but no pool.
    """
    if selector is not None and pool is None:
        raise ValueError(
            f"model.selector is {selector.name or type(selector).__name__}, but model.pool is null, so there is "
            "nothing to choose from; name a pool, or set model.selector to null to train the direct path only"
        )


def check_calibrated(controllers: Mapping[str, Controller]) -> None:
    """Refuses a controller that must be fitted on validation queries. Call it if there are none.

    Raises:
        ValueError: a controller needs calibration.
    """
    for name, controller in controllers.items():
        if controller.needs_calibration:
            raise ValueError(
                f"model.controllers: {name} is fitted on validation queries, but there is no data.validation; "
                "give it a source, or leave the controller out"
            )
