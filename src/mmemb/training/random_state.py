"""What training draws random numbers from (dropout, sampling), on every rank; the data draws from seeds of its own."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mmemb.losses.collectives import gather_rows, world_size


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, a row for each of W ranks; every rank must call it.

    Returns:
        ``cpu`` [W, bytes] uint8 on the CPU, and on a CUDA device ``cuda`` [W, bytes], of each rank's own device.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    # On the device, because NCCL knows no other.
    return {kind: gather_rows(state[None].to(device)).cpu() for kind, state in states.items()}


def restore_random_state(states: dict[str, Tensor], device: torch.device, *, rank: int) -> None:
    """Sets this rank's generators to its row of `random_state`; of a run on another number of ranks nothing is set."""
    if len(states["cpu"]) != world_size():
        rank_zero_info("The checkpoint's random state is of another number of ranks; this run draws from its seed.")
        return
    # Cloned: a generator reads a state from the beginning of its storage, whatever the view's offset.
    torch.set_rng_state(states["cpu"][rank].cpu().clone())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][rank].cpu().clone(), device)
