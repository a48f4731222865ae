"""Tests that the claims are judged by the newest rows, and that missing measurements are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claims


def row(**changes: Any) -> dict[str, Any]:
    base = {"backend": "cpu", "rival": "mmemb", "n": 8192, "width": 256, "dtype": "float32", "symmetric": False}
    base |= {"commit": "one", "device": "a CPU", "threads": 2}
    return {**base, "seconds": 1.0, "ratio_to_floor": 1.1, "extra_mb": 66.0, "tflops": 0.1, **changes}


def judged(tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    path = tmp_path / "infonce.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    status = claims.main([str(path)])
    return status, capsys.readouterr().out.splitlines()[1:]


def line(lines: list[str], text: str) -> list[str]:
    return next(each.split()[-3:] for each in lines if text in each)


def test_the_newest_row_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = judged(tmp_path, [row(ratio_to_floor=2.0), row()], capsys)
    assert status == 0
    assert line(lines, "8192 x 256 float32: time / floor") == ["1.12", "1.1", "yes"]
    assert line(lines, "16384 x 256")[-2:] == ["yet", "-"]
    assert len(lines) == len(claims.CLAIMS)


def test_the_status_is_1_if_a_bound_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = judged(tmp_path, [row(extra_mb=131.0)], capsys)
    assert status == 1
    assert line(lines, "extra MB") == ["130", "131", "no"]


def test_peers_are_compared_by_their_ratios_to_the_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = row(rival="sentence-transformers-32", ratio_to_floor=12.1, seconds=0.001)
    gone = row(rival="sentence-transformers-512", seconds=None, ratio_to_floor=None)
    _, lines = judged(tmp_path, [row(), slow, gone], capsys)
    assert line(lines, "sentence-transformers-32 /") == ["10", "11", "yes"]
    assert line(lines, "sentence-transformers-512 /")[-2:] == ["yet", "-"]


@pytest.mark.parametrize("change", [{"commit": "two"}, {"threads": 1}, {"device": "another"}, {"run": "a"}], ids=str)
def test_rows_of_different_runs_are_not_compared(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = row(rival="sentence-transformers-512", ratio_to_floor=3.3)
    _, lines = judged(tmp_path, [peer, row(**change)], capsys)
    assert line(lines, "sentence-transformers-512 /")[-2:] == ["yet", "-"]
    _, lines = judged(tmp_path, [row(ratio_to_floor=1.65), peer, row(**change)], capsys)
    assert line(lines, "sentence-transformers-512 /") == ["2", "2", "yes"]


def test_rows_of_a_named_run_are_compared_even_if_the_commit_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = row(rival="sentence-transformers-512", ratio_to_floor=3.3, run="a", commit="two")
    _, lines = judged(tmp_path, [row(run="a"), peer], capsys)
    assert line(lines, "sentence-transformers-512 /") == ["2", "3", "yes"]


def test_gpu_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"backend": "cuda", "n": 32768, "width": 1024, "dtype": "bfloat16"}
    rows = [row(**gpu, ratio_to_floor=1.6), row(**gpu, ratio_to_floor=2.0, symmetric=True)]
    peer = row(**gpu, rival="liger-kernel", ratio_to_floor=2.4)
    _, lines = judged(tmp_path, rows, capsys)
    assert line(lines, "share of the matmul rate") == ["0.7", "0.833", "yes"]
    assert line(lines, "symmetric / one direction") == ["1.5", "1.25", "yes"]
    assert line(lines, "fastest peer")[-2:] == ["yet", "-"]
    _, lines = judged(tmp_path, [*rows, peer], capsys)
    assert line(lines, "fastest peer") == ["1", "1.5", "yes"]
    faster = row(**gpu, rival="inf-cl", ratio_to_floor=1.8, symmetric=True)
    status, lines = judged(tmp_path, [*rows, peer, faster], capsys)
    assert line(lines, "fastest peer") == ["1", "0.9", "no"]
    assert status == 1
    won = [row(**gpu, ratio_to_floor=1.5, run="new"), {**peer, "run": "new"}]
    _, lines = judged(tmp_path, [*rows, peer, faster, *won], capsys)
    assert line(lines, "fastest peer") == ["1", "0.9", "no"]  # a new row of one case does not hide another case
    assert line(lines, "on one card")[-2:] == ["yet", "-"]
    _, lines = judged(tmp_path, [row(backend="cuda", n=262144, width=2048, dtype="bfloat16")], capsys)
    assert line(lines, "on one card") == ["runs", "0.1", "yes"]


def test_the_error_for_a_missing_file_names_the_command_that_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        claims.main([str(tmp_path / "none.jsonl")])
    assert "python -m benchmarks.infonce writes it" in capsys.readouterr().err


def test_rows_of_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "infonce.jsonl"
    rows = [row(device="old machine", ratio_to_floor=2.0), row(device="new machine")]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    longer = [row(device="new machine at 3 GHz", ratio_to_floor=3.0)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows + longer), encoding="utf-8")
    assert claims.main([str(path), "--device", "new machine"]) == 0
    assert claims.main([str(path), "--device", "machine at"]) == 1
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    assert claims.main([str(path), "--device", "old"]) == 1
    assert claims.main([str(path), "--device", "new"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        claims.main([str(path), "--device", "phone"])
    assert "has rows of new machine, old machine" in capsys.readouterr().err
