"""Between a module and its optimiser: which parameters decay."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn

_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")


def vector_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters of fewer than two dimensions: norms' gains, biases, a temperature.

    To be asked before a strategy wraps the module: FSDP makes every shard one-dimensional.
    """
    return frozenset(plain_name(name) for name, parameter in module.named_parameters() if parameter.ndim < 2)


def parameter_groups(module: nn.Module, *, without_decay: Collection[str]) -> list[dict[str, Any]]:
    """The trainable parameters as an optimiser's groups: first what decays, then what does not.

    Args:
        module: may be wrapped by a strategy meanwhile.
        without_decay: names whose group gets weight decay 0, whatever the optimiser's is (`vector_names`).

    Returns:
        the groups that have parameters, so none if nothing trains.
    """
    decaying, spared = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if plain_name(name) in without_decay else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP, activation checkpointing and torch.compile put into it."""
    return _WRAPPERS.sub("", name)
