"""`mmemb fit` around a stand-in module: folders, defaults, evaluation at the end, resume, interruption."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from standins import QUIET, SIGINT, SIGTERM, StandInData, StandInModule

from mmemb.commands import train as cli_module
from mmemb.training.callbacks.interrupt import InterruptCheckpoint

Fit = Callable[..., int]


def module() -> StandInModule:
    """The module of the last run."""
    return StandInModule.seen[-1]


def write(name: str, content: dict[str, Any]) -> str:
    Path(name).write_text(yaml.safe_dump(content), encoding="utf-8")
    return name


def test_a_run_gets_a_fresh_folder_named_after_its_configs(fit: Fit) -> None:
    first, second = write("r1.yaml", {"seed_everything": 3}), write("mine.yaml", {"model": {"width": 4}})
    assert fit("--config", first, "--config", second) == 0
    assert fit("--config", first, f"--config={second}") == 0
    folders = sorted(path.name for path in Path("runs/r1+mine").iterdir())
    assert folders == ["version_0", "version_1"]
    kept = yaml.safe_load(Path("runs/r1+mine/version_0/config.yaml").read_text())
    assert kept["seed_everything"] == 3
    assert Path("runs/r1+mine/version_0/checkpoints/last.ckpt").is_file()


def test_the_saved_config_runs_again(fit: Fit) -> None:
    assert fit("--model.selector", "random", "--model.selector.seed", "9") == 0
    assert fit("--config", "runs/default/version_0/config.yaml") == 0
    assert module().selector.seed == 9  # type: ignore[union-attr]


def test_fit_evaluates_on_the_test_split_unless_told_not_to(fit: Fit) -> None:
    assert fit() == 0
    assert module().tested
    assert fit("--evaluate", "false") == 0
    assert not module().tested
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert not module().tested


def test_a_dry_run_leaves_no_checkpoint(fit: Fit) -> None:
    assert fit("--trainer.fast_dev_run", "true") == 0
    assert list(Path().rglob("*.ckpt")) == []


def test_a_config_overrides_the_default_checkpointing(fit: Fit) -> None:
    callback = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"},
    }
    assert fit("--config", write("a.yaml", {"trainer": {"callbacks": [callback]}})) == 0
    names = sorted(path.name for path in Path("runs/a/version_0/checkpoints").iterdir())
    assert names == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]  # what is not said keeps its default


def test_checkpointing_can_be_turned_off(fit: Fit) -> None:
    assert fit("--trainer.enable_checkpointing", "false") == 0
    assert not list(Path().rglob("*.ckpt"))


def test_a_single_callback_need_not_stand_in_a_list(fit: Fit) -> None:
    assert fit("--config", write("a.yaml", {"trainer": {"callbacks": {"class_path": "RunCheckpoint"}}})) == 0
    names = {type(callback).__name__ for callback in module().trainer.callbacks}  # type: ignore[attr-defined]
    assert {"RunCheckpoint", "InterruptCheckpoint"} <= names


def test_later_configs_win_and_lists_of_callbacks_append(fit: Fit) -> None:
    first = write("a.yaml", {"model": {"selector": {"class_path": "random", "init_args": {"seed": 5}}}})
    second = write("b.yaml", {"model": {"selector": {"class_path": "random", "init_args": {"seed": 6}}}})
    third = write("c.yaml", {"trainer": {"callbacks+": ["lightning.pytorch.callbacks.LearningRateMonitor"]}})
    assert fit("--config", first, "--config", second, "--config", third) == 0
    assert module().selector.seed == 6  # type: ignore[union-attr]
    names = {type(callback).__name__ for callback in module().trainer.callbacks}  # type: ignore[attr-defined]
    assert {"LearningRateMonitor", "RunCheckpoint", "InterruptCheckpoint"} <= names


def test_print_config_needs_no_data_and_exits_zero(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--model.selector", "counterfactual", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["selector"]["class_path"].endswith(".Counterfactual")
    assert printed["trainer"]["logger"]["init_args"]["save_dir"] == "runs"
    assert StandInModule.seen == []


@pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_ends_as_if_uninterrupted(
    fit: Fit, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    assert fit("--trainer.max_epochs=2", "--evaluate=false") == 0
    whole = {name: value.clone() for name, value in module().state_dict().items()}
    capsys.readouterr()

    assert fit("--trainer.max_epochs=2", "--evaluate=false", f"--model.signal_at={number}") == code
    path = Path("runs/default/version_1/checkpoints/interrupted.ckpt")
    assert module().global_step == 4  # the step in which the signal came was finished
    error = capsys.readouterr().err
    assert f"--ckpt_path {path}" in error
    assert "resume with: mmemb fit" in error

    assert fit("--trainer.max_epochs=2", "--evaluate=false", f"--ckpt_path={path}") == 0
    assert module().global_step == 12
    for name, value in module().state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)


def test_a_signal_before_the_first_step_says_that_nothing_is_lost(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInData, "setup", lambda self, stage: os.kill(os.getpid(), SIGINT), raising=False)
    assert fit() == 130
    assert "nothing to resume" in capsys.readouterr().err
    assert not list(Path().rglob("*.ckpt"))


def test_a_signal_in_the_final_evaluation_says_how_to_make_up_for_it(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write("r1.yaml", {"seed_everything": 3})
    with monkeypatch.context() as patch:
        patch.setattr(StandInModule, "test_step", lambda *arguments: os.kill(os.getpid(), SIGINT))
        assert fit("--config", config, "--model.width", "4") == 130
    told = capsys.readouterr().err.strip().split("\n")[-1]
    start = "mmemb: interrupted; training had finished; evaluate with: mmemb "
    assert told.startswith(f"{start}test ")
    argv = shlex.split(told.removeprefix(start))
    assert argv[-2:] == ["--ckpt_path", "runs/r1/version_0/checkpoints/last.ckpt"]
    assert cli_module.main(argv) == 0
    assert module().tested


def test_a_signal_in_the_final_evaluation_of_a_run_without_checkpoints(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandInModule, "test_step", lambda *arguments: os.kill(os.getpid(), SIGINT))
    assert fit("--trainer.enable_checkpointing", "false") == 130
    assert "training had finished and kept no checkpoint" in capsys.readouterr().err


def test_the_way_to_resume_replaces_an_older_checkpoint_of_the_command() -> None:
    interrupt = InterruptCheckpoint()
    interrupt.path = Path("new.ckpt")
    line = cli_module._how_to_go_on(["fit", "--ckpt_path", "old.ckpt", "--config", "a b.yaml"], interrupt)
    assert line == "resume with: mmemb fit --config 'a b.yaml' --ckpt_path new.ckpt"


def test_settings_stay_as_given_when_a_checkpoint_is_resumed(fit: Fit) -> None:
    assert fit("--model.identity", "one") == 0
    path = "runs/default/version_0/checkpoints/last.ckpt"
    assert fit("--model.identity", "two", "--ckpt_path", path, "--trainer.max_epochs=2") == 0
    assert module().identity == "two"


def test_the_test_command_reads_a_checkpoint(fit: Fit) -> None:
    assert fit() == 0
    trained = {name: value.clone() for name, value in module().state_dict().items()}
    words = [word for word in QUIET if "max_epochs" not in word]
    run = "runs/default/version_0"
    argv = ["test", *words, "--config", f"{run}/config.yaml", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]
    argv += ["--seed_everything=5"]
    assert cli_module.main(argv) == 0
    for name, value in module().state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=0, atol=0)


def test_the_last_checkpoint_is_of_the_last_step(fit: Fit) -> None:
    saver = {"class_path": "mmemb.training.callbacks.checkpoint.RunCheckpoint", "init_args": {"every_n_train_steps": 4}}
    assert fit("--config", write("a.yaml", {"trainer": {"callbacks": [saver]}}), "--trainer.max_steps", "5") == 0
    last = torch.load("runs/a/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 5
    assert module().tested
