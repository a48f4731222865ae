"""Tests that every rival computes the same loss, and that rows say why a case was not measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import infonce, peers
from benchmarks.infonce import Case, Course

HERE = [rival for rival in peers.RIVALS if rival.module is None and not rival.cuda]
SENTENCE_TRANSFORMERS = [rival for rival in peers.RIVALS if rival.module == "sentence_transformers"]
MMEMB, NAIVE = peers.RIVALS[0], peers.RIVALS[1]


def course(**changes: float) -> Course:
    return Course(**{"device": "cpu", "repeats": 2, "seconds": 0.0, "limit": 60.0} | changes)  # type: ignore[arg-type]


def answers_the_same(rival: peers.Rival) -> None:
    """Checks a rival with odd sizes, so that mini-batches of 32 leave a remainder."""
    for symmetric in (False, True) if rival.both else (False,):
        query, candidate = Case(70, 9, "float32", symmetric).embeddings("cpu")
        # Not of unit length, so that normalising changes the result.
        assert peers.error(rival, query * 1.5, candidate, symmetric=symmetric) < 1e-5


@pytest.mark.parametrize("rival", HERE, ids=lambda rival: rival.name)
def test_rivals_compute_the_same_loss_and_gradients(rival: peers.Rival) -> None:
    answers_the_same(rival)


def test_sentence_transformers_computes_the_same_loss_and_gradients() -> None:
    pytest.importorskip("sentence_transformers")
    for rival in SENTENCE_TRANSFORMERS:
        answers_the_same(rival)


@pytest.mark.gpu
@pytest.mark.parametrize("rival", [rival for rival in peers.RIVALS if rival.cuda], ids=lambda rival: rival.name)
def test_gpu_rivals_compute_the_same_loss_and_gradients(rival: peers.Rival) -> None:
    if not rival.installed:
        pytest.skip(peers.INSTALL)
    for symmetric in (False, True):
        query, candidate = Case(512, 256, "bfloat16", symmetric).embeddings("cuda")
        assert peers.error(rival, query, candidate, symmetric=symmetric) < 3e-2


def test_error_is_large_for_a_wrong_gradient() -> None:
    def make(query: Tensor, candidate: Tensor, symmetric: bool) -> peers.Call:
        answer = NAIVE.make(query, candidate, symmetric)()
        return lambda: answer._replace(candidate=[answer.candidate[0] * 1.01])

    query, candidate = Case(20, 4, "float32", False).embeddings("cpu")
    assert peers.error(replace(NAIVE, make=make), query, candidate, symmetric=False) == pytest.approx(0.01, rel=1e-3)


def test_the_row_of_a_rival_that_cannot_run_on_the_device_says_why(tmp_path: Path) -> None:
    infonce.main(["--smoke", "--device", "cpu", "--output", str(tmp_path), "--rivals", "torch.compile"])
    rows = [json.loads(line) for line in (tmp_path / "infonce_smoke.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["note"] for row in rows} <= {"needs a GPU", peers.INSTALL}


def test_a_smoke_run_appends_a_row_per_rival_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [rival.name for rival in HERE]
    argv = ["--smoke", "--device", "cpu", "--output", str(tmp_path), "--rivals", *names]
    infonce.main(argv)
    path = tmp_path / "infonce_smoke.jsonl"
    once = path.read_text(encoding="utf-8").splitlines()
    infonce.main([*argv, "--dtypes", "float32", "--directions", "one"])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(once) == len(names) * 4
    assert len(rows) == len(once) + len(names)
    assert {row["rival"] for row in rows} == set(names)
    for row in rows:
        if row["symmetric"] and row["rival"] == "gradcache-loss":
            assert row["note"] == "one direction only"
            assert row["seconds"] is None
            continue
        assert row["note"] is None
        assert row["ratio_to_floor"] > 0
        assert row["tflops"] > 0
        assert row["extra_mb"] > 0
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 2e-2)
        assert row["torch"] == torch.__version__
        assert row["device"]
        assert row["commit"]
    with Image.open(tmp_path / "infonce_smoke.png") as picture:
        assert picture.format == "PNG"
    printed = capsys.readouterr().out
    assert "ratio_to_floor" in printed
    assert f"appended to {path}" in printed


def test_memory_does_not_include_the_gradients() -> None:
    case = Case(512, 8, "float32", False)
    naive = course().measure(NAIVE, case)
    # At least two of three 512 x 512 matrices exist at once: logits, their log-softmax and the gradient.
    assert 2 * 512**2 * 4e-6 < naive["extra_mb"] < 6 * 512**2 * 4e-6


def test_errors_are_those_of_the_cases_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infonce, "CHECKED", 8)
    seen: list[tuple[Tensor, Tensor]] = []

    def make(query: Tensor, candidate: Tensor, symmetric: bool) -> peers.Call:
        seen.append((query, candidate))
        return NAIVE.make(query, candidate, symmetric)

    course().measure(replace(NAIVE, make=make), Case(20, 4, "float32", False))
    few, whole = seen
    for part, rows in zip(few, whole, strict=True):
        assert torch.equal(part, rows[:8])


def test_a_compiled_rival_stays_compiled_from_case_to_case(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only dynamo is tested, without a C++ compiler, since the limit is that of dynamo.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    (compiled,) = [rival for rival in peers.RIVALS if rival.name == "torch.compile"]
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for n in (3, 4, 5):
            compiled.make(torch.randn(n, 2), torch.randn(n, 2), False)()


def test_a_missing_peer_is_a_row() -> None:
    missing = replace(NAIVE, name="missing", module="no_such_module", distribution="no-such-distribution")
    row = course().measure(missing, Case(8, 4, "float32", False))
    assert row["note"] == "not installed (pip install -e .[bench])"
    assert row["seconds"] is None


def test_a_failing_peer_is_a_row_and_our_own_failure_is_not() -> None:
    def fails(query: Tensor, candidate: Tensor, symmetric: bool) -> peers.Call:
        raise TypeError("bfloat16 only\nand more")

    case = Case(8, 4, "float32", False)
    assert course().measure(replace(NAIVE, make=fails), case)["note"] == "TypeError: bfloat16 only"
    with pytest.raises(TypeError):
        course().measure(replace(MMEMB, make=fails), case)


def test_cases_that_do_not_fit_or_take_too_long_are_not_tried() -> None:
    huge = Case(10_000_000, 1, "float32", False)
    assert "MB are free" in course().measure(NAIVE, huge)["note"]
    slow = course(limit=1e-6)
    assert slow.measure(MMEMB, Case(64, 16, "float32", False))["seconds"] > 0
    assert "--limit 1e-06" in slow.measure(MMEMB, Case(128, 16, "float32", False))["note"]
    # Nothing is known yet about the other dtype.
    assert slow.measure(MMEMB, Case(64, 16, "bfloat16", False))["seconds"] > 0


def test_the_floor_is_the_three_products() -> None:
    query, candidate = Case(10, 3, "float32", False).embeddings("cpu")
    run = infonce.floor(query, candidate, rows=4)
    run()
    cells = dict(zip(run.__code__.co_freevars, (cell.cell_contents for cell in run.__closure__), strict=True))
    logits = query @ candidate.T
    torch.testing.assert_close(cells["query_grad"], logits @ candidate)
    torch.testing.assert_close(cells["candidate_grad"], logits.T @ query)


def test_options_select_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    options = infonce.parse(["--cases", "64x32", "16x8", "--dtypes", "float32", "--directions", "one"])
    assert infonce.cases(options) == [Case(16, 8, "float32", False), Case(64, 32, "float32", False)]
    full = infonce.cases(infonce.parse(["--full"]))
    assert len(full) == 6 * 3 * 2 * 2
    assert {case.n for case in full} == {2048, 4096, 8192, 16384, 32768, 65536}
    with pytest.raises(SystemExit):
        infonce.parse(["--cases", "8192"])
    assert "NxD" in capsys.readouterr().err
