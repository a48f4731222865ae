"""Writes the tables of results in README.md and docs/, each between two markers, from `benchmarks/results/`.

    python -m tools.update_docs            rewrites the tables
    python -m tools.update_docs --check    only reports which pages are out of date (exit code 1 if one is)

The place of a table in a page is between `<!-- table: NAME -->` and `<!-- end of table -->`. The names are those of
`TABLES`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmemb.common.files import write_text
from mmemb.common.vocabulary import ROWS, SCORES, markdown_legend
from tools import r1_headline, r1_tables, result_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
XEON = "Intel(R) Xeon(R) Processor"
"""The whole name of one machine; the name of another machine begins the same and continues with its clock rate."""

TABLES: Mapping[str, Callable[[Path], str]] = {
    "rows": lambda _: "\n".join(markdown_legend(ROWS, [])),
    "scores": lambda _: "\n".join(markdown_legend([], SCORES)),
    "r1": lambda results: r1_tables.section(results / "r1_seeds.json"),
    "r1-headline": lambda results: r1_headline.lines(results / "r1_seeds.json"),
    "infonce-xeon": lambda results: result_tables.infonce(results / "infonce.jsonl", device=XEON),
    "infonce-epyc": lambda results: result_tables.infonce(results / "infonce.jsonl", device="EPYC"),
    "infonce-sizes": lambda results: result_tables.infonce_sizes(results / "infonce.jsonl", device=XEON),
    "infonce-bfloat16": lambda results: result_tables.infonce(results / "infonce.jsonl", device=XEON, dtype="bfloat16"),
    "claims-xeon": lambda results: result_tables.claims(results / "infonce.jsonl", backend="CPU", device=XEON),
    "claims-epyc": lambda results: result_tables.claims(results / "infonce.jsonl", backend="CPU", device="EPYC"),
    "claims-gpu": lambda results: result_tables.claims(results / "infonce.jsonl", backend="GPU"),
    "generate": lambda results: result_tables.generate(results / "generate.jsonl"),
    "gradcache": lambda results: result_tables.gradcache(results / "gradcache.jsonl", device="EPYC"),
    "precision": lambda results: result_tables.precision(results / "precision.jsonl"),
    "phases": lambda results: result_tables.phases(results / "phases.jsonl"),
    "inference": lambda results: result_tables.inference(results / "inference.jsonl"),
    "score": lambda results: result_tables.score(results / "score.jsonl"),
    "selection": lambda results: result_tables.selection(results / "selectors.json"),
    "selectors": lambda results: result_tables.selectors(results / "selectors.json"),
}
"""Table -> the function that makes it from the folder of results."""

_MARKED = re.compile(r"<!-- table: (?P<name>\S+) -->\n(?P<content>.*?)<!-- end of table -->", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def names(text: str) -> list[str]:
    """The names of the tables of a page.

    Raises:
        ValueError: a marker has no counterpart.
    """
    found = [match["name"] for match in _MARKED.finditer(text)]
    if not len(found) == text.count("<!-- table: ") == text.count("<!-- end of table -->"):
        raise ValueError("every `<!-- table: NAME -->` needs an `<!-- end of table -->` of its own after it")
    return found


def filled(text: str, results: Path = RESULTS) -> str:
    """The page with all its tables made from the results.

    Raises:
        ValueError: as in `names`, or a table is not in `TABLES`.
    """
    unknown = sorted(set(names(text)) - TABLES.keys())
    if unknown:
        raise ValueError(f"unknown table {', '.join(unknown)}; known tables: {', '.join(TABLES)}")
    return _MARKED.sub(
        lambda match: f"<!-- table: {match['name']} -->\n{TABLES[match['name']](results)}\n<!-- end of table -->", text
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites or checks the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/ (default: this project)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    options = parser.parse_args(argv)
    stale = 0
    for page in pages(options.root):
        old = page.read_text(encoding="utf-8")
        try:
            new = filled(old, options.results)
        except ValueError as error:
            parser.error(f"{page}: {error}")
        if new == old:
            continue
        if options.check:
            stale += 1
            print(f"{page.relative_to(options.root)} does not show the kept results: run python -m tools.update_docs")
            continue
        write_text(page, new)
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
