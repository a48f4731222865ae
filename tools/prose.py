"""Checks the English of the documentation: phrases that we do not use, and sentences that are too long.

    python tools/prose.py                            README.md, CONTRIBUTING.md, CHANGELOG.md and docs/*.md
    python tools/prose.py --code                     also the docstrings, comments and strings of src/ and components/
    python tools/prose.py --code src/mmemb/losses    also those of the given folders only

Prints ``file:line: reason`` for each finding; exit code 1 if there is one. Code, HTML comments and generated tables do
not count. A list item and a table cell are sentences like any other.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 30
"""Maximum number of words in a sentence."""
LOGS = {"lab_notes.md"}
"""Pages that are not checked, because the dated entries of a log are not changed."""

_COUNTED = (
    r"tokens?|(?:milli)?seconds|minutes|bytes|steps|rows|queries|candidates|samples|rollouts|passes|negatives|one"
)
_COUNTED += r"|rationales|texts|pictures|numbers?|lines?|columns?|values?|vectors?|embeddings|tables?"
_UNIT = "query|row|step|task|pair|token|item|batch|call|run|process|page|candidate|rollout|mode|seed|chunk|file|second"
PHRASES = {
    r"anew|afresh": "again, or regenerate",
    r"beside": "next to, or with",
    r"(?:is|are|was|were|be|been) told": "reports, or raises",
    r"(?:go|goes|going|gone|went) on(?! top)": "continue",
    r"(?:stands?|stood) in(?! for)": "is in",
    r"(?:nobody|everybody|everyone|who|those|none) (?:thinks?|thought)": "queries that reason, or skip reasoning",
    r"(?:is|are|was|were|be|been) (?:not |never )?thought about": "reason about",
    rf"(?:{_COUNTED}) an? (?:{_UNIT})": "per, as in 'tokens per query'",
    r"pairs a (?:step|second|task|batch)": "per, as in 'pairs per step'",
    r"(?:(?<=[:;,|(])|(?<=\A))\s*most (?:rationale )?(?:tokens|bytes|candidates|rows|pixels|words)": "maximum",
    r"above a coin": "gain over random routing",
    r"\[[ASD]\](?!\()": "what the marker means, or nothing",
}
"""Pattern of a phrase -> what to write instead. A blank matches any white space, so a phrase may cross lines."""

_WORDS = {re.compile(rf"(?<![\w-])(?:{each})(?![\w-])".replace(" ", r"\s+"), re.I): PHRASES[each] for each in PHRASES}
_NO_PROSE = re.compile(r"^<!-- table: .*?<!-- end of table -->|^(?P<fence>```+).*?^(?P=fence)|<!--.*?-->", re.S | re.M)
_CODE = re.compile(r"``.+?``|`[^`]*`", re.S)
_LINK = re.compile(r"!?\[(?P<text>[^\]]*)\]\([^)]*\)")
_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bet al)(?<!\bvs)(?<!\bDr)[.!?][\"')\]*_]*(?=\s|\Z)")
_LIST_OR_HEADING = re.compile(r"^\s*(?:[-*+]|\d+\.|#+|>)\s+")


class Finding(NamedTuple):
    """A line and what is wrong there."""

    line: int
    reason: str


def _blank(match: re.Match[str]) -> str:
    """Replaces a match by its line ends, so that lines keep their numbers."""
    return "\n" * match.group().count("\n")


def _pieces(page: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each paragraph, heading, list item and table cell."""
    text = _CODE.sub(lambda match: "X" + _blank(match), _NO_PROSE.sub(_blank, page))
    text = _LINK.sub(lambda match: match["text"], text)
    first, piece = 1, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        starts, table = _LIST_OR_HEADING.match(line), line.lstrip().startswith("|")
        if piece and (not line.strip() or starts or table):
            yield first, piece
            piece = ""
        if table:
            yield from ((number, cell.strip()) for cell in line.split("|") if cell.strip())
        elif line.strip() and (piece or starts or not line.startswith("    ")):  # not an indented code block
            first, piece = (first, f"{piece}\n{line}") if piece else (number, line[starts.end() :] if starts else line)


def phrases(text: str, first: int = 1) -> Iterator[Finding]:
    """Finds the phrases in a text that we do not use; ``first`` is the line where the text starts."""
    for pattern, better in _WORDS.items():
        for match in pattern.finditer(text):
            found = " ".join(match.group().split())
            yield Finding(first + text.count("\n", 0, match.start()), f"{found!r}: write {better}")


def check_page(page: str) -> list[Finding]:
    """Finds phrases and long sentences in a Markdown page, in the order of its lines."""
    found: list[Finding] = []
    for first, piece in _pieces(page):
        found += phrases(piece, first)
        start = 0
        for end in [*(match.end() for match in _END.finditer(piece)), len(piece)]:
            count = sum(any(map(str.isalnum, word)) for word in piece[start:end].split())
            if count > LONGEST:
                line = first + piece.count("\n", 0, end - len(piece[start:end].lstrip()))
                found.append(Finding(line, f"a sentence of {count} words: split it, {LONGEST} at most"))
            start = end
    return sorted(found)


def check_code(source: str) -> list[Finding]:
    """Finds the phrases in the docstrings, comments and strings of a Python file, in the order of its lines."""
    texts: list[tuple[int, str]] = []
    tree = ast.parse(source)
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in formatted for part in ast.walk(node)} - {id(node) for node in formatted}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            texts.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            texts.append((node.lineno, node.value))
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comment, number = token.string.lstrip("# "), token.start[0]
            joined = last == number - 1
            texts.append((texts[-1][0], f"{texts.pop()[1]}\n{comment}") if joined else (number, comment))
            last = number
    return sorted({finding for line, text in texts for finding in phrases(_CODE.sub("X", text), line)})


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--code", nargs="*", metavar="PATH", help="also check these Python files or folders (default: all)"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the project's folder (default: this project)")
    options = parser.parse_args(argv)
    root: Path = options.root
    pages = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(root.glob("docs/*.md"))
    rooms = [] if options.code is None else [root / name for name in options.code or ("src/mmemb", "components")]
    modules = [file for room in rooms for file in (sorted(room.rglob("*.py")) if room.is_dir() else [room])]
    found = [(page, check_page(page.read_text(encoding="utf-8"))) for page in pages if page.name not in LOGS]
    found += [(module, check_code(module.read_text(encoding="utf-8"))) for module in modules]
    for path, findings in found:
        for finding in findings:
            print(f"{path.relative_to(root)}:{finding.line}: {finding.reason}")
    return int(any(findings for _, findings in found))


if __name__ == "__main__":
    sys.exit(main())
