"""`mmemb data show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["show", "--split", "tset"], "'tset'"),
        (["show", "--task", "nme"], "'nme'"),
        (["show", "--rows", "0"], "rows is 0; give 1 or more"),
        (["show", "--rows", "few"], "rows: expected int, got 'few'"),
        (["draw"], "say `mmemb data show`"),
        ([], "say `mmemb data show`"),
    ],
)
def test_mistakes(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], part: str) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cli("data", *words)
    assert code == 2
    assert part in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
