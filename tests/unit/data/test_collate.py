import subprocess
import sys

from mmemb.data.collate import candidate_layout, identity
from mmemb.types import Item, Pair, Text


def pair(target: str, *negatives: str) -> Pair:
    def item(text: str) -> Item:
        return Item("", (Text(text),))

    return Pair(f"id {target}", "task", item("q"), item(target), target, tuple(map(item, negatives)), negatives)


def test_identity_is_a_63_bit_number_and_the_same_in_every_process() -> None:
    code = "from mmemb.data.collate import identity; print(identity('text:chair'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert identity("text:chair") == int(other.stdout)
    numbers = {identity(str(number)) for number in range(2000)}
    assert len(numbers) == 2000
    assert min(numbers) >= 0
    assert 2**62 < max(numbers) < 2**63


def test_candidates_come_by_chunk_with_positives_before_hard_negatives() -> None:
    pairs = [pair("a", "x", "y"), pair("b"), pair("c", "z")]
    layout = candidate_layout(pairs, chunk_size=2)
    assert layout.candidate_id == [identity(name) for name in ("a", "b", "x", "y", "c", "z")]
    assert layout.query_id == [identity(name) for name in ("a", "b", "c")]
    assert layout.positive == [0, 1, 4]


def test_each_positive_has_the_id_of_its_query_at_any_chunk_size() -> None:
    pairs = [pair(name, "n") for name in "abcde"]
    for size in (1, 2, 5, 9):
        layout = candidate_layout(pairs, chunk_size=size)
        assert [layout.candidate_id[row] for row in layout.positive] == layout.query_id
        assert len(layout.candidate_id) == 10
