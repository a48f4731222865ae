"""Tests that every method of the step benchmark gives equal gradients, and that a process that ends early is a row."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gradcache
from benchmarks.peers import INSTALL
from benchmarks.steps import Task


def test_a_smoke_run_appends_a_row_per_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["mmemb", "mmemb-kept", "plain"]
    gradcache.main(["--smoke", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path), "--ways", *ways])
    path = tmp_path / "gradcache_smoke.jsonl"
    rows = {row["rival"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    assert set(rows) == set(ways)
    for row in rows.values():
        assert (row["batch"], row["chunk"], row["note"]) == (8, 4, None)
        assert row["ratio_to_floor"] > 0
        assert row["peak_mb"] > 0
        assert row["torch"] == torch.__version__
    assert max(rows["mmemb"]["error"], rows["mmemb-kept"]["error"]) < 1e-5
    assert rows["plain"]["error"] == 0
    printed = capsys.readouterr().out
    assert "ratio_to_floor" in printed
    assert f"appended to {path}" in printed


def test_sentence_transformers_cached_loss_gives_the_same_gradients() -> None:
    pytest.importorskip("sentence_transformers")
    from benchmarks.steps import Bench

    bench = Bench(Task("sentence-transformers", 8, 4, "cpu", 1, 0.0, None))
    plain = bench.gradient("plain", 8)
    found = bench.gradient("sentence-transformers", 8)
    assert plain.norm() > 0
    assert float((found - plain).norm() / plain.norm()) < 1e-5


def test_a_missing_peer_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradcache.DISTRIBUTION, "sentence-transformers", "no-such-distribution")
    gradcache.main(["--smoke", "--output", str(tmp_path), "--ways", "sentence-transformers"])
    row = json.loads((tmp_path / "gradcache_smoke.jsonl").read_text(encoding="utf-8"))
    assert row["note"] == INSTALL
    assert row["seconds"] is None


def run(code: str, *, limit: float = 60.0, must_work: bool = False) -> dict[str, object]:
    return gradcache.outcome([sys.executable, "-c", code], limit=limit, must_work=must_work)


def test_the_row_says_how_a_process_ended() -> None:
    assert run("print('a library says something'); print('{\"seconds\": 2.5}')") == {"seconds": 2.5}
    assert run("import os; os.kill(os.getpid(), 9)")["note"] == "ended by SIGKILL, probably out of memory"
    assert run("import time; time.sleep(60)", limit=0.2)["note"] == "took more than 0.2 s (--limit)"
    assert run("raise ImportError('no such part')")["note"] == "ImportError: no such part"
    assert run("import os; os.kill(os.getpid(), 11)")["note"].startswith("ended by SIGSEGV")
    with pytest.raises(RuntimeError, match="no such part"):
        run("raise ImportError('no such part')", must_work=True)
    with pytest.raises(RuntimeError, match="failed"):
        run("import os; os.kill(os.getpid(), 11)", must_work=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_step_above_the_budget_and_every_larger_batch_are_rows_with_a_note(tmp_path: Path) -> None:
    argv = ["--batches", "32", "64", "--chunk", "32", "--ways", "plain", "--budget", "4", "--device", "cpu"]
    gradcache.main([*argv, "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "gradcache.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["note"] for row in rows] == ["does not fit in 4 MB", "not tried: 32 pairs: does not fit in 4 MB"]


def test_a_batch_is_a_multiple_of_the_chunk(capsys: pytest.CaptureFixture[str]) -> None:
    assert gradcache.parse([]).batches == [64, 256, 1024, 4096, 8192]
    with pytest.raises(SystemExit):
        gradcache.parse(["--batches", "50"])
    assert "multiple of the chunk" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gradcache.parse(["--chunk", "0"])
    assert "--chunk: 0 is below 1" in capsys.readouterr().err
