"""Decides which parameters get weight decay, and clips the gradient norm."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")


def vector_names(module: nn.Module) -> frozenset[str]:
    """Names the parameters with fewer than two dimensions, such as gains of norms, biases and a temperature.

    Call it before a strategy wraps the module, because FSDP makes every shard one-dimensional.
    """
    return frozenset(plain_name(name) for name, parameter in module.named_parameters() if parameter.ndim < 2)


def parameter_groups(module: nn.Module, *, without_decay: Collection[str]) -> list[dict[str, Any]]:
    """Splits the trainable parameters into optimiser groups: first those with weight decay, then those without.

    Args:
        module: the module. A strategy may have wrapped it.
        without_decay: names from `vector_names`. Their group gets weight decay 0, whatever the optimiser's setting.

    Returns:
        The groups that have parameters. The list is empty if no parameter is trained.
    """
    decaying: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if plain_name(name) in without_decay else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def clip_gradient_norm(parameters: Iterable[Tensor], *, maximum: float) -> Tensor:
    """Scales all gradients by one factor so that their common norm is at most ``maximum``.

    Sharded gradients (FSDP2) count as a whole. Every rank must call it if any parameter is sharded.

    Args:
        parameters: the parameters. Those without a gradient do not count. Gradients that are not sharded must be equal
            on all ranks.
        maximum: maximum of the 2-norm, above 0.

    Returns:
        The norm before clipping, 0-d, equal on all ranks.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    # One foreach operation cannot mix sharded and whole gradients.
    kinds = [
        [each for each in trained if isinstance(each.grad, DTensor)],
        [each for each in trained if not isinstance(each.grad, DTensor)],
    ]
    norms = [nn.utils.get_total_norm([each.grad for each in kind if each.grad is not None]) for kind in kinds if kind]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack(whole).norm() if whole else torch.zeros(())
    for kind in kinds:
        if kind:
            nn.utils.clip_grads_with_norm_(kind, maximum, total)
    return total


def plain_name(name: str) -> str:
    """Removes what FSDP, activation checkpointing and torch.compile add to the name of a parameter."""
    return _WRAPPERS.sub("", name)
