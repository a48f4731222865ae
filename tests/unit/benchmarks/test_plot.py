"""Tests which rows are in the picture of the loss benchmark, and that no text is cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import plot


def row(**changes: Any) -> dict[str, Any]:
    base = {"rival": "mmemb", "n": 2048, "width": 256, "dtype": "float32", "symmetric": False, "device": "a CPU"}
    return {**base, "torch": "2", "commit": "one", "tflops": 0.1, "extra_mb": 66.0, **changes}


def test_the_newest_measured_row_of_each_rival_and_case_is_drawn() -> None:
    kept = [row(n=8192), row(symmetric=True), row(rival="naive"), row(commit="two")]
    another = row(device="another", n=64)
    rows = [row(), *kept, row(tflops=None), another]
    assert plot.newest(rows) == [kept[3], *kept[:3]]
    assert plot.newest(rows, device="another") == [another]
    assert plot.newest([row(tflops=None)]) == []


def test_no_text_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "infonce.jsonl"
    long = {"device": "A device whose name is as long as those of some processors are @ 2.80GHz", "torch": "2.13.0+cpu"}
    rows = [row(rival=f"a rival of some name {number}", commit=f"0123456{number}", **long) for number in range(4)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    plot.main([str(path)])
    assert capsys.readouterr().out == f"drawn to {tmp_path / 'infonce.png'}\n"
    with pytest.raises(SystemExit):
        plot.main([str(path), "--device", "phone"])
    assert f"--device phone: {path} has rows of {long['device']}" in " ".join(capsys.readouterr().err.split())
    plot.main([str(path), "--device", long["device"]])
    with Image.open(tmp_path / "infonce.png") as picture:
        grey = picture.convert("L")
    width, height = grey.size
    edges = [(0, 0, 1, height), (width - 1, 0, width, height), (0, 0, width, 1), (0, height - 1, width, height)]
    assert [grey.crop(edge).getextrema() for edge in edges] == [(255, 255)] * 4
