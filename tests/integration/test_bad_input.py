"""What a user may get wrong, through the real command: exit code 2, one line with place and remedy, no traceback."""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning  # noqa: F401  (its log keeps the stderr of its import: not that of one test)
import pytest
from PIL import Image

from tests.integration.small import rows, write_rows, write_settings

Cli = Callable[..., Any]
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)


@pytest.fixture
def told(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Runs ``mmemb fit`` on the small settings, which must refuse; the line it says."""

    def run(*words: str, changes: dict[str, Any] | None = None) -> str:
        code, _, err = cli("fit", *write_settings(tmp_path, changes), *words)
        assert code == 2, err
        assert "Traceback" not in err
        lines = [line for line in err.split("\n") if line.startswith("mmemb")]
        assert len(lines) == 1, err
        assert err.rstrip("\n").endswith(lines[0])  # the last thing said, and nothing hangs on to it
        return lines[0].removeprefix("mmemb: error: ")

    return run


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def line(width: int, height: int) -> bytes:
    """A PNG as narrow as that."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def without(key: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = rows()
        del content[2][key]
        write_rows(folder, content)

    return spoil


def query(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = rows()
        content[2]["query"] = {**content[2]["query"], **changes}
        write_rows(folder, content)

    return spoil


def picture(data: bytes) -> Callable[[Path], None]:
    """All pictures are broken, so that whichever comes first is."""

    def spoil(folder: Path) -> None:
        for path in (folder / "pictures").iterdir():
            path.write_bytes(data)

    return spoil


def outside(folder: Path) -> None:
    elsewhere = folder.parent / f"{folder.name}_elsewhere.png"
    (folder / "pictures" / "red.png").rename(elsewhere)
    (folder / "pictures" / "red.png").symlink_to(elsewhere)


def content(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "pairs.jsonl").write_text(text, encoding="utf-8") and None


@dataclass
class Case:
    """A mistake.

    Attributes:
        parts: what the line must contain: the place, what was expected, what to do.
        words: flags of the command.
        spoil: what is done to the data before.
    """

    parts: list[str]
    words: list[str] = field(default_factory=list)
    spoil: Callable[[Path], None] = lambda folder: None


PICTURE = ["picture ", ".png: ", "remove its row"]
CASES = {
    "unknown component": Case(
        ["model.selector: ", "no selector named 'rndom'", "did you mean 'random'?"], ["--model.selector=rndom"]
    ),
    "unknown component in a list": Case(
        ["model.pool.workers", "did you mean 'metadata'?"], ["--model.pool.workers=[metdata]"]
    ),
    "wrong argument type": Case(["data.batch_size: expected int, got 'many'"], ["--data.batch_size=many"]),
    "wrong argument type of a part": Case(
        ["model.objective", "chunk_size: expected int, got 'few'"], ["--model.objective.init_args.chunk_size=few"]
    ),
    "fewer processes than none": Case(["data.num_workers is -1; give 0 or more"], ["--data.num_workers=-1"]),
    "fewer steps than none": Case(["model.warmup_steps is -5; give 0 or more"], ["--model.warmup_steps=-5"]),
    "rate below nothing": Case(["model.optimizer: Invalid learning rate"], ["--model.optimizer.init_args.lr=-1"]),
    "source of no rows": Case(
        ["data.train, pairs.jsonl: source.limit is 0; give 1 or more"],
        ["--data.train=[{path: pairs.jsonl, limit: 0}]"],
    ),
    "file in place of sources": Case(
        ["data.train: expected a list of sources, such as [{path: pairs.jsonl}]"], ["--data.train=pairs.jsonl"]
    ),
    "batch that cannot be cut": Case(["batch_size", "sub_batch_size"], ["--data.sub_batch_size=3"]),
    "missing config": Case(["there is no config file none.yaml"], ["--config=none.yaml"]),
    "missing data": Case(["none.jsonl: ", "no such file"], ["--data.train=[{path: none.jsonl}]"]),
    "missing test data": Case(["none.jsonl: ", "no such file"], ["--data.test=[{path: none.jsonl}]"]),
    "missing pool": Case(["none: ", "pool"], ["--model.pool.path=none", "--model.pool.workers=[]"]),
    "missing model": Case(
        ["none/at/all"], ["--model.backbone=transformers", "--model.backbone.init_args.model=none/at/all"]
    ),
    "missing checkpoint": Case(["none.ckpt: --ckpt_path: there is no such file"], ["--ckpt_path=none.ckpt"]),
    "checkpoint by a word": Case(["last: --ckpt_path: there is no such file"], ["--ckpt_path=last"]),
    "unknown strategy": Case(["trainer: ", "strategy", "fast"], ["--trainer.strategy=fast"]),
    "selector without a pool": Case(["model.selector is ", "model.pool is null"], ["--model.pool=null"]),
    "controller that nothing fits": Case(
        ["model.controllers: threshold", "no data.validation"],
        ["--model.controllers=[never, threshold]", "--data.validation=[]", "--data.test=[{path: pairs.jsonl}]"],
    ),
    "one task in two test files": Case(
        ["data.test: the task 'colour' is in pairs.jsonl and in pairs.jsonl", "another name"],
        ["--data.test=[{path: pairs.jsonl}, {path: pairs.jsonl}]"],
    ),
    "missing picture": Case(
        ["pairs.jsonl, line 3", "query.image", "does not exist"], spoil=query(image="pictures/none.png")
    ),
    "broken picture": Case([*PICTURE, "cannot be read"], spoil=picture(b"no picture")),
    "broken picture in a loader process": Case(
        [*PICTURE, "cannot be read"], ["--data.num_workers=1"], spoil=picture(b"no picture")
    ),
    "picture cut short": Case([*PICTURE, "cannot be read"], spoil=picture(b"\x89PNG\r\n\x1a\n\x00\x00")),
    "picture bomb": Case(["picture ", "40000 x 2000 pixels", "shrink"], spoil=picture(bomb(40_000, 2_000))),
    "larger picture bomb": Case(["picture ", "50,000,000 pixels", "shrink"], spoil=picture(bomb(90_000, 90_000))),
    "picture of one line": Case(
        ["picture ", "1 x 400 pixels", "200 times as long", "remove its row"], spoil=picture(line(1, 400))
    ),
    "empty data set": Case(["pairs.jsonl: ", "no rows", "add rows"], spoil=content("")),
    "no data set": Case(["there is no train source", "data.train"], ["--data.train=[]"]),
    "not JSON": Case(["pairs.jsonl", "line 1", "JSON"], spoil=content("query: a\n")),
    "row without query": Case(
        ["pairs.jsonl, line 3", "field 'query': is missing", "every row needs"], spoil=without("query")
    ),
    "positive missing": Case(
        ["pairs.jsonl, line 3", "field 'positive': is missing", "every row needs"], spoil=without("positive")
    ),
    "picture outside its root": Case(
        ["pairs.jsonl, line 3", "query.image", "outside its root", "image_root"], spoil=query(image="../elsewhere.png")
    ),
    "picture outside by an absolute path": Case(["outside its root"], spoil=query(image="/etc/hostname")),
    "picture outside by a link": Case(["pictures/red.png", "outside its root"], spoil=outside),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_mistake_is_one_line(told: Callable[..., str], tmp_path: Path, case: Case) -> None:
    case.spoil(tmp_path)
    line = told(*case.words)
    for part in case.parts:
        assert part in line
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_checkpoint_of_another_backbone(told: Callable[..., str], cli: Cli, tmp_path: Path) -> None:
    assert cli("fit", *write_settings(tmp_path), "--evaluate=false").code == 0
    path = "runs/r1+small/version_0/checkpoints/last.ckpt"
    narrow = {"text_config": {"num_hidden_layers": 2}}
    folder = Path(__import__("mmemb.components.backbones.tiny", fromlist=["FOLDER"]).FOLDER)
    other = {"model": str(folder), "weights": "random", "config_overrides": narrow}
    changes = {"model": {"backbone": {"class_path": "transformers", "init_args": other}}}
    line = told("--ckpt_path", path, changes=changes)
    assert line.count("tiny@") == 2  # both identities
    assert "backbone" in line
    assert "--ckpt_path" in line or "checkpoint" in line


def test_a_checkpoint_of_another_pooler(told: Callable[..., str], cli: Cli) -> None:
    assert cli("fit", *write_settings(Path.cwd()), "--evaluate=false", "--trainer.max_steps=1").code == 0
    path = "runs/r1+small/version_0/checkpoints/last.ckpt"
    line = told("--ckpt_path", path, "--model.pooler=attention")
    for part in ("the checkpoint does not fit the settings", "pooler.query", "config.yaml in its run folder"):
        assert part in line


def test_an_evaluation_without_a_checkpoint_says_so(cli: Cli) -> None:
    with pytest.warns(UserWarning, match="no --ckpt_path was given: `mmemb test` uses the untrained model"):
        assert cli("test", *write_settings(Path.cwd())).code == 0


def test_a_disk_that_fills_up_leaves_no_half_checkpoint(
    told: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mmemb.common.checkpoint.os.fsync", full)
    line = told("--evaluate=false")
    assert "cannot write the checkpoint" in line
    assert "last.ckpt: No space left on device; no partial file is left; free some space" in line
    folder = tmp_path / "runs" / "r1+small" / "version_0" / "checkpoints"
    assert not folder.exists() or list(folder.iterdir()) == []


def test_the_settings_that_the_mistakes_are_made_in_work(cli: Cli, tmp_path: Path) -> None:
    assert cli("fit", *write_settings(tmp_path), "--evaluate=false", "--trainer.max_steps=1").code == 0
