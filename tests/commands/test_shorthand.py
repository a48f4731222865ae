"""Parts as one-key mappings of their short names: in files and flags, nested, merged, printed, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import OptimizerCallable
from standins import StandInModule

from mmemb.commands.parsing.lightning_cli import check_config
from mmemb.commands.parsing.shorthand import PartError, expand
from mmemb.components.controllers.threshold import Threshold
from mmemb.components.selectors.random import Random
from mmemb.interfaces import Controller, Selector
from mmemb.losses.infonce import InfoNCE
from mmemb.registry import UnknownComponentError

Fit = Callable[..., int]
Mistake = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]
RANDOM = "mmemb.components.selectors.random.Random"

SHORT = """
model:
  backbone: {tiny: {weights: random}}
  pooler: embed_token
  phases:
  - objective:
      joint:
        chunk_size: 4
        infonce: {infonce: {temperature: 0.07}}
        augment: {jitter: {shift: 2}}
    steps: 1
  - objective:
      control:
        rewards:
        - utility: {price: 0.01}
        - format
        grpo: {scaling: none}
    data: control
  selector: {random: {seed: 4}}
  controllers:
  - never
  - threshold: {token_share: 0.6}
  optimizer: {AdamW: {lr: 2.0e-3, betas: [0.9, 0.98]}}
data:
  train: [{path: pairs.jsonl}]
trainer: {max_steps: 2}
"""
LONG = """
model:
  backbone: {class_path: tiny, init_args: {weights: random}}
  pooler: embed_token
  phases:
  - objective:
      class_path: mmemb.training.joint.objective.Joint
      init_args:
        chunk_size: 4
        infonce: {class_path: mmemb.losses.infonce.InfoNCE, init_args: {temperature: 0.07}}
        augment: {class_path: mmemb.data.augment.PictureAugment, init_args: {shift: 2}}
    steps: 1
  - objective:
      class_path: mmemb.training.control.objective.Control
      init_args:
        rewards:
        - {class_path: mmemb.training.control.rewards.Utility, init_args: {price: 0.01}}
        - class_path: mmemb.training.control.rewards.Format
        grpo: {class_path: mmemb.losses.grpo.GRPO, init_args: {scaling: none}}
    data: control
  selector: {class_path: random, init_args: {seed: 4}}
  controllers:
  - never
  - {class_path: threshold, init_args: {token_share: 0.6}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2.0e-3, betas: [0.9, 0.98]}}
data:
  train: [{path: pairs.jsonl}]
trainer: {max_steps: 2}
"""


def parsed(*words: str, **files: str) -> dict[str, Any]:
    """The model's settings after the configs, in order, and the words."""
    for name, content in files.items():
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    configs = [f"--config={name}.yaml" for name in files]
    return check_config(["fit", *configs, *words]).as_dict()["model"]


def selector_of(*words: str) -> dict[str, Any]:
    """The selector after the words."""
    return check_config(["fit", *words]).model.selector.as_dict()


def test_the_short_form_of_a_whole_recipe_equals_the_long_one() -> None:
    assert parsed(short=SHORT) == parsed(long=LONG)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("first", "then", "selector"),
    [
        ("counterfactual", "{random: {seed: 4}}", {"seed": 4}),
        ("{random: {seed: 4}}", "random", {"seed": 4}),
        ("{random: {seed: 4}}", "{random: {seed: 5}}", {"seed": 5}),
        ("{random: {seed: 4}}", "{seed: 6}", {"seed": 6}),
        ("random", "{init_args: {seed: 7}}", {"seed": 7}),
        ("{class_path: random, init_args: {seed: 4}}", "{random: {}}", {"seed": 4}),
        ("{random: {seed: 4}}", "{random: }", {"seed": 4}),
    ],
)
def test_a_later_file_or_flag_merges_as_the_long_form_does(first: str, then: str, selector: dict[str, int]) -> None:
    expected = {"class_path": RANDOM, "init_args": selector}
    for name, content in (("first", first), ("then", then)):
        Path(f"{name}.yaml").write_text(f"model: {{selector: {content}}}", encoding="utf-8")
    assert selector_of("--config=first.yaml", "--config=then.yaml") == expected
    assert selector_of("--config=first.yaml", "--model.selector", then) == expected
    assert selector_of("--model.selector", first, "--model.selector", then) == expected


def test_flags_below_a_short_form() -> None:
    words = ["--model.selector.seed=9", "--model.optimizer.lr=0.5"]
    found = parsed(*words, short=SHORT)
    assert found["selector"]["init_args"]["seed"] == 9
    assert found["optimizer"]["init_args"]["lr"] == 0.5
    assert tuple(found["optimizer"]["init_args"]["betas"]) == (0.9, 0.98)


def test_a_list_grows_by_one_short_form() -> None:
    controllers = parsed("--model.controllers+", "{random: {rate: 0.25}}", short=SHORT)["controllers"]
    assert [each["class_path"].rsplit(".", 1)[1] for each in controllers] == ["Never", "Threshold", "Random"]
    assert controllers[-1]["init_args"]["rate"] == 0.25


def test_a_class_path_may_be_the_key() -> None:
    assert parsed("--model.selector", f"{{{RANDOM}: {{seed: 3}}}}", short=SHORT)["selector"]["init_args"] == {"seed": 3}


def test_what_is_printed_loads_again(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.selector={random: {seed: 4}}", "--model.optimizer={SGD: {lr: 0.25}}"]
    assert fit(*words, "--print_config") == 0
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert yaml.safe_load(Path("printed.yaml").read_text())["model"]["selector"]["init_args"] == {"seed": 4}
    assert fit("--config=printed.yaml", "--trainer.fast_dev_run=true") == 0
    module = StandInModule.seen[-1]
    assert module.selector.seed == 4
    assert module.optimizers().optimizer.param_groups[0]["lr"] == 0.25


def test_a_mistake_far_below_names_its_place() -> None:
    bad = "[{objective: {joint: {infonce: {infnce: {temperature: 0.1}}}}}]"
    with pytest.raises(
        ValueError, match=r"^model\.phases\.objective\.infonce: there is no loss named 'infnce'.*'infonce'"
    ):
        parsed("--model.phases", bad, short=SHORT)
    bad = "[{objective: {joint: {infonce: {temprature: 0.1}}}}]"
    with pytest.raises(
        ValueError, match=r"^model\.phases\.objective\.infonce: .*no argument 'temprature'; .*'temperature'"
    ):
        parsed("--model.phases", bad, short=SHORT)


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def test_expand_by_type() -> None:
    selector = {"class_path": path_of(Random), "init_args": {"seed": 1}}
    threshold = {"class_path": path_of(Threshold), "init_args": {"price": 0.1}}
    infonce = {"class_path": path_of(InfoNCE), "init_args": {"temperature": 0.1}}
    assert expand({"random": {"seed": 1}}, Selector | None) == selector
    assert expand({"threshold": {"price": 0.1}}, Selector | Controller) == threshold
    assert expand(["never", {"threshold": {"price": 0.1}}], list[Controller] | None) == ["never", threshold]
    assert expand({"a": {"random": {"seed": 1}}, "b": "oracle"}, dict[str, Selector]) == {"a": selector, "b": "oracle"}
    assert expand({"infonce": {"temperature": 0.1}}, InfoNCE | None) == infonce
    # The class is known, so the arguments alone are the long form's business.
    assert expand({"temperature": 0.1}, InfoNCE | None) == {"temperature": 0.1}
    assert expand({"margin": None}, InfoNCE) == {"margin": None}
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}}
    assert expand({"Adam": {"lr": 0.1}}, OptimizerCallable) == adam
    assert expand({"Adam": {"lr": 0.1}}, OptimizerCallable | None) == adam


@pytest.mark.parametrize(
    ("value", "typehint"),
    [
        ({"random": {"seed": 1}}, dict[str, Any]),
        ({"random": {"seed": 1}}, Any),
        ({"class_path": "random"}, Selector),
        ({"init_args": {"seed": 1}}, Selector),
        ("random", Selector),
        ({}, Selector),
        (3, Selector | None),
        (None, Selector | None),
        ({"random": 1}, list[Selector]),
        ([{"lr": 1}], OptimizerCallable),
    ],
)
def test_anything_else_stays_as_it_is(value: Any, typehint: Any) -> None:
    assert expand(value, typehint) == value


def test_an_argument_of_the_class_named_before_may_be_the_only_key() -> None:
    previous = {"class_path": path_of(Random)}
    assert expand({"seed": 1}, Selector, previous=previous) == {"seed": 1}
    with pytest.raises(UnknownComponentError):
        expand({"seed": 1}, Selector)
    with pytest.raises(UnknownComponentError):
        expand({"sed": {"a": 1}}, Selector, previous=previous)
    with pytest.raises(PartError, match="indent the arguments of 'random' below it"):
        expand({"random": {}, "oracle": {}}, Selector)


def test_a_bare_optimizer_name_is_torchs_whatever_else_has_the_name() -> None:
    class AdamW(torch.optim.SGD):
        """Another class of the name."""

    globals()["AdamW"] = AdamW  # importable, so that jsonargparse finds two
    try:
        assert parsed("--model.optimizer=AdamW", short=SHORT)["optimizer"]["class_path"] == "torch.optim.AdamW"
    finally:
        del globals()["AdamW"]
