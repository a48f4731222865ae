"""What rests on the hook into jsonargparse: names, class paths, class names, nested lists, Optional, flags, help."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from jsonargparse import _typehints
from standins import StandInModule

from mmemb.commands.parsing import lightning_cli
from mmemb.commands.parsing import short_names as shortnames
from mmemb.interfaces import Controller, Pooler, Selector, Worker
from mmemb.registry import available, resolve
from mmemb.types import Candidates, Selection

Fit = Callable[..., int]
ROOT = Path(__file__).resolve().parent.parent.parent


class Mine(Selector):
    """A selector without a short name."""

    def __init__(self, *, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def select(self, candidates: Candidates, *, seed: int) -> Selection:
        return Selection(None)


class Box:
    """Model at every depth."""

    def __init__(
        self,
        *,
        selector: Selector | None = None,
        controllers: list[Controller] | None = None,
        by_name: dict[str, Selector] | None = None,
        either: Selector | Pooler | None = None,
        inner: Inner | None = None,
    ) -> None:
        self.selector, self.controllers, self.by_name = selector, controllers, by_name
        self.either, self.inner = either, inner


class Inner:
    """One level down."""

    def __init__(self, workers: list[Worker], size: int = 1) -> None:
        self.workers, self.size = workers, size


@pytest.fixture
def build() -> Callable[..., Box]:
    """Builds a `Box` from words, or from a config's text."""

    def run(*words: str, config: str | None = None) -> Box:
        shortnames.install()
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(Box, "box", sub_configs=True)
        if config is not None:
            Path("box.yaml").write_text(config, encoding="utf-8")
            words = ("--config=box.yaml", *words)
        return parser.instantiate_classes(parser.parse_args(list(words))).box

    return run


def test_installing_twice_changes_nothing() -> None:
    shortnames.install()
    hooks = _typehints.resolve_class_path_by_name, _typehints.ActionTypeHint._check_type
    shortnames.install()
    assert (_typehints.resolve_class_path_by_name, _typehints.ActionTypeHint._check_type) == hooks


def test_the_pinned_range_is_the_one_the_hook_was_written_for() -> None:
    major, minor = map(int, version("jsonargparse").split(".")[:2])
    assert major == 4
    assert minor >= 53


@pytest.mark.parametrize("name", available("selector"))
def test_every_selector_is_named_by_short_name(build: Callable[..., Box], name: str) -> None:
    assert type(build(f"--box.selector={name}").selector) is resolve("selector", name)


def test_short_names_in_flags_with_arguments(build: Callable[..., Box]) -> None:
    box = build("--box.selector", "random", "--box.selector.seed", "4")
    assert type(box.selector) is resolve("selector", "random")
    assert box.selector.seed == 4  # type: ignore[union-attr]


def test_short_names_in_yaml_at_every_depth(build: Callable[..., Box]) -> None:
    box = build(
        config="""
box:
  selector: {class_path: random, init_args: {seed: 7}}
  controllers: [never, {class_path: random, init_args: {rate: 0.25}}, always_reason]
  by_name: {a: oracle, b: random}
  either: counterfactual
  inner: {class_path: INNER, init_args: {workers: [metadata], size: 3}}
""".replace("INNER", f"{__name__}.Inner")
    )
    assert box.selector.seed == 7  # type: ignore[union-attr]
    assert [part.name for part in box.controllers or []] == ["never", "random", "always_reason"]
    assert {key: part.name for key, part in (box.by_name or {}).items()} == {"a": "oracle", "b": "random"}
    assert box.either is not None
    assert box.either.name == "counterfactual"
    assert box.inner is not None
    assert [part.name for part in box.inner.workers] == ["metadata"]
    assert box.inner.size == 3


def test_a_name_means_what_its_kind_says(build: Callable[..., Box]) -> None:
    box = build("--box.selector=random", "--box.controllers=[random]")
    assert isinstance(box.selector, Selector)
    assert isinstance((box.controllers or [])[0], Controller)


def test_null_and_flags_over_yaml(build: Callable[..., Box]) -> None:
    assert build(config="box: {selector: null}").selector is None
    assert build("--box.selector=oracle", config="box: {selector: random}").selector.name == "oracle"  # type: ignore[union-attr]


def test_class_paths_and_class_names_still_work(build: Callable[..., Box]) -> None:
    assert type(build(f"--box.selector={__name__}.Mine").selector) is Mine
    box = build("--box.selector=Mine", "--box.selector.threshold=0.75")
    assert box.selector.threshold == 0.75  # type: ignore[union-attr]


def test_an_unknown_name_says_what_is_meant(build: Callable[..., Box]) -> None:
    with pytest.raises(jsonargparse.ArgumentError, match="did you mean 'oracle'"):
        build("--box.selector=orakle")


def test_help_of_one_part(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--model.selector.help", "counterfactual") == 0
    assert "--model.selector.margin" in capsys.readouterr().out


def test_a_selector_of_ones_own_trains_from_a_second_config(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my_parts.py").write_text(
        "from mmemb.interfaces import Selector\n"
        "from mmemb.types import Selection\n"
        "class Shortest(Selector):\n"
        "    '''Takes the shortest rationale.'''\n"
        "    def __init__(self, *, least: int = 1) -> None:\n"
        "        self.least = least\n"
        "    def select(self, candidates, *, seed):\n"
        "        return Selection(0)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    Path("a.yaml").write_text("model: {selector: random, width: 4}", encoding="utf-8")
    mine = {"model": {"selector": {"class_path": "my_parts.Shortest", "init_args": {"least": 2}}}}
    Path("mine.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    assert fit("--config=a.yaml", "--config=mine.yaml") == 0
    selector: Any = StandInModule.seen[-1].selector
    assert type(selector).__name__ == "Shortest"
    assert selector.least == 2


@pytest.mark.usefixtures("stand_ins")
def test_check_config_parses_and_builds_nothing() -> None:
    settings = lightning_cli.check_config(["fit", "--model.selector=random"])
    assert settings.model.selector.class_path.endswith(".Random")
    assert StandInModule.seen == []


def test_a_source_keeps_nothing_of_an_earlier_files_source(tmp_path: Path) -> None:
    for name, source in (("first", {"path": "a.jsonl", "weight": 3.0, "tasks": ["x"]}), ("then", {"path": "a.jsonl"})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"train": [source]}}), encoding="utf-8")
    names = (str(ROOT / "recipes" / "r1.yaml"), str(tmp_path / "first.yaml"), str(tmp_path / "then.yaml"))
    words = ["fit", *(f"--config={name}" for name in names)]
    (source,) = lightning_cli.check_config(words).data.train
    assert (source.path, source.weight, source.tasks) == ("a.jsonl", 1.0, None)
    (source,) = lightning_cli.check_config([*words, "--data.train.weight=2"]).data.train
    assert (source.path, source.weight) == ("a.jsonl", 2.0)
