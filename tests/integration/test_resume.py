"""A run that was killed, or stopped by Ctrl-C, and resumed equals the uninterrupted one bit for bit."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.small import start, write_rows, write_settings

pytestmark = pytest.mark.slow
STEPS, EVERY, STOP = 15, 4, 6
HOLD = f"""
from pathlib import Path
import time
import lightning as L

class Hold(L.Callback):
    '''Waits in the middle of the run, two steps after the first checkpoint, until the test says go.'''

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == {STOP}:
            Path("here").touch()
            while not Path("go").exists():
                time.sleep(0.02)
"""
SAVE = {
    "class_path": "mmemb.training.callbacks.checkpoint.RunCheckpoint",
    "init_args": {"every_n_train_steps": EVERY, "save_top_k": 0, "save_last": True},
}
CHANGES: dict[str, Any] = {
    "trainer": {"max_steps": STEPS, "val_check_interval": 5, "limit_val_batches": 1, "callbacks": [SAVE]},
    # Dropout draws from the process's generator at every step: only its restored state makes the rest equal.
    "model": {"backbone": {"init_args": {"lora": {"rank": 4, "dropout": 0.2}}}, "validation_queries": 2},
    "data": {"num_workers": 1},
    "evaluate": False,
}
VOLATILE = {"trained_seconds", "queries_per_second", "callbacks"}
"""What may differ, at any depth: what a clock says, and the callbacks' state, which names the run's folder."""


def fit(folder: Path, *words: str, hold: bool = False) -> subprocess.Popen[str]:
    """Starts a training in a folder of its own; one with ``hold`` waits after its first checkpoint."""
    if not (folder / "pairs.jsonl").exists():
        folder.mkdir()
        write_rows(folder)
    (folder / "hold.py").write_text(HOLD, encoding="utf-8")
    settings = write_settings(folder, CHANGES)
    held = ["--trainer.callbacks+=hold.Hold"] if hold else []
    return start(folder, "fit", *settings, *held, *words, PYTHONPATH=str(folder))


def ended(run: subprocess.Popen[str], code: int = 0) -> str:
    """Waits for a run, which must end so; what it said on standard error."""
    _, error = run.communicate(timeout=240)
    assert run.returncode == code, error[-3000:]
    return error


def wait_for(path: Path, run: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while not path.exists():
        assert run.poll() is None, run.communicate()[1][-3000:]
        assert time.monotonic() < until, f"no {path.name} within four minutes"
        time.sleep(0.02)


def checkpoint(folder: Path, version: int, name: str = "last.ckpt") -> Path:
    return folder / "runs" / "r1+small" / f"version_{version}" / "checkpoints" / name


def unequal(left: Any, right: Any, at: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit."""
    if isinstance(left, dict) and isinstance(right, dict):
        shared = (left.keys() & right.keys()) - VOLATILE
        below = [spot for key in shared for spot in unequal(left[key], right[key], f"{at}/{key}")]
        return [f"{at}/{key}: only once" for key in left.keys() ^ right.keys()] + below
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [spot for row, pair in pairs for spot in unequal(*pair, f"{at}/{row}")]
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and torch.equal(left, right)
    else:
        same = type(left) is type(right) and left == right
    return [] if same else [f"{at}: {str(left)[:60]} != {str(right)[:60]}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three runs at once: one to the end, one killed, one stopped by Ctrl-C; then the last two resumed."""
    base = tmp_path_factory.mktemp("runs")
    whole, killed, stopped = (base / name for name in ("whole", "killed", "stopped"))
    started = [fit(whole), fit(killed, hold=True), fit(stopped, hold=True)]
    try:
        first, second, third = started
        wait_for(killed / "here", second)
        second.send_signal(signal.SIGKILL)
        ended(second, -signal.SIGKILL)
        left = sorted(path.name for path in checkpoint(killed, 0).parent.iterdir())
        wait_for(stopped / "here", third)
        third.send_signal(signal.SIGINT)
        (stopped / "go").touch()
        told = ended(third, 130)
        resumed = fit(killed, "--ckpt_path", str(checkpoint(killed, 0)))
        continued = fit(stopped, "--ckpt_path", str(checkpoint(stopped, 0, "interrupted.ckpt")))
        started += [resumed, continued]
        for run in (first, resumed, continued):
            ended(run)
    finally:
        for run in started:
            if run.poll() is None:  # a test that failed leaves nothing waiting
                run.kill()
    return {"whole": whole, "killed": killed, "stopped": stopped, "told": told, "left": left}


def test_a_killed_run_leaves_whole_checkpoints_only(runs: dict[str, Any]) -> None:
    assert runs["left"] == ["last.ckpt"]
    kept = torch.load(checkpoint(runs["killed"], 0), weights_only=True)
    assert kept["global_step"] == EVERY < STOP


def test_ctrl_c_leaves_a_checkpoint_after_the_step_at_hand_and_says_how_to_go_on(runs: dict[str, Any]) -> None:
    kept = torch.load(checkpoint(runs["stopped"], 0, "interrupted.ckpt"), weights_only=True)
    assert kept["global_step"] == STOP + 1
    assert "Traceback" not in runs["told"]
    last = runs["told"].strip().split("\n")[-1]
    assert last.startswith("mmemb: interrupted; resume with: mmemb fit --config ")
    assert last.endswith("--ckpt_path runs/r1+small/version_0/checkpoints/interrupted.ckpt")


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_resumed_equals_uninterrupted_bit_for_bit(runs: dict[str, Any], name: str) -> None:
    whole = torch.load(checkpoint(runs["whole"], 0), weights_only=True)
    resumed = torch.load(checkpoint(runs[name], 1), weights_only=True)
    assert whole["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "PairDataModule", "random_state", "loops"):
        assert whole[part], part  # each is there to be compared
    assert unequal(whole, resumed) == []


def test_the_comparison_sees_a_single_bit(runs: dict[str, Any]) -> None:
    whole = torch.load(checkpoint(runs["whole"], 0), weights_only=True)
    other = torch.load(checkpoint(runs["whole"], 0), weights_only=True)
    name, weight = next(iter(other["state_dict"].items()))
    weight.flatten()[0] += 1e-7
    other["random_state"]["cpu"][-1] ^= 1
    other["loops"].pop("test_loop")
    spots = {spot.split(":")[0] for spot in unequal(whole, other)}
    assert spots == {f"/state_dict/{name}", "/random_state/cpu", "/loops/test_loop"}
