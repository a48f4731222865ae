"""Checkpoints that do not fit, are not given or cannot be written: what `fit` and `test` answer."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning  # noqa: F401  (its log keeps the stderr of its import: not that of one test)
import pytest

from mmemb.components.backbones.tiny import FOLDER
from tests.integration.small import write_rows, write_settings

Cli = Callable[..., Any]
LAST = "runs/r1+small/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, settings and a run of one step."""
    from mmemb.__main__ import main

    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    write_rows(folder)
    os.chdir(folder)
    try:
        assert main(["fit", *write_settings(folder), "--evaluate=false", "--trainer.max_steps=1"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def refused(cli: Cli) -> Callable[..., str]:
    """Runs ``mmemb fit`` in the current folder, which must refuse; returns its one line."""

    def run(*words: str, changes: dict[str, Any] | None = None) -> str:
        code, _, err = cli("fit", *write_settings(Path.cwd(), changes), *words)
        assert code == 2, err
        assert "Traceback" not in err
        (line,) = (line for line in err.split("\n") if line.startswith("mmemb: error: "))
        assert err.rstrip("\n").endswith(line)
        return line

    return run


def test_a_checkpoint_of_another_backbone(
    trained: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    narrow = {"text_config": {"num_hidden_layers": 2}}
    other = {"model": str(FOLDER), "weights": "random", "config_overrides": narrow}
    changes = {"model": {"backbone": {"class_path": "transformers", "init_args": other}}}
    line = refused("--ckpt_path", LAST, changes=changes)
    assert line.count("tiny@") == 2  # both identities
    assert "backbone" in line
    assert "checkpoint" in line


def test_a_checkpoint_of_another_pooler(
    trained: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    line = refused("--ckpt_path", LAST, "--model.pooler=attention")
    for part in ("checkpoint", "settings", "pooler.query", "config.yaml"):
        assert part in line


def test_an_evaluation_without_a_checkpoint_says_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    words = write_settings(tmp_path, {"model": {"controllers": ["never"]}})
    with pytest.warns(UserWarning, match="--ckpt_path.*`mmemb test` uses the untrained model"):
        assert cli("test", *words).code == 0


def test_a_disk_that_fills_up_leaves_no_half_checkpoint(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    monkeypatch.setattr("mmemb.common.checkpoint.os.fsync", full)
    line = refused("--evaluate=false")
    for part in ("cannot write the checkpoint", "last.ckpt", "No space left on device", "free some space"):
        assert part in line
    folder = tmp_path / "runs" / "r1+small" / "version_0" / "checkpoints"
    assert not folder.exists() or list(folder.iterdir()) == []
