"""Bad rows and pictures through the whole of `mmemb fit`: one line, exit code 2."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

Cli = Callable[..., Any]

SETTINGS: dict[str, Any] = {
    "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    "model": {
        "backbone": {"class_path": "tiny", "init_args": {"weights": "random"}},
        "pooler": "embed_token",
        "objective": {"class_path": "mmemb.training.joint.objective.Joint", "init_args": {"chunk_size": 2}},
    },
    "data": {"batch_size": 2, "sub_batch_size": 2},
}
GOOD: dict[str, Any] = {"query": {"text": "a", "image": "good.png"}, "positive": "b"}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    Path("data").mkdir()
    data = {**SETTINGS["data"], "train": [{"path": str(tmp_path / "data" / "pairs.jsonl")}]}
    Path("a.yaml").write_text(yaml.safe_dump({**SETTINGS, "data": data}), encoding="utf-8")
    Image.new("RGB", (64, 64), "red").save("data/good.png")
    Image.new("RGB", (64, 64), "red").save("outside.png")
    Path("data/broken.png").write_bytes(Path("data/good.png").read_bytes()[:60])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0"))]
    coded = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    Path("data/bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(coded))


def rows(*content: dict[str, Any]) -> None:
    Path("data/pairs.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")


def test_good_rows_train(cli: Cli) -> None:
    rows(GOOD, {**GOOD, "positive": "c"})
    code, _, err = cli("fit", "--config", "a.yaml")
    assert code == 0, err


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([], ["pairs.jsonl"]),
        ([GOOD, {"positive": "b"}], ["pairs.jsonl, line 2", "query"]),
        ([GOOD, {"query": "a"}], ["pairs.jsonl, line 2", "positive"]),
        ([{**GOOD, "query": {"txt": "a"}}], ["pairs.jsonl, line 1", "txt"]),
        ([{**GOOD, "query": {"image": "none.png"}}], ["pairs.jsonl, line 1", "none.png"]),
        ([{**GOOD, "query": {"image": "../outside.png"}}], ["pairs.jsonl, line 1", "outside"]),
        ([{**GOOD, "query": {"image": "broken.png"}}] * 2, ["broken.png"]),
        ([{**GOOD, "query": {"image": "bomb.png"}}] * 2, ["bomb.png", "pixels"]),
    ],
)
def test_mistakes(cli: Cli, content: list[dict[str, Any]], parts: list[str]) -> None:
    rows(*content)
    code, _, err = cli("fit", "--config", "a.yaml")
    assert code == 2, err
    told = err.strip().split("\n")[-1]
    assert told.startswith("mmemb: error: ")
    for part in parts:
        assert part in told
    assert "Traceback" not in err


def test_a_mistake_met_in_a_loader_process(cli: Cli) -> None:
    rows(*[{**GOOD, "query": {"image": "broken.png"}}] * 2)
    code, _, err = cli("fit", "--config", "a.yaml", "--data.num_workers", "1")
    assert code == 2, err
    told = err.strip().split("\n")[-1]
    assert told.startswith("mmemb: error: ")
    assert "broken.png" in told


def test_a_missing_file(cli: Cli) -> None:
    code, _, err = cli("fit", "--config", "a.yaml", "--data.train", "[{path: data/none.jsonl}]")
    assert code == 2
    assert "none.jsonl" in err.strip().split("\n")[-1]
