"""`mmemb embed`: items of a file, or the pictures of a folder, to a Parquet file of embeddings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmemb.commands.errors import UsageError
from mmemb.commands.parser import CommandParser

_EPILOG = """A row of the file is an item, with an optional "id": {"text": "..."}, {"image": "a.png"} or
{"instruction": "...", "parts": [...]}. A folder gives one item a picture, sub-folders included.

examples:
  mmemb embed --checkpoint runs/r1/version_0 --input photos/ --output photos.parquet
  mmemb embed --checkpoint runs/r1/version_0 --input queries.jsonl --output queries.parquet --reason auto
  mmemb search --checkpoint runs/r1/version_0 --index photos.parquet --query "a red apple"
"""


def main(argv: Sequence[str]) -> int:
    """Reads, embeds, writes."""
    parser = CommandParser(
        prog="mmemb embed", description="Embeds a file of items or a folder of pictures.", epilog=_EPILOG
    )
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="a run's folder, a .ckpt of it, or a folder of Embedder.save"
    )
    parser.add_argument("--input", type=str, required=True, help="a .jsonl, .json or .parquet file, or a folder")
    parser.add_argument("--output", type=str, required=True, help="the .parquet file to write")
    parser.add_argument(
        "--reason",
        type=Literal["never", "always", "auto"],
        default="never",
        help="whether items are thought about first; what is searched usually is not",
    )
    parser.add_argument("--image_root", type=str, help="folder that picture paths are relative to and may not leave")
    parser.add_argument("--limit", type=int, help="embed at most this many")
    parser.add_argument("--batch_size", type=int, default=64, help="rows of one forward pass")
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1, ...; by default the GPU if there is one")
    options = parser.parse_args(list(argv[1:]))
    target = Path(options.output)
    if target.suffix != ".parquet":
        raise UsageError(f"--output {target}: embeddings are written as Parquet; give a name that ends in .parquet")
    from mmemb.data.records import read_items

    items = read_items(options.input, image_root=options.image_root, limit=options.limit)
    from mmemb.inference.embedder import Embedder
    from mmemb.inference.index import write_embeddings

    embedder = Embedder.from_checkpoint(
        options.checkpoint, device=options.device, batch_size=options.batch_size, progress=True
    )
    started = time.monotonic()
    encoded = embedder.encode(items, options.reason)
    write_embeddings(target, items, encoded, model=embedder.backbone.identity)
    seconds = time.monotonic() - started
    thought = f", {encoded.thought.float().mean().item():.0%} thought about" if options.reason != "never" else ""
    print(
        f"{target}: {len(items)} embeddings of {encoded.embedding.shape[1]} dimensions in {seconds:.1f} s "
        f"({len(items) / max(seconds, 1e-9):.0f} a second){thought}"
    )
    return 0
