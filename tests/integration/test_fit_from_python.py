"""`mmemb.fit`: a training from Python, what it returns, and how it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmemb
from mmemb.commands.fit import _flags
from mmemb.commands.parsing.errors import UsageError
from tests.integration.small import ROOT, SETTINGS, write_rows

RECIPE = ROOT / "recipes" / "r1.yaml"
SHORT = {
    "backbone": {"tiny": {"weights": "random"}},
    "phases": [{"objective": {"joint": {"chunk_size": 4, "infonce": {"temperature": 0.07}}}}],
    "selector": {"random": {"seed": 4}},
    "controllers": ["never", {"threshold": {"token_share": 0.5}}],
    "optimizer": {"SGD": {"lr": 0.01}},
}
"""Short forms, over the small settings."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_it_trains_and_returns_what_the_run_left(folder: Path) -> None:
    run = mmemb.fit(RECIPE, "small.yaml", {"trainer.max_steps": 1}, model=SHORT, trainer={"max_steps": 2})
    assert run.folder.resolve() == folder / "runs" / "r1+small" / "version_0"
    assert run.module.trainer.global_step == 2
    assert run.module.selector is not None
    assert (run.module.selector.name, vars(run.module.selector)["seed"]) == ("random", 4)
    assert sorted(run.module.controllers) == ["never", "threshold"]
    assert run.summary == json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    assert {"never", "threshold"} <= set(run.summary["modes"])
    assert run.checkpoint is not None
    assert run.checkpoint.resolve() == (run.folder / "checkpoints" / "last.ckpt").resolve()
    # The settings that were saved say the same in the long form, and the checkpoint rebuilds the parts.
    saved = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    assert saved["model"]["selector"] == {
        "class_path": "mmemb.components.selectors.random.Random",
        "init_args": {"seed": 4},
    }
    objective = saved["model"]["phases"][0]["init_args"]["objective"]
    assert objective["init_args"]["infonce"]["init_args"]["temperature"] == 0.07
    embedder = mmemb.Embedder.from_checkpoint(run.checkpoint, device="cpu")
    assert len(embedder.encode(["a"], reason="never")) == 1

    again = mmemb.fit(
        RECIPE, "small.yaml", model=SHORT, trainer={"max_steps": 3}, ckpt_path=run.checkpoint, evaluate=False
    )
    assert again.module.trainer.global_step == 3
    assert again.folder.name == "version_1"
    assert again.summary is None


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"modle.width": 3}, ["there is no option '--modle.width'"]),
        ({"model": {"selector": "nope"}}, ["model.selector: there is no selector named 'nope'"]),
        ({"model.selector": {"randm": {}}}, ["model.selector: ", "did you mean 'random'?"]),
        ({"trainer": {"max_steps": "many"}}, ["trainer.max_steps: expected int, got 'many'"]),
        ({"model": {"selector": object()}}, ["settings are plain values, got object"]),
        ({"data.batch_size": 0}, ["batch_size"]),
    ],
)
def test_a_mistake_is_an_exception_of_one_line(folder: Path, settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        mmemb.fit(RECIPE, "small.yaml", settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_file_that_is_missing(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no config file none\.yaml"):
        mmemb.fit("none.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        mmemb.fit(RECIPE, "small.yaml", ckpt_path="none.ckpt")


def test_settings_become_the_words_of_a_shell() -> None:
    given: Callable[..., list[str]] = lambda **settings: _flags(settings)  # noqa: E731
    assert given(trainer={"max_steps": 2, "logger": False}) == ["--trainer.max_steps=2", "--trainer.logger=false"]
    assert _flags({"model.selector": {"random": {"seed": 4}}}) == ['--model.selector={"random": {"seed": 4}}']
    assert given(ckpt_path=Path("a") / "b.ckpt") == [f"--ckpt_path={Path('a') / 'b.ckpt'}"]
    assert given(model={"selector": None, "optimizer": "AdamW"}) == ["--model.selector=null", "--model.optimizer=AdamW"]


def test_it_runs_outside_the_main_thread(folder: Path) -> None:
    """Signals belong to the main thread; elsewhere a training goes without them."""
    found: list[BaseException] = []

    def work() -> None:
        try:
            mmemb.fit("none.yaml")
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(error) for error in found] == [FileNotFoundError]
