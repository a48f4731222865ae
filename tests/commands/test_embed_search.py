"""`mmemb embed` and `mmemb search` over a model of random weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmemb.inference.embedder import Embedder
from mmemb.interfaces import SetupContext
from mmemb.registry import create
from mmemb.search.exact import read_embeddings

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    pooler = create("pooler", "embed_token")
    backbone = create("backbone", "tiny", weights="random")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    return Embedder(backbone, pooler).save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three plain pictures, one in a sub-folder; the test runs beside them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, colour in (("red.png", "red"), ("blue.png", "blue"), ("more/green.png", "green")):
        Image.new("RGB", (64, 64), colour).save(folder / name)
    return folder


def embed(cli: Cli, model: Path, *words: str) -> Any:
    return cli("embed", "--checkpoint", str(model), "--output", "all.parquet", "--device", "cpu", *words)


def search(cli: Cli, model: Path, *words: str) -> Any:
    return cli("search", "--checkpoint", str(model), "--index", "all.parquet", "--device", "cpu", *words)


def test_a_folder_is_embedded_and_a_picture_finds_itself(cli: Cli, model: Path, pictures: Path) -> None:
    code, out, _ = embed(cli, model, "--input", str(pictures))
    assert code == 0
    assert out.strip().startswith("all.parquet: 3 embeddings of ")
    table = pq.read_table("all.parquet")
    assert table["id"].to_pylist() == ["blue.png", "more/green.png", "red.png"]
    assert [path for path in os.listdir() if path.endswith(".part")] == []

    code, out, _ = search(cli, model, "--image", str(pictures / "red.png"), "--reason", "never", "--top", "2")
    assert code == 0
    rows = [line.split() for line in out.split("\n")]
    assert ["1", "1.000", "red.png"] in [row[:3] for row in rows]
    assert [row[0] for row in rows if row and row[0].isdigit()] == ["1", "2"]
    assert Image.open("results.png").size[0] > 200


def test_without_a_terminal_progress_is_lines_on_standard_error(
    cli: Cli, model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEMB_PROGRESS_SECONDS", "0")
    code, out, err = embed(cli, model, "--input", str(pictures), "--part_rows", "2")
    assert code == 0
    assert len(out.splitlines()) == 1
    found = [line[9:] for line in err.splitlines() if re.match(r"\d\d:\d\d:\d\d embed", line)]
    fields = (
        r"(embed|embed: (?:think and )?encode)  (\d/\d) items  (?:-|[\d.,]+) items/s  past \S+  left \S+  [\d,]+ MB"
    )
    matches = [re.fullmatch(fields, line) for line in found]
    assert None not in matches, found
    assert [match[2] for match in matches if match and match[1] == "embed"] == ["0/3", "2/3", "3/3"]
    assert {match[2] for match in matches if match and match[1] != "embed"} == {"0/2", "2/2", "0/1", "1/1"}
    assert all(line.isprintable() for line in found)
    code, _, err = search(cli, model, "--query", "apple")
    assert code == 0
    assert "encode  1/1 items" in err


def test_a_file_of_items_is_embedded_and_searched_by_text(cli: Cli, model: Path, pictures: Path) -> None:
    rows = [{"id": "a", "text": "apple"}, {"text": "chair", "image": "red.png"}, {"text": "tiger"}]
    (pictures / "items.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, _, _ = embed(cli, model, "--input", "pictures/items.jsonl", "--limit", "2", "--batch_size", "1")
    assert code == 0
    assert pq.read_table("all.parquet")["id"].to_pylist() == ["a", "2"]
    code, out, _ = search(cli, model, "--query", "apple", "--output", "found/here.png", "--reason", "always")
    assert code == 0
    assert "found/here.png" in out
    assert Path("found/here.png").is_file()


def test_options_may_stand_in_a_file(cli: Cli, model: Path, pictures: Path) -> None:
    Path("embed.yaml").write_text(f"checkpoint: {model}\nreason: always\nbudget: 2\ndim: 8\n", encoding="utf-8")
    code, out, _ = cli("embed", "--config", "embed.yaml", "--input", "pictures", "--output", "all.parquet")
    assert code == 0
    assert "3 embeddings of 8 dimensions" in out
    assert "100% with reasoning" in out
    assert max(pq.read_table("all.parquet")["tokens"].to_pylist()) <= 4
    code, out, _ = search(cli, model, "--image", "pictures/red.png")  # the query is cut to the index's width
    assert code == 0
    assert search(cli, model, "--image", "pictures/red.png", "--reason", "always")[0] == 0


def test_an_index_of_another_checkpoint_is_refused(cli: Cli, model: Path, pictures: Path) -> None:
    backbone = create("backbone", "tiny", weights="random", seed=1)
    pooler = create("pooler", "embed_token")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    other = Embedder(backbone, pooler).save(pictures / "other")
    assert embed(cli, model, "--input", "pictures/more").code == 0
    code, _, err = search(cli, other, "--query", "apple")
    assert code == 2
    assert "all.parquet: embedded by another checkpoint of the same architecture" in err


@pytest.mark.slow
def test_two_processes_one_of_them_killed(
    cli: Cli, model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [json.dumps({"id": f"n{row}", "text": f"apple {row}"}) for row in range(120)]
    Path("items.jsonl").write_text("\n".join(texts), encoding="utf-8")
    words = ["--input", "items.jsonl", "--part_rows", "1", "--batch_size", "1"]
    command = [sys.executable, "-m", "mmemb", "embed", "--checkpoint", str(model), "--output", "all.parquet"]
    command += ["--device", "cpu", *words]
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, env={**environment, "RANK": rank}) for rank in ("0", "1")]
    parts = Path("all.parquet.parts")
    deadline = time.monotonic() + 120
    while not any(int(file.stem) % 2 for file in parts.glob("0*.parquet")):  # the second has written its first part
        assert time.monotonic() < deadline
        time.sleep(0.005)
    both[1].kill()
    assert both[0].wait(120) == 0
    assert both[1].wait(120) != 0
    assert not Path("all.parquet").exists()
    left = len(list(parts.glob("0*.parquet")))
    assert 60 < left < 120
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, out, _ = embed(cli, model, *words)
    assert code == 0
    assert f"{left - 60} from an earlier run" in out
    assert not parts.exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert embed(cli, model, *words, "--output", "whole.parquet").code == 0
    found, whole = read_embeddings("all.parquet"), read_embeddings("whole.parquet")
    assert found.ids == whole.ids == [f"n{row}" for row in range(120)]
    # Another number of threads adds in another order.
    torch.testing.assert_close(found.embeddings, whole.embeddings, atol=1e-5, rtol=0)
