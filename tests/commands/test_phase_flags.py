"""Flags of single phases change what the files say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.lightning_cli import check_config

ROOT = Path(__file__).resolve().parents[2]


def phases(*words: str) -> list[Any]:
    settings = check_config(["fit", "--config", str(ROOT / "recipes" / "r1.yaml"), *words])
    return [phase.init_args for phase in settings.model.phases]


def test_a_phase_is_named_by_its_name_or_number_and_later_flags_win() -> None:
    joint, control = phases(
        "--model.phases.joint.infonce.dims",
        "[64, 160]",
        "--model.phases.0.chunk_size=4",
        "--model.phases.joint.chunk_size=8",
        "--model.phases.control.steps=7",
        "--model.phases.control.grpo.kl_weight=0.1",
    )
    objective = joint.objective.init_args
    assert (objective.infonce.init_args.dims, objective.chunk_size) == ([64, 160], 8)
    assert objective.infonce.init_args.temperature == 0.05, "what no flag names stays"
    assert (control.steps, control.objective.init_args.grpo.init_args.kl_weight) == (7, 0.1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.phases.jointt.chunk_size=8"], ["--model.phases.jointt.chunk_size", "joint, control"]),
        (["--model.phases.2.steps=8"], ["--model.phases.2.steps", "joint, control"]),
        (["--model.phases.joint.chunk_sizes=8"], ["model.phases", "chunk_sizes", "did you mean 'chunk_size'"]),
        (["--model.phases.joint.chunk_size=few"], ["chunk_size", "int", "few"]),
        (["--model.phases.joint.augment.shift.x=3"], ["--model.phases.joint.augment.shift.x", "no settings"]),
        (["--model.phases.joint"], ["--model.phases.joint", "--model.phases.joint.chunk_size 8"]),
        (["--model.phases.joint.chunk_size"], ["--model.phases.joint.chunk_size", "a value"]),
    ],
)
def test_a_wrong_flag_is_named_with_a_remedy(words: list[str], told: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        phases(*words)
    for part in told:
        assert part in str(error.value)
