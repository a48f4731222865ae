"""What `test_other_device` runs in a process of its own, in the folder given: a device once installed stays."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mmemb.commands.rationales
from mmemb.__main__ import main
from mmemb.search.exact import read_embeddings
from tests import other_device
from tests.integration.small import write_rows, write_settings
from tests.unit.kernels.cases import OPTIONS, arguments, grads, loss, unit_rows

POOL = {
    "path": "pool",
    "workers": [{"class_path": "model", "init_args": {"max_new_tokens": 8}}],
    "candidates": 1,
    "evaluator": "retrieval",
}
EMBED = ("embed", "--input", "pictures", "--output", "found.parquet", "--side", "query", "--reason", "always")


def commands(folder: Path, device: str) -> dict[str, int]:
    """The exit codes of every command that computes, on one device, in a folder of its own."""
    folder.mkdir()
    os.chdir(folder)
    write_rows(folder)
    strategy = "auto" if device == "cpu" else device
    words = write_settings(folder, {"model": {"pool": POOL}, "trainer": {"accelerator": device, "strategy": strategy}})
    run = ("--checkpoint", "runs/r1+small/version_0", "--device", device)
    mmemb.commands.rationales._device = lambda _: device
    return {
        "generate": main(["rationales", "generate", *words]),
        "score": main(["rationales", "score", *words]),
        "fit": main(["fit", *words, "--model.selector", "counterfactual"]),
        "embed": main([*EMBED, "--budget", "6", *run]),
        "search": main(["search", "--index", "found.parquet", "--query", "red", *run]),
    }


def difference(left: Any, right: Any) -> float:
    """The largest of tensors in equal containers that hold some, over their largest value; inf if any is not finite."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        return max(difference(left[key], right[key]) for key in left)
    left, right = torch.as_tensor(left), torch.as_tensor(right).cpu()
    found = float((left - right).abs().max() / left.abs().max().clamp_min(1e-12))
    return found if math.isfinite(found) else math.inf


def refused() -> list[str]:
    """What a GPU would refuse."""
    rows = torch.ones(3, device=other_device.NAME)
    attempts: dict[str, Callable[[], Any]] = {
        "sum": lambda: rows + torch.ones(3),
        "index": lambda: rows[torch.tensor([0])],
        "index value": lambda: rows.index_put_((torch.tensor([0, 1]),), torch.ones(2)),
        "number": lambda: rows * torch.tensor(2.0),
        "numpy": rows.numpy,
    }
    names = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, TypeError):
            names.append(name)
    return names


def losses() -> float:
    """The largest difference of the loss and its gradients, as operator and in one call, every option alone and all."""
    shape, largest = (7, 11, 8), 0.0
    for options in [set(), set(OPTIONS), *({option} for option in OPTIONS)]:
        rows = {"query": unit_rows(7, 8, torch.float32), "candidate": unit_rows(11, 8, torch.float32)}
        rows |= {"temperature": torch.tensor(0.1)}
        how = arguments(options, shape)
        found = []
        for device in ("cpu", other_device.NAME):
            there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in how.items()}
            leaves = {name: value.detach().to(device).requires_grad_() for name, value in rows.items()}
            loss(**leaves, **there).backward()
            parts = grads(**leaves, **there)._asdict()
            assert all(part.device.type == device for part in parts.values())
            parts |= {name: leaf.grad for name, leaf in leaves.items()}
            found.append({name: part.cpu() for name, part in parts.items()})
        largest = max(largest, difference(*found))
    return largest


def compare(folder: Path) -> dict[str, Any]:
    """What both devices gave."""
    found: dict[str, Any] = {"refused": refused(), "codes": {"cpu": commands(folder / "cpu", "cpu")}}
    before = other_device.operations[0]
    found["codes"][other_device.NAME] = commands(folder / other_device.NAME, other_device.NAME)
    found["operations"] = other_device.operations[0] - before
    checkpoints, embeddings = [], []
    for name in found["codes"]:
        checkpoint = folder / name / "runs" / "r1+small" / "version_0" / "checkpoints" / "last.ckpt"
        checkpoints.append(torch.load(checkpoint, weights_only=True))
        embeddings.append(read_embeddings(folder / name / "found.parquet"))
    found["weights"] = difference(*(each["state_dict"] for each in checkpoints))
    moments = [each["optimizer_states"][0]["state"] for each in checkpoints]
    found["learned"] = all(state["exp_avg"].any() for state in moments[0].values())
    found["gradients"] = difference(*({name: state["exp_avg"] for name, state in each.items()} for each in moments))
    found["embeddings"] = difference(*(each.embeddings for each in embeddings))
    found["rationales"] = {name: each.rationales for name, each in zip(found["codes"], embeddings, strict=True)}
    found["losses"] = losses()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    other_device.install()
    print(json.dumps(compare(Path(sys.argv[1]))))
