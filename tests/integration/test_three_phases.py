"""One recipe that pretrains, trains jointly and learns when to reason; a resumed run ends bit for bit alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmemb.__main__ import main
from tests.integration.small import JOINT, write_rows, write_settings

STEPS = {"next_token": 2, "joint": 3, "control": 3}
CHANGES: dict[str, Any] = {
    "trainer": {
        "max_steps": -1,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}", "dirpath": "kept"},
            }
        ],
    },
    "model": {
        # Dropout draws from the process's generator: only its restored state makes a resumed run equal.
        "backbone": {"class_path": "tiny", "init_args": {"weights": "random", "lora": {"rank": 2, "dropout": 0.2}}},
        "phases": [
            {"objective": {"next_token": {"chunk_size": 4}}, "data": "texts", "steps": STEPS["next_token"]},
            {"objective": JOINT, "steps": STEPS["joint"]},
            {
                "objective": {"control": {"group_size": 2, "max_new_tokens": 3, "chunk_size": 2, "bank_size": 4}},
                "data": "when",
                "steps": STEPS["control"],
                "learning_rate_factor": 0.5,
            },
        ],
        "controllers": ["never", "always_reason"],
        "true_rationale": None,
    },
    "data": {
        "streams": {
            "texts": {
                "sources": [{"path": "bundled:pretrain", "tasks": ["fact"]}],
                "batch_size": 4,
                "sub_batch_size": 4,
            },
            "when": {
                "sources": [{"path": "bundled:control", "tasks": ["name"], "limit": 8}],
                "batch_size": 4,
                "sub_batch_size": 2,
            },
        },
        "test": [{"path": "pairs.jsonl", "limit": 4}],
    },
}


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return checkpoint


@pytest.mark.slow
def test_three_phases_in_one_recipe_resume_in_the_middle_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    settings = write_settings(tmp_path, CHANGES)
    assert main(["fit", *settings]) == 0, capsys.readouterr().err
    last = sum(STEPS.values())
    whole = weights(Path(f"kept/step={last}.ckpt"))
    log = Path("runs/r1+small/version_0/progress.log").read_text(encoding="utf-8")
    for phase in STEPS:
        assert f" {phase}  step " in log
    summary = Path("runs/r1+small/version_0/summary.md").read_text(encoding="utf-8")
    for row in ("never_before_joint", "always_reason_before_joint", "never_before_control"):
        assert f"`{row}`" in summary
    for step in (1, 3, 6):  # in the middle of each phase
        words = [*settings, "--ckpt_path", f"kept/step={step}.ckpt", "--evaluate", "false"]
        words += ["--trainer.callbacks.dirpath", f"again{step}"]
        assert main(["fit", *words]) == 0, capsys.readouterr().err
        again = weights(Path(f"again{step}/step={last}.ckpt"))
        assert again.keys() == whole.keys()
        different = [name for name in whole if not torch.equal(whole[name], again[name])]
        assert different == [], f"resumed after {step} steps"
