"""`mmemb data show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Cli = Callable[..., Any]


def test_a_sheet_of_the_tasks_asked_for(cli: Cli, tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    assert cli("data", "show", "--task", "name", "--rows", "2", "--output", str(one)) == (0, f"{one}\n", "")
    assert (
        cli("data", "show", "--task", "name", "left1", "--rows", "2", "--split", "train", "--output", str(two)).code
        == 0
    )
    assert Image.open(two).size[1] > Image.open(one).size[1]
