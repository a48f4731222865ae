"""Tests that the inference benchmark runs, that all methods give equal embeddings, and that its rows compare them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WAYS = {"mmemb", "floor", "row_read", "row_reencode", "batch_reencode", "batch_sorted"}


def test_a_smoke_run_compares_all_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    benchmark = importlib.import_module("benchmarks.inference")
    benchmark.main(["--smoke", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "inference_smoke.jsonl").read_text().splitlines()]
    assert {(row["reason"], row["rival"]) for row in rows} == {(r, way) for r in ("always", "half") for way in WAYS}
    for row in rows:
        assert row["difference"] <= 1e-4
        assert row["ratio_to_floor"] > 0
        assert row["ratio_to_mmemb"] > 0
        assert row["thought"] == (1.0 if row["reason"] == "always" else 0.5)
    assert "ratio_to_floor" in capsys.readouterr().out
    claims = {row["claim"]: row for row in benchmark.judged(rows)}
    assert len(claims) == 8
    floor = next(row for row in rows if (row["reason"], row["rival"]) == ("half", "mmemb"))["ratio_to_floor"]
    assert claims["half: time / floor"]["holds"] == ("yes" if floor <= 1.25 else "no")
    assert claims["always: batch_reencode / ours"]["asked"] == "at least 2"
