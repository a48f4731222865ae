"""Every command that computes, on a device that is not the CPU: no tensor of the one meets one of the other."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.integration.small import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="torch knows one device beside the CPU"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `tests.integration.on_other_device` found."""
    command = [sys.executable, "-m", "tests.integration.on_other_device", str(tmp_path_factory.mktemp("devices"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_device_does_not_mix_with_the_cpu(found: dict[str, Any]) -> None:
    # Else nothing below could fail.
    assert found["refused"] == ["sum", "index value", "numpy"]
    assert found["operations"] > 1000


def test_every_command_ends_well(found: dict[str, Any]) -> None:
    done = dict.fromkeys(("generate", "score", "fit", "embed", "search"), 0)
    assert found["codes"] == {"cpu": done, "other": done}


def test_training_is_that_of_the_cpu(found: dict[str, Any]) -> None:
    assert found["learned"]
    assert found["gradients"] < 1e-3  # their running mean; sums in another order
    assert found["weights"] < 1e-3


def test_embeddings_and_rationales_are_those_of_the_cpu(found: dict[str, Any]) -> None:
    assert found["embeddings"] < 1e-5
    assert found["rationales"]["other"] == found["rationales"]["cpu"]
    assert all(found["rationales"]["other"])


def test_the_loss_is_that_of_the_cpu_with_every_option(found: dict[str, Any]) -> None:
    assert found["losses"] < 1e-5
