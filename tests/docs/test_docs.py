"""Runs the examples of the documentation, so that a page cannot promise what the code does not do.

A block is tested if the line above it says so: ``<!-- test: run -->``. After the colon there may be:

    run              runs a bash block (`mmemb` is on the path) or a python block in a separate process; must succeed
    exit=N           the exit code must be N
    shows="text"     the output of the block must contain the text
    file=path        only writes a block of any language to the path (``~`` is the page's own home)
    pairs            reads a jsonl block as pairs
    json             parses a json block

The blocks of a page share one folder, in which they run in order. The folder represents the root of a clone with
`recipes/` and `benchmarks/`. It is also the home folder, and has a folder `pictures` with a few PNGs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- test: (?P<how>.*?) -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")
PICTURES = ("cat", "beach", "market", "chair")


@dataclass(frozen=True)
class Block:
    """A code block and how to test it."""

    language: str
    code: str
    words: frozenset[str]
    options: dict[str, str]
    line: int


def blocks(text: str) -> Iterator[Block]:
    """The tested blocks of a page in order."""
    for match in BLOCK.finditer(text):
        words = shlex.split(match["how"])
        options = dict(word.split("=", 1) for word in words if "=" in word)
        plain = frozenset(word for word in words if "=" not in word)
        line = text.count("\n", 0, match.start()) + 2
        yield Block(match["language"], match["code"], plain, options, line)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the programs `mmemb` and `python`; on Linux they share one start-up to save time."""
    if sys.platform != "linux":
        yield Path(sys.executable).parent
        return
    with warm.commands(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture
def clone(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that represents both the root of a clone and the home folder."""
    from PIL import Image

    for folder in ("recipes", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(PICTURES):
        Image.new("RGB", (64, 64), (60 * number, 120, 200 - 60 * number)).save(tmp_path / "pictures" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def run_block(block: Block, clone: Path) -> None:
    """Tests a block as its comment says; fails if the page is wrong."""
    if "file" in block.options:
        path = Path(block.options["file"]).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.code, encoding="utf-8")
    elif block.language in ("bash", "python"):
        # Python runs in a separate process too, since a page's components must not stay registered for other tests.
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else ["python", "-c"]
        done = subprocess.run([*command, block.code], cwd=clone, capture_output=True, text=True, check=False)
        printed = done.stdout + done.stderr
        assert done.returncode == int(block.options.get("exit", 0)), f"line {block.line}:\n{printed[-3000:]}"
        assert block.options.get("shows", "") in printed, f"line {block.line}:\n{printed[-3000:]}"
    elif "pairs" in block.words:
        from mmemb.data.pairs import read_pairs
        from mmemb.data.sources import Source

        path = clone / f"pairs_{block.line}.jsonl"
        path.write_text(block.code, encoding="utf-8")
        assert len(read_pairs(Source(path=str(path)))) == len(block.code.splitlines())
    elif "json" in block.words:
        json.loads(block.code)
    else:
        raise AssertionError(f"line {block.line}: there is no test for a {block.language} block with these options")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_work(page: Path, clone: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        run_block(block, clone)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_shell_and_python_block_is_tested_or_says_why_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    marked = {match.start("code") for match in BLOCK.finditer(text)}
    loose = [
        text.count("\n", 0, match.start()) + 1
        for match in re.finditer(r"^(?P<above>.*)\n```(bash|python)\n", text, re.MULTILINE)
        if match.end() not in marked and not match["above"].startswith("<!-- not tested: ")
    ]
    assert loose == []


def test_a_wrong_example_fails(clone: Path) -> None:
    page = '<!-- test: run shows="7" -->\n```python\nprint(3 + 3)\n```\n\n<!-- test: exit=2 -->\n```bash\ntrue\n```\n'
    python, bash = blocks(page)
    with pytest.raises(AssertionError):
        run_block(python, clone)
    with pytest.raises(AssertionError):
        run_block(bash, clone)


def test_tables_of_results_are_those_of_the_files() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.update_docs", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
