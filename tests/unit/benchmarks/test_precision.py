"""Tests that the precision benchmark compares every rival with float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import precision
from benchmarks.harness import read


def test_rows_have_the_given_mean_cosine() -> None:
    query, candidate = precision.rows(200, 128, 0.9, torch.Generator().manual_seed(1))
    assert float((query @ candidate.T).mean()) == pytest.approx(0.9, abs=0.01)


def test_a_smoke_run_measures_all_rivals(tmp_path: Path) -> None:
    assert precision.main(["--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 0
    found = read(tmp_path / "precision_smoke.jsonl")
    assert [row["rival"] for row in found] == list(precision.RIVALS)
    for row in found:
        assert 0 < row["embedding_error"] < 1e-4
        assert row["draws"] == 1


def test_a_method_that_loses_bits_has_a_larger_error() -> None:
    small = {"n": 12, "width": 8, "draws": 1, "device": "cpu"}
    single, half = (precision.measure("naive", dtype, 0.9, **small) for dtype in ("float32", "bfloat16"))
    assert half["embedding_error"] > 100 * single["embedding_error"]
