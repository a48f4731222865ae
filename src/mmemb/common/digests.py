"""Short content hashes: of settings, items, pairs and weights. What made a pool is recognised by them.

A digest is 16 hex digits (64 bits) of SHA-256. A picture file counts by its folder's and its own name, not by its
pixels or its absolute path: hashing a million files would cost more than it tells, and data that moved to another disk
is the same data. Two pictures of one run may share a digest so: what must tell them apart asks for `item_key`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mmemb.types import Image, Item, Page, Pair, Part, Text, pictures

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from torch import nn

_PROBE = 8  # values looked at in each tensor: any training moves some of them


def digest(value: Any) -> str:
    """The digest of anything JSON can say; the order of a mapping's keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def seed_of(*parts: str | int) -> int:
    """A seed in [0, 2**63) derived from names and numbers: the same on every machine and in every process."""
    return int(digest(list(parts)), 16) >> 1


def item_digest(item: Item) -> str:
    """The digest of what a worker may see of an item: instruction, parts and fields."""
    return digest([item.instruction, [_part(part, _picture) for part in item.parts], dict(item.fields)])


def item_key(item: Item) -> Hashable:
    """Equal for items that show the same, pictures by their full path or pixels: holds on this machine alone."""
    parts = tuple(tuple(_part(part, _exactly)) for part in item.parts)
    return item.instruction, parts, tuple(sorted(item.fields.items()))


def pair_digest(pair: Pair) -> str:
    """The digest of a pair: id, task, query, and the target by identity and content."""
    target = portable_id(pair.positive_id, pair.positive)
    return digest([pair.id, pair.task, item_digest(pair.query), target, item_digest(pair.positive)])


def portable_id(identity: str, target: Item) -> str:
    """A target's identity as it is on every disk: one that was made from the paths of its pictures names them shortly.

    Args:
        identity: ``positive_id`` of a pair; one that a data set gives itself stays.
        target: the item that it stands for.
    """
    paths = [source for source in pictures(target) if isinstance(source, str) and not source.startswith("bundled:")]
    if paths and identity == f"image:{paths[0]}":
        return f"image:{_picture(paths[0])}"
    return f"content:{item_digest(target)}" if paths and identity.startswith("blake2:") else identity


def describe(item: Item) -> str:
    """An item in at most 100 characters, for messages: its instruction, its text, its first picture's name."""
    source = next(pictures(item), "")
    words = " ".join(filter(None, (item.instruction, item.text, source if isinstance(source, str) else "<picture>")))
    return words if len(words) <= 100 else words[:97] + "..."


def module_digest(module: nn.Module) -> str:
    """The digest of a module's weights, from a probe of every tensor.

    Values are rounded to bfloat16 first, so that one checkpoint loaded at two precisions counts as one. The random half
    of a fresh low-rank adapter (``lora_A``) is left out: its product with the zero half is nothing, whatever the seed.
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
    return hashlib.sha256(f"{source.mode}{source.size}".encode() + source.tobytes()).hexdigest()[:16]


def _exactly(source: str | PILImage) -> str:
    return source if isinstance(source, str) else f"{_picture(source)} {source.getpalette()}"
