"""Hashes that stored pools, checkpoints and results depend on never change. One module makes all hashes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from PIL import Image as PILImage

from mmemb.common import digests
from mmemb.data.collate import identity
from mmemb.data.items import content_identity
from mmemb.types import Image, Item, Text, Video

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("seed", "index", "number"), [(0, 0, 131978767253905), (0, 1, 64207915837156), (7, 123456, 44383947885327)]
)
def test_seeds_of_batches_never_change(seed: int, index: int, number: int) -> None:
    assert digests.batch_seed(seed, index) == number


def test_numbers_and_coins_never_change() -> None:
    assert digests.number_of("task") == 14777179945760556254
    assert digests.number_of("a/1") == 12862172079206045376
    assert digests.seed_of("a", 1) == 697930202312019326
    assert digests.coin(3, b"\x01\x00") == 0.26692016724179635
    assert digests.coin(4, b"\x01\x00") != digests.coin(3, b"\x01\x00")
    assert identity("text:a") == 8256940392627914778


def test_digests_of_values_and_bytes_never_change() -> None:
    assert digests.digest({"b": [None, "é"], "a": 1}) == digests.digest({"a": 1, "b": [None, "é"]})
    assert digests.digest({"a": 1, "b": [None, "é"]}) == "0d0af69a31cfe64c"
    whole = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"
    assert digests.bytes_digest(b"ab") == digests.bytes_digest(b"a", b"b") == whole


def test_identities_of_items_never_change() -> None:
    picture = PILImage.new("RGB", (2, 2), (1, 2, 3))
    item = Item("", (Text("a"), Image("bundled:x"), Video(("b.png", "c.png")), Image(picture)))
    assert content_identity(item) == "blake2:bef905a7f584ae18a3f431630cf4daea"
    assert digests.item_digest(item) == "4f777cf76a75a6d2"


def test_no_other_module_hashes() -> None:
    files = [path for folder in ("src", "components", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {path.relative_to(ROOT).as_posix() for path in files if "hashlib" in imported(path)}
    assert found == {"src/mmemb/common/digests.py"}


def imported(path: Path) -> set[str]:
    """Returns the names of all modules that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
