"""`mmemb embed`: items of a file, or the pictures of a folder, to a Parquet file of embeddings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.parser import CommandParser

if TYPE_CHECKING:
    from mmemb.inference.corpus import Ranks

_EPILOG = """A row of the file is an item, with an optional "id": {"text": "..."}, {"image": "a.png"} or
{"instruction": "...", "parts": [...]}. A folder gives one item a picture, sub-folders included.

Options may stand in YAML files, too (--config, later ones and the command line win). Started by torchrun or srun, the
processes share the work. A run that was interrupted goes on when it is started again.

examples:
  mmemb embed --checkpoint runs/r1/version_0 --input photos/ --output photos.parquet
  mmemb embed --checkpoint runs/r1/version_0 --input queries.jsonl --output queries.parquet --side query
  torchrun --nproc_per_node 8 -m mmemb embed --config embed.yaml --input corpus.jsonl --output corpus.parquet
  mmemb search --checkpoint runs/r1/version_0 --index photos.parquet --query "a red apple"
"""


def main(argv: Sequence[str]) -> int:
    """Reads, embeds, writes."""
    parser = CommandParser(
        prog="mmemb embed", description="Embeds a file of items or a folder of pictures.", epilog=_EPILOG
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    parser.add_argument(
        "--checkpoint",
        type=str,
        required=True,
        help="a run's folder, a .ckpt of it, a folder of Embedder.save, or its hub id",
    )
    parser.add_argument("--input", type=str, required=True, help="a .jsonl, .json or .parquet file, or a folder")
    parser.add_argument("--output", type=str, required=True, help="the .parquet file to write")
    parser.add_argument(
        "--side",
        type=Literal["query", "target"],
        default="target",
        help="what the items are: queries, or what they look for",
    )
    parser.add_argument(
        "--reason",
        type=Literal["auto", "always", "never"],
        default="auto",
        help="whether items are thought about first; auto: queries as the model decides, targets never",
    )
    parser.add_argument(
        "--offset",
        type=float,
        help="auto: added to the logit of <think>, the dial; lower thinks less; by default as the run calibrated it",
    )
    parser.add_argument("--budget", type=int, default=48, help="most rationale tokens of an item")
    parser.add_argument("--dim", type=int, help="width of the embeddings, their first entries; by default all")
    parser.add_argument("--instruction", type=str, default="", help="the task in words, for items without their own")
    parser.add_argument("--image_root", type=str, help="folder that picture paths are relative to and may not leave")
    parser.add_argument("--limit", type=int, help="embed at most this many")
    parser.add_argument("--batch_size", type=int, default=64, help="rows of one forward pass")
    parser.add_argument("--part_rows", type=int, default=1024, help="rows between two safe states of a run")
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1, ...; by default the GPU if there is one")
    options = parser.parse_args(list(argv[1:]))
    target = Path(options.output)
    if target.suffix != ".parquet":
        raise UsageError(f"--output {target}: embeddings are written as Parquet; give a name that ends in .parquet")
    if target.is_dir():
        raise UsageError(f"--output {target}: is a folder; name a file in it, or another one")
    for name in ("budget", "batch_size", "part_rows", "limit"):
        if options[name] is not None and options[name] < 1:
            raise UsageError(f"--{name} {options[name]}: it counts from 1")
    from dataclasses import replace

    from mmemb.data.items import read_items

    items = read_items(options.input, image_root=options.image_root, limit=options.limit)
    if options.instruction:
        items = [item if item.instruction else replace(item, instruction=options.instruction) for item in items]
    from mmemb.inference.corpus import Ranks, embed_to_parquet
    from mmemb.inference.embedder import Embedder
    from mmemb.registry import create

    ranks = Ranks.from_environment()
    embedder = Embedder.from_checkpoint(
        options.checkpoint,
        device=options.device or _own_device(ranks),
        batch_size=options.batch_size,
        budget=options.budget,
        progress=True,
    )
    settings = {name: options[name] for name in ("side", "reason", "dim")}
    if options.offset is not None:
        embedder.controller = create("controller", "rl", offset=options.offset)
    started = time.monotonic()
    share = embed_to_parquet(embedder, items, target, ranks=ranks, part_rows=options.part_rows, options=settings)
    seconds = time.monotonic() - started
    details = [f"{share.embedded / max(seconds, 1e-9):.0f} a second"]
    if share.found:
        details.append(f"{share.found} were there from an earlier run")
    if share.thought:
        details.append(f"{share.thought / share.embedded:.0%} thought about")
    what = f"{options.dim or embedder.pooler.size} dimensions in {seconds:.1f} s ({', '.join(details)})"
    if share.joined:
        print(f"{target}: {len(items)} embeddings of {what}")
    else:
        print(f"process {ranks.rank + 1} of {ranks.world_size}: {share.embedded} embeddings of {what}")
    return 0


def _own_device(ranks: Ranks) -> str | None:
    """One GPU a process where several share a machine; None leaves the choice to the embedder."""
    import torch

    if ranks.world_size == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
