"""Saves and restores the random state of training (dropout, sampling) on every rank. The data has its own seeds."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mmemb.losses.collectives import gather_rows, world_size


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of torch's generators, one row for each of W ranks. Every rank must call it.

    Returns:
        ``cpu`` [W, bytes] uint8, on the CPU. On a CUDA device also ``cuda`` [W, bytes], of each rank's device.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    # Gathered on the device, because NCCL supports no other.
    return {kind: gather_rows(state[None].to(device)).cpu() for kind, state in states.items()}


def restore_random_state(states: dict[str, Tensor], device: torch.device, *, rank: int) -> None:
    """Sets this rank's generators to its row of `random_state`.

    Does nothing if the state comes from a run with another number of ranks.
    """
    if len(states["cpu"]) != world_size():
        rank_zero_info("The checkpoint was written by another number of ranks, so its random state is not used.")
        return
    # Cloned, because a generator reads a state from the start of its storage and ignores the offset of a view.
    torch.set_rng_state(states["cpu"][rank].cpu().clone())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][rank].cpu().clone(), device)
