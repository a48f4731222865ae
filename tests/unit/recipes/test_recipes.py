"""Every recipe names the command that runs it and can be parsed. The 4B overlay trains on a shrunken model."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mmemb.registry import KINDS, available
from tests.unit.components.conftest import model_folder  # noqa: F401  (a fixture)

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHORT = {name for kind in KINDS for name in available(kind)} | {"AdamW", "bitsandbytes.optim.AdamW8bit"}
"""Keys that name a part: its arguments are below."""
SCALE = ROOT / "recipes" / "scale" / "qwen3vl_4b.yaml"


def command(recipe: Path) -> list[str]:
    """The words of the command in a recipe's first line."""
    first = recipe.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first.startswith("# mmemb "), f"{recipe.name} opens with {first!r}; open it with the command that runs it"
    return shlex.split(first.removeprefix("# "))[1:]


def test_the_main_recipes_exist() -> None:
    names = {recipe.relative_to(ROOT / "recipes").as_posix() for recipe in RECIPES}
    assert names >= {"r1.yaml", "pretrain_tiny.yaml", "scale/qwen3vl_4b.yaml"}
    assert any(name.startswith("baselines/") for name in names)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_command_in_the_first_line_parses_the_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmemb.commands.parsing.configs import config_paths
    from mmemb.commands.parsing.lightning_cli import check_config

    monkeypatch.chdir(ROOT)
    words = command(recipe)
    assert words[0] == "fit"
    assert config_paths(words)[-1].resolve() == recipe  # an overlay comes last, after the recipe that it changes
    parsed = leaves(check_config(words).as_dict())
    said = leaves(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    # What is added to a list (`callbacks+`) has another place there; tests/unit/training/test_refresh.py reads it.
    numbers = {key: value for key, value in said.items() if isinstance(value, int | float) and "+" not in key}
    assert numbers == {key: value for key, value in parsed.items() if key in numbers}


def test_the_main_job_caches_gradients_over_at_least_four_chunks() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "r1.yaml").read_text(encoding="utf-8"))
    settings, batch = recipe["model"]["phases"][0]["objective"]["joint"], recipe["data"]["batch_size"]
    assert batch >= 4 * settings["chunk_size"]
    assert settings["kept_graphs"] * settings["chunk_size"] < batch


def test_the_baselines_train_as_long_as_the_joint_phase_of_the_main_job() -> None:
    read = lambda name: yaml.safe_load((ROOT / "recipes" / name).read_text(encoding="utf-8"))  # noqa: E731
    joint = read("r1.yaml")["model"]["phases"][0]["steps"]
    overlays = {name: read(f"baselines/{name}.yaml") for name in ("never", "always_reason", "threshold", "direct_only")}
    assert {name: made["trainer"]["max_steps"] for name, made in overlays.items()} == dict.fromkeys(overlays, joint)


def leaves(content: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flattens settings to dotted keys. A part gives the same whether it is written by short name or class path."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        place = above if key == "init_args" or key in SHORT else f"{above}{key}."
        entries = (
            {str(number): entry for number, entry in enumerate(value)} if isinstance(value, list | tuple) else value
        )
        found |= leaves(entries, place) if isinstance(entries, dict) else {place.rstrip("."): value}
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_comments_open_the_recipe_and_do_not_repeat_the_documentation(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").split("\n")
    assert lines[1].startswith("# "), "the second line must be a comment that says what the recipe is for"
    assert not [line for line in lines[2:] if "#" in line]


@pytest.fixture
def mmeb_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``mmeb_train/ChartQA.parquet``: eight MMEB-train rows, half of them with a hard negative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mmeb_train" / "images").mkdir(parents=True)
    rows = []
    for number in range(8):
        path = f"images/{number}.png"
        Image.new("RGB", (64, 48), (30 * number, 90, 200 - 20 * number)).save(tmp_path / "mmeb_train" / path)
        rows.append(
            {
                "qry": "<|image_1|>\nRepresent the given image with the following question: what is shown?",
                "qry_image_path": path,
                "pos_text": f"answer {number}",
                "pos_image_path": "",
                "neg_text": f"other {number}" if number % 2 else "",
                "neg_image_path": "",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmeb_train" / "ChartQA.parquet")
    return tmp_path


@pytest.mark.slow
def test_the_4b_overlay_trains_two_steps_on_a_shrunken_model(
    model_folder: Callable[[str], Path],  # noqa: F811
    mmeb_train: Path,
    cli: Callable[..., Any],
) -> None:
    """The shrunken run changes the size and the machine. LoRA, optimiser, pool and data stay those of the recipe."""
    backbone = {"model": str(model_folder("qwen3_vl")), "dtype": "float32"}
    worker = {"class_path": "model", "init_args": {"max_new_tokens": 4}}
    shrunken = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "strategy": "auto",
            "precision": "32-true",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "model": {
            "backbone": {"class_path": "transformers", "init_args": backbone},
            "phases": [{"objective": {"joint": {"chunk_size": 2}}, "steps": 5000}],
            # the shrunken model's vocabulary does not have " Yes" as one token
            "pool": {
                "workers": [worker],
                "evaluator": {"class_path": "judge", "init_args": {"yes": "Y", "no": "N"}},
            },
            "budget": 4,
        },
        "data": {"batch_size": 4, "sub_batch_size": 2, "num_workers": 0},
    }
    Path("shrunken.yaml").write_text(yaml.safe_dump(shrunken), encoding="utf-8")
    recipes = [str(ROOT / "recipes" / "r1.yaml"), str(SCALE), "shrunken.yaml"]
    words = ["fit", *(word for path in recipes for word in ("--config", path))]
    done = cli(*words)
    assert done.code == 0, done.err

    import torch

    run = Path("runs/r1+qwen3vl_4b+shrunken/version_0")
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    settings = last["hyper_parameters"]
    assert settings["backbone"]["init_args"]["lora"]["rank"] == 16
    (optimizer,) = last["optimizer_states"]
    assert all("__bnb_optimizer_quant_state__" in state for state in optimizer["state"].values())
    trained = optimizer["param_groups"][0]["params"]
    adapters = [name for name in last["state_dict"] if ".lora_" in name]
    assert adapters
    assert any(last["state_dict"][name].any() for name in adapters if ".lora_B" in name)  # zero before the first step
    assert len(trained) < len(last["state_dict"])  # the base is frozen
    manifest = json.loads(Path("pools/mmeb_train/manifest.json").read_text(encoding="utf-8"))
    assert manifest["pairs"] == 8
    assert list(manifest["evaluators"]) == ["judge"]
    candidates = pq.read_table(next(Path("pools/mmeb_train").glob("candidates-*.parquet"))).to_pylist()
    assert {row["worker"] for row in candidates} == {"model"}
    losses = scalars(run, "joint/loss")
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)

    done = cli(*words, "--trainer.max_steps=3", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))
    assert done.code == 0, done.err
    assert len(scalars(run.with_name("version_1"), "joint/loss")) == 1


def scalars(run: Path, name: str) -> list[float]:
    """Reads the values of a scalar from the TensorBoard log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(run)).Reload().Scalars(name)]
