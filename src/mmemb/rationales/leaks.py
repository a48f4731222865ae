"""Leak checks: does a rationale hold something of the other side that it could not have come to by itself?

A worker sees one item of a pair. What it writes may still hold the other: a field of the row that describes the target,
a hosted model that knows the data set by heart. Such a rationale would teach the embedder to read the answer off.

A *short* target is no evidence: "tiger" under the picture of a tiger is what thinking should arrive at. A sentence of
five words is not hit upon word for word. Hence `LeakCheck.min_words`; only fields that are named as the target's own
count at any length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmemb.common.checks import check_numbers
from mmemb.types import Item

FLAGS = ("verbatim", "near_duplicate", "field")
"""What a check may find, in the order in which it is reported."""

# A Han or kana character stands for a word: those scripts write no blanks between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True, kw_only=True)
class LeakCheck:
    """Flags rationales that hold what they were not shown. A pure function of texts; case and punctuation do not count.

    - ``verbatim``: the hidden item's text, or a field that only the hidden item has, stands in the rationale as it is.
    - ``near_duplicate``: the rationale holds most of the hidden item's n-grams of words.
    - ``field``: the value of a field named in `target_fields` stands in the rationale.

    What the shown item's own text says too is no leak.

    Args:
        min_words: a hidden text of fewer words is never looked for: a short answer can be come to by thinking.
        ngram: words of an n-gram.
        overlap: share of the hidden text's n-grams (those that the shown item lacks) that makes a near-duplicate.
        target_fields: names of row fields that describe the other side, as in ``[answer]``, on whichever side they
            stand; their values are looked for whatever their length.

    Raises:
        ValueError: a number makes no sense.
    """

    min_words: int = 5
    ngram: int = 3
    overlap: float = 0.8
    target_fields: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_numbers("leaks", at_least=1, ngram=self.ngram)
        check_numbers("leaks", at_least=self.ngram, min_words=self.min_words)  # else a text has no n-gram to compare
        check_numbers("leaks", above=0, at_most=1, overlap=self.overlap)

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the flags, JSON-ready: part of the pool's content hash."""
        return {**asdict(self), "target_fields": list(self.target_fields)}

    def flags(self, texts: Sequence[str], *, shown: Item, hidden: Item) -> list[tuple[str, ...]]:
        """What each text holds of the hidden item: names out of `FLAGS`, empty for a clean one.

        Args:
            texts: rationales of one pair.
            shown: the item that the worker saw.
            hidden: the pair's other item.
        """
        known = words(f"{shown.instruction} {shown.text}")
        secrets = [words(hidden.text)]
        secrets += [words(value) for name, value in hidden.fields.items() if name not in shown.fields]
        secrets = [secret for secret in secrets if len(secret) >= self.min_words and not _holds(known, secret)]
        named = [
            words(item.fields[name]) for name in self.target_fields for item in (shown, hidden) if name in item.fields
        ]
        named = [value for value in named if value and not _holds(known, value)]
        grams = _ngrams(words(hidden.text), self.ngram) - _ngrams(known, self.ngram)
        if len(grams) < self.min_words - self.ngram + 1:  # fewer than the shortest text that is looked for has
            grams = set()
        return [self._of_text(words(text), secrets, named, grams) for text in texts]

    def _of_text(
        self,
        text: list[str],
        secrets: list[list[str]],
        named: list[list[str]],
        grams: set[tuple[str, ...]],
    ) -> tuple[str, ...]:
        shared = len(grams & _ngrams(text, self.ngram))
        found = {
            "verbatim": any(_holds(text, secret) for secret in secrets),
            "near_duplicate": bool(grams) and shared >= self.overlap * len(grams),
            "field": any(_holds(text, value) for value in named),
        }
        return tuple(flag for flag in FLAGS if found[flag])


def words(text: str) -> list[str]:
    """The words of a text, case-folded and in compatibility form; of Han and kana, the characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _holds(text: list[str], part: list[str]) -> bool:
    """Whether a run of words stands in another as it is."""
    width = len(part)
    return any(text[start : start + width] == part for start in range(len(text) - width + 1) if text[start] == part[0])


def _ngrams(text: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}
