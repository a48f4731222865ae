"""`mmemb search`: searches a file that `mmemb embed` wrote with a text, a picture or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.parser import CommandParser
from mmemb.common.terminal import table_console

_EPILOG = """examples:
  mmemb search --checkpoint runs/r1/version_0 --index photos.parquet --query "a red apple"
  mmemb search --checkpoint runs/r1/version_0 --index photos.parquet --image apple.png --top 10
  mmemb search --checkpoint runs/r1/version_0 --index scenes.parquet --image flag.png \\
      --query "which scene has this flag?" --output results.png
"""


def main(argv: Sequence[str]) -> int:
    """Embeds the query, then prints and draws the nearest items."""
    parser = CommandParser(
        prog="mmemb search",
        description="Finds the items nearest to a text, a picture or both, and draws the top results.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--checkpoint",
        type=str,
        required=True,
        help="the model that embedded the index: run, .ckpt, folder, hub id",
    )
    parser.add_argument("--index", type=str, required=True, help="a file that `mmemb embed` wrote")
    parser.add_argument("--query", type=str, help="the text to search for")
    parser.add_argument("--image", type=str, help="the picture to search for; with --query, both form one query")
    parser.add_argument("--instruction", type=str, default="", help="the task in words, as in training")
    parser.add_argument("--top", type=int, default=5, help="number of results")
    parser.add_argument(
        "--reason",
        type=Literal["never", "always", "auto"],
        default="auto",
        help="whether to reason about the query first; auto: the model decides",
    )
    parser.add_argument("--output", type=str, default="results.png", help="the picture of the results to write")
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1, ...; by default the GPU if there is one")
    options = parser.parse_args(list(argv[1:]))
    if not options.query and not options.image:
        raise UsageError('there is nothing to search for; give --query "some words", --image a.png, or both')
    if options.top < 1:
        raise UsageError(f"--top {options.top}: ask for at least one result")
    if not Path(options.index).is_file():
        raise FileNotFoundError(2, "the index does not exist; make one with `mmemb embed`", options.index)
    from mmemb.drawing.cards import draw_results
    from mmemb.inference.embedder import Embedder, as_item
    from mmemb.search.exact import read_embeddings

    parts = [Path(options.image)] if options.image else []
    parts += [options.query] if options.query else []
    query = as_item(parts, instruction=options.instruction, place="the query")
    embedder = Embedder.from_checkpoint(options.checkpoint, device=options.device, progress=True)
    index = read_embeddings(options.index, model=embedder.identity)
    width = index.embeddings.shape[1]
    # An index with fewer dimensions was cut to its first ones, so the query is cut too.
    dim = width if width < embedder.pooler.size else None
    encoded = embedder.encode([query], reason=options.reason, return_rationales=True, dim=dim)
    hits = index.search(encoded.embedding, k=options.top)[0]
    _print(hits, encoded.rationale[0])
    print(draw_results(options.output, query, [(hit.item, hit.score) for hit in hits]))
    return 0


def _print(hits: Sequence[Any], rationale: str) -> None:
    """Prints the rationale, if there is one, and a table of the results."""
    from rich.table import Table
    from rich.text import Text

    from mmemb.types import pictures

    console = table_console()
    if rationale:
        console.print(Text("rationale: ", style="dim").append(rationale, style="italic"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("cosine", justify="right")
    for heading in ("id", "text", "pictures"):
        table.add_column(heading, overflow="fold")
    for rank, hit in enumerate(hits, start=1):
        sources = " ".join(str(source) for source in pictures(hit.item))
        table.add_row(str(rank), f"{hit.score:.3f}", Text(hit.id), Text(hit.item.text), Text(sources))
    console.print(table)
