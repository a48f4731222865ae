"""Leak checks: does a rationale contain a part of the hidden item that reasoning alone could not have produced?

A worker sees one item of a pair. Its rationale may still contain the other item: a field of the row may describe the
target, or a hosted model may have memorised the data set. Such a rationale would teach the embedder to copy the answer.

A *short* target is no evidence of a leak: reasoning about the picture of a tiger should arrive at "tiger". Reasoning
does not arrive at a sentence of five words word for word. `LeakCheck.min_words` draws this line. Only the fields named
in `LeakCheck.target_fields` are looked for at any length.
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
"""What a check may find, in the order in which it reports them."""

# A Han or kana character counts as a word, because these scripts write no blanks between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True, kw_only=True)
class LeakCheck:
    """Flags rationales that contain parts of the item that their worker did not see.

    The flags depend on the texts alone. Case and punctuation do not count.

    - ``verbatim``: the rationale contains the hidden item's text, or a field that only the hidden item has, unchanged.
    - ``near_duplicate``: the rationale contains most of the hidden item's n-grams of words.
    - ``field``: the rationale contains the value of a field named in `target_fields`.

    A text that is also part of the shown item's own text is no leak.

    Args:
        min_words: minimum number of words of a hidden text. Reasoning can arrive at shorter ones.
        ngram: words per n-gram.
        overlap: minimum share of the hidden text's n-grams that makes a near-duplicate, in (0, 1]. N-grams that the
            shown item has too do not count.
        target_fields: names of row fields that describe the target, such as ``[answer]``. Either item of the pair may
            have them. Their values are looked for at any length.

    Raises:
        ValueError: a number is out of its range.
    """

    min_words: int = 5
    ngram: int = 3
    overlap: float = 0.8
    target_fields: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_numbers("leaks", at_least=1, ngram=self.ngram)
        check_numbers("leaks", at_least=self.ngram, min_words=self.min_words)  # a shorter text has no n-gram to compare
        check_numbers("leaks", above=0, at_most=1, overlap=self.overlap)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that determine the flags, ready for JSON. They are part of the pool's content hash."""
        return {**asdict(self), "target_fields": list(self.target_fields)}

    def flags(self, texts: Sequence[str], *, shown: Item, hidden: Item) -> list[tuple[str, ...]]:
        """Returns the flags of each text: names from `FLAGS`, or an empty tuple if the text has no leak.

        Args:
            texts: the rationales of one pair.
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
        if len(grams) < self.min_words - self.ngram + 1:  # fewer than a text of min_words words has
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
    """Returns the words of a text, case-folded and NFKC-normalised. Each Han or kana character is a word."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _holds(text: list[str], part: list[str]) -> bool:
    """Whether ``text`` contains the words of ``part`` in a row."""
    width = len(part)
    return any(text[start : start + width] == part for start in range(len(text) - width + 1) if text[start] == part[0])


def _ngrams(text: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}
