"""`mmemb embed`: embeds the items of a file, or the pictures of a folder, and writes them to a Parquet file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.parser import CommandParser

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from mmemb.inference.corpus import Ranks, Share

_EPILOG = """Each row of the file is an item, with an optional "id": {"text": "..."}, {"image": "a.png"} or
{"instruction": "...", "parts": [...]}. A folder gives one item per picture, including those in its sub-folders.

Options may also be in YAML files (--config). A later file overrides an earlier one, and the command line overrides
both. When started by torchrun or srun, the processes share the work. To continue an interrupted run, start it again.

examples:
  mmemb embed --checkpoint runs/r1/version_0 --input photos/ --output photos.parquet
  mmemb embed --checkpoint runs/r1/version_0 --input queries.jsonl --output queries.parquet --side query
  torchrun --nproc_per_node 8 -m mmemb embed --config embed.yaml --input corpus.jsonl --output corpus.parquet
  mmemb search --checkpoint runs/r1/version_0 --index photos.parquet --query "a red apple"
"""


def _parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="mmemb embed", description="Embeds a file of items or a folder of pictures.", epilog=_EPILOG
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    parser.add_argument(
        "--checkpoint",
        type=str,
        required=True,
        help="a run's folder, one of its .ckpt files, a folder that Embedder.save wrote, or the hub id of one",
    )
    parser.add_argument("--input", type=str, required=True, help="a .jsonl, .json or .parquet file, or a folder")
    parser.add_argument("--output", type=str, required=True, help="the .parquet file to write")
    parser.add_argument(
        "--side",
        type=Literal["query", "target"],
        default="target",
        help="whether the items are queries or targets (what queries search for)",
    )
    parser.add_argument(
        "--reason",
        type=Literal["auto", "always", "never"],
        default="auto",
        help="whether to reason about items first; auto: the model decides for each query, and targets skip reasoning",
    )
    parser.add_argument(
        "--offset",
        type=float,
        help="with --reason auto: added to the logit of <think>; a lower value means less reasoning; "
        "by default the value that the run calibrated",
    )
    parser.add_argument("--budget", type=int, default=48, help="maximum number of rationale tokens per item")
    parser.add_argument("--dim", type=int, help="width of the embeddings: their first entries are kept; by default all")
    parser.add_argument("--instruction", type=str, default="", help="the task in words, for items without their own")
    parser.add_argument("--image_root", type=str, help="folder that picture paths are relative to and must stay in")
    parser.add_argument("--limit", type=int, help="maximum number of items to embed")
    parser.add_argument("--batch_size", type=int, default=64, help="number of items per forward pass")
    parser.add_argument("--part_rows", type=int, default=1024, help="items saved at a time; a stop loses at most these")
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1, ...; by default the GPU if there is one")
    return parser


def main(argv: Sequence[str]) -> int:
    """Reads the items, embeds them and writes the embeddings."""
    options = _parser().parse_args(list(argv[1:]))
    target = _target(options)
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
    _report(share, target, len(items), ranks, dim=options.dim or embedder.pooler.size, seconds=seconds)
    return 0


def _target(options: Namespace) -> Path:
    """The file to write.

    Raises:
        UsageError: it cannot be written, or an option counts from 1 and is less.
    """
    target = Path(options.output)
    if target.suffix != ".parquet":
        raise UsageError(f"--output {target}: embeddings are written as Parquet; give a name that ends in .parquet")
    if target.is_dir():
        raise UsageError(f"--output {target}: is a folder; give the name of a .parquet file")
    for name in ("budget", "batch_size", "part_rows", "limit"):
        if options[name] is not None and options[name] < 1:
            raise UsageError(f"--{name} {options[name]}: give 1 or more")
    return target


def _report(share: Share, target: Path, total: int, ranks: Ranks, *, dim: int, seconds: float) -> None:
    """Prints what this process did, and how fast."""
    details = [f"{share.embedded / max(seconds, 1e-9):.0f} per second"]
    if share.found:
        details.append(f"{share.found} from an earlier run")
    if share.thought:
        details.append(f"{share.thought / share.embedded:.0%} with reasoning")
    what = f"{dim} dimensions in {seconds:.1f} s ({', '.join(details)})"
    if share.joined:
        print(f"{target}: {total} embeddings of {what}")
    else:
        print(f"process {ranks.rank + 1} of {ranks.world_size}: {share.embedded} embeddings of {what}")


def _own_device(ranks: Ranks) -> str | None:
    """Gives each process its own GPU if several share a machine. None leaves the choice to the embedder."""
    import torch

    if ranks.world_size == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
