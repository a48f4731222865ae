"""Ships the weights of a finished pretraining run as those of the ``tiny`` backbone, and writes their model card.

    mmemb fit --config recipes/pretrain_tiny.yaml
    python -m tools.release_tiny runs/pretrain_tiny/version_0
    mmemb fit --config recipes/pretrain_tiny.yaml --config recipes/pretrain_tiny_find.yaml
    python -m tools.release_tiny runs/pretrain_tiny+pretrain_tiny_find/version_0
    python -m tools.release_tiny                # writes only the card of the shipped weights

A run from random weights is the first stage. A run from the shipped weights adds a stage. ``training.json`` next to the
weights lists the stages in order, with the digest of the resulting weights. If a run is released again, its stage is
not added twice. Every number of the card is measured here on held-out probes, with the weights in half precision as
shipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mmemb.common.digests import bytes_digest
from mmemb.common.files import write_text
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.data.bundled import is_right, probe_samples
from mmemb.data.bundled.pretraining import WEIGHTS
from mmemb.inference.adaptive import sample
from mmemb.types import Pair
from tools.build_tiny import FOLDER, pack

WHAT = {
    "picture": "name of a picture whose (thing, vendor) pair was withheld",
    "fact": "fact about a country, asked in a phrasing that was withheld",
    "scene": "caption of a scene whose composition was withheld: all four names right",
    "text_scene": "such a caption in text: repeated, with the right left and right neighbour of every thing",
    "find": "such a scene and one of its right-hand things: the caption up to it",
}


def accuracy(backbone: TinyBackbone, probes: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Share of greedy answers that are right, by probe task."""
    answers = sample(
        backbone, [pair.query for pair in probes], max_new_tokens=64, temperature=0.0, seed=0, batch_size=64
    )
    right: dict[str, list[bool]] = {}
    for pair, answer in zip(probes, answers, strict=True):
        right.setdefault(pair.task, []).append(is_right(pair.task, pair.positive.text, answer.text))
    return {task: {"exact": sum(hits) / len(hits), "n": len(hits)} for task, hits in right.items()}


STAGES = FOLDER / "training.json"
RECIPES = ("recipes/pretrain_tiny.yaml", "recipes/pretrain_tiny_find.yaml")
"""Recipes of the stages, in order."""


def weights_digest(path: Path = FOLDER / "model.safetensors") -> str:
    """SHA-256 of a file of weights, in hexadecimal."""
    return bytes_digest(path.read_bytes())


def shipped_stages() -> list[dict[str, Any]]:
    """The stages that led to the shipped weights.

    Raises:
        ValueError: ``training.json`` belongs to other weights.
    """
    kept = json.loads(STAGES.read_text(encoding="utf-8"))
    if kept["weights"] != weights_digest():
        raise ValueError(
            f"{STAGES} belongs to other weights than model.safetensors in the same folder; release their run first"
        )
    stages: list[dict[str, Any]] = kept["stages"]
    return stages


def stages_of(config: dict[str, Any], *, steps: int) -> list[dict[str, Any]]:
    """The stages that lead to a run's weights, with the run's own stage last.

    A run from random weights has only its own stage. A run from the shipped weights also has theirs.

    Args:
        config: the run's settings, as in ``config.yaml`` of its folder.
        steps: number of steps of the run.

    Raises:
        ValueError: the run continued from the shipped weights, and ``training.json`` belongs to other weights.
    """
    before = config["model"]["backbone"]["init_args"]["weights"] == "pretrained"
    stage = {
        "tasks": config["data"]["train"][0].get("tasks") or list(WEIGHTS),
        "steps": steps,
        "batch_size": config["data"]["batch_size"],
        "seed": config["seed_everything"],
    }
    return [*(shipped_stages() if before else []), stage]


def _counted(tasks: Sequence[str]) -> str:
    """The tasks as text. A task that is listed several times is drawn more often, so its number is shown."""
    return ", ".join(f"{task} ({times}x)" if times > 1 else task for task, times in Counter(tasks).items())


def card(stages: Sequence[dict[str, Any]], scores: dict[str, dict[str, dict[str, float]]], *, parameters: int) -> str:
    """The model card as Markdown."""
    trained = "; then ".join(
        f"{stage['steps']} steps of {stage['batch_size']} rows of {_counted(stage['tasks'])} (seed {stage['seed']})"
        for stage in stages
    )
    recipes = " and then ".join(f"`{recipe}`" for recipe in RECIPES[: len(stages)])
    lines = [
        "# Model card: `tiny`",
        "",
        f"A Qwen3-VL configuration of {parameters:,} parameters, trained from random weights by {recipes} on the "
        f"bundled data (see NOTICE for its sources), next-token loss: {trained}. "
        "It is shipped in half precision. It learned, in lower-case English and as well as the table shows, to name "
        "pictures, to recall facts about countries, to caption scenes of the bundled kind, completely or up to a given "
        "thing, and to find left and right neighbours in a caption. It learned nothing else. It never saw a withheld "
        "picture, scene or phrasing, nor a flag together with its country's attributes. It was never asked for the "
        "neighbours of a thing in a picture, but a caption that ends at a thing names its left neighbour just before.",
        "",
        "Share of greedy answers that are right to the word, with the shipped weights, the prompts of pretraining and "
        "held-out inputs (`python -m tools.release_tiny`):",
        "",
        "| probe | " + " | ".join(f"{split} (n)" for split in scores) + " |",
        "| --- |" + " --- |" * len(scores),
    ]
    for task, what in WHAT.items():
        cells = [f"{scores[split][task]['exact']:.3f} ({scores[split][task]['n']})" for split in scores]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines += ["", "Licence: Apache-2.0, like the project. The training pictures have their own licences.", ""]
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run of either stage (default: none)")
    arguments = parser.parse_args()
    stages = shipped_stages() if arguments.run is None else release(arguments.run)
    model = TinyBackbone().eval()
    scores = {split: accuracy(model, probe_samples(split)) for split in ("validation", "test")}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_text(FOLDER / "MODEL_CARD.md", card(stages, scores, parameters=parameters))
    print(json.dumps({"stages": stages, **scores}, indent=2))


def release(run: Path) -> list[dict[str, Any]]:
    """Ships the weights of the run in a folder; returns the stages that led to them.

    Raises:
        ValueError: as in `stages_of`.
    """
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    trained = TinyBackbone(weights="random")
    prefix = "backbone."
    trained.load_state_dict(
        {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    )
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    stages = stages_of(config, steps=checkpoint["global_step"])
    before = weights_digest() if (FOLDER / "model.safetensors").is_file() else None  # None for the first stage
    with tempfile.TemporaryDirectory() as folder:
        trained.save(Path(folder) / "tiny")
        pack(Path(folder) / "tiny", FOLDER)
    if weights_digest() == before:  # this run was released before
        return shipped_stages()
    write_text(STAGES, json.dumps({"weights": weights_digest(), "stages": stages}, indent=1) + "\n")
    return stages


if __name__ == "__main__":
    main()
