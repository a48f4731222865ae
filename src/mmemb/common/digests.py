"""Every hash of this project: digests of settings, items, pairs and weights, and numbers derived from names.

| Function | What it gives | What it is for |
| --- | --- | --- |
| `digest` and those built on it | 16 hex digits (64 bits) of SHA-256 | recognising settings, data and weights |
| `bytes_digest` | 64 hex digits of SHA-256 | the integrity of files |
| `seed_of` | a number below 2**63 from SHA-256 | seeds of random draws |
| `number_of`, `batch_seed`, `coin`, `content_hash` | BLAKE2b | results and stored pools depend on these values |

A picture file counts by its folder's name and its own, not by its pixels or its absolute path. Hashing a million files
would be slow, and data that moved to another disk is still the same data. So two different pictures may share a digest:
code that must tell them apart uses `item_key`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mmemb.types import Image, Item, Page, Pair, Part, Text, pictures

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import nn

_PROBE = 8  # values read of each tensor: any training changes some of them


def digest(value: Any) -> str:
    """Digest of a value that JSON can hold; the order of a mapping's keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return bytes_digest(text.encode())[:16]


def bytes_digest(*blocks: bytes) -> str:
    """SHA-256 of the blocks joined, as 64 hex digits."""
    content = hashlib.sha256()
    for block in blocks:
        content.update(block)
    return content.hexdigest()


def seed_of(*parts: str | int) -> int:
    """A seed in [0, 2**63) from names and numbers: the same on every machine and in every process."""
    return int(digest(list(parts)), 16) >> 1


def number_of(text: str, *, size: int = 8) -> int:
    """A number in [0, 256**size) from a text (BLAKE2b): the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")


def batch_seed(seed: int, index: int) -> int:
    """Seed of the batch number ``index`` of a data stream, in [0, 2**48): a row's seed adds its place to it."""
    return number_of(f"{seed}/{index}", size=6)


def coin(seed: int, content: bytes) -> float:
    """A number in [0, 1) from a seed and bytes: equal bytes share their coin."""
    number = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(number, "little") / 2**64


def content_hash(blocks: Iterable[bytes]) -> str:
    """BLAKE2b of the blocks joined, as 32 hex digits. Pools store it as the identity of a target."""
    content = hashlib.blake2b(digest_size=16)
    for block in blocks:
        content.update(block)
    return content.hexdigest()


def item_digest(item: Item) -> str:
    """Digest of what a worker may see of an item: instruction, parts and fields."""
    return digest([item.instruction, [_part(part, _picture) for part in item.parts], dict(item.fields)])


def item_key(item: Item) -> Hashable:
    """A key that is equal for items with the same content: pictures count by their full path or their pixels.

    Paths differ between machines, so the key is never stored.
    """
    parts = tuple(tuple(_part(part, _exactly)) for part in item.parts)
    return item.instruction, parts, tuple(sorted(item.fields.items()))


def pair_digest(pair: Pair) -> str:
    """Digest of a pair: id, task, query, and the target by identity and content."""
    target = portable_id(pair.positive_id, pair.positive)
    return digest([pair.id, pair.task, item_digest(pair.query), target, item_digest(pair.positive)])


def portable_id(identity: str, target: Item) -> str:
    """A target's identity without absolute paths, so that it is the same on every disk.

    Args:
        identity: ``positive_id`` of a pair. One that the data set gives itself is returned unchanged.
        target: the item with this identity.
    """
    paths = [source for source in pictures(target) if isinstance(source, str) and not source.startswith("bundled:")]
    if paths and identity == f"image:{paths[0]}":
        return f"image:{_picture(paths[0])}"
    return f"content:{item_digest(target)}" if paths and identity.startswith("blake2:") else identity


def describe(item: Item) -> str:
    """An item in at most 100 characters, for messages: instruction, text and the name of its first picture."""
    source = next(pictures(item), "")
    words = " ".join(filter(None, (item.instruction, item.text, source if isinstance(source, str) else "<picture>")))
    return words if len(words) <= 100 else words[:97] + "..."


def module_digest(module: nn.Module) -> str:
    """Digest of a module's weights, from the first values of every tensor.

    Values are rounded to bfloat16 first, so that a checkpoint has the same digest at every precision it is loaded at.
    The random half of a fresh low-rank adapter (``lora_A``) is left out: its product with the zero half is zero.
    """
    import torch

    probes = []
    for name, tensor in module.state_dict().items():
        if "lora_A" not in name:
            values = tensor.detach().flatten()[:_PROBE].to("cpu", torch.float32).to(torch.bfloat16)
            probes.append([name, list(tensor.shape), values.tolist()])
    return digest(probes)


def _part(part: Part, named: Callable[[str | PILImage], str]) -> list[str]:
    if isinstance(part, Text):
        return ["text", part.text]
    kind = type(part).__name__.lower()
    return [kind, *map(named, [part.source] if isinstance(part, Image | Page) else part.frames)]


def _picture(source: str | PILImage) -> str:
    if isinstance(source, str):
        return source if source.startswith("bundled:") else "/".join(PurePath(source).parts[-2:])
    return bytes_digest(f"{source.mode}{source.size}".encode(), source.tobytes())[:16]


def _exactly(source: str | PILImage) -> str:
    return source if isinstance(source, str) else f"{_picture(source)} {source.getpalette()}"
