"""Between a module and its optimiser: which parameters decay, and how long the gradient may be."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
    decaying: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if plain_name(name) in without_decay else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def clip_gradient_norm(parameters: Iterable[Tensor], *, maximum: float) -> Tensor:
    """Scales all gradients alike so that their common norm is at most this; sharded ones (FSDP2) count as a whole.

    Every rank must call it if any parameter is sharded.

    Args:
        parameters: those without a gradient do not count. Gradients that are not sharded must be equal on all ranks.
        maximum: of the 2-norm, above 0.

    Returns:
        the norm before clipping, 0-d, equal on all ranks.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    # Sharded and whole gradients do not mix in one foreach operation.
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
    """A parameter's name without what FSDP, activation checkpointing and torch.compile put into it."""
    return _WRAPPERS.sub("", name)
