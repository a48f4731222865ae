"""The public way to embed: load a trained model, give it anything, say whether it may think.

embedder = Embedder.from_checkpoint("runs/r1/version_0")
queries = embedder.encode(["currency of chile", Path("flag.png")])
targets = embedder.encode(["chilean peso", "euro"], side="target")
embedder.similarity(queries, targets)  # [2, 2]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.data.images import BUNDLED
from mmemb.data.items import parse_item
from mmemb.inference import saved
from mmemb.inference.embedding_files import model_identity
from mmemb.inference.embeddings import Embeddings, direct, similarity
from mmemb.inference.encoder import Encoder
from mmemb.interfaces import Backbone, Controller, Model, Pooler
from mmemb.registry import create
from mmemb.types import Encoded, Image, Item, Page, Part, Text, Video

Reason: TypeAlias = Literal["auto", "always", "never"]
Side: TypeAlias = Literal["query", "target"]
One: TypeAlias = str | Path | PILImage | Item | Mapping[str, Any] | Sequence[Any]


class Embedder:
    """Items -> embeddings, with or without thinking.

    Args:
        backbone: the model.
        pooler: reads the embedding; already built.
        controller: decides under ``reason="auto"``; None follows the model's own decision (`rl`): of a checkpoint with
            the offset that its run's evaluation calibrated, else as its control phase left it, else as the logits say.
        batch_size: rows of one forward pass.
        budget: most rationale tokens of a row.
        progress: show a bar over items.
    """

    def __init__(
        self,
        backbone: Backbone,
        pooler: Pooler,
        *,
        controller: Controller | None = None,
        batch_size: int = 64,
        budget: int = 48,
        progress: bool = False,
    ) -> None:
        self.backbone = backbone
        self.pooler = pooler
        self.controller = controller or create("controller", "rl")
        self.encoder = Encoder(backbone, pooler, batch_size=batch_size, budget=budget, progress=progress)
        self._identity: str | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str | torch.device | None = None, **options: Any) -> Embedder:
        """Loads a model without running code from the file: tensors and plain settings only.

        Args:
            path: a ``.ckpt`` that ``mmemb fit`` wrote, its run folder (the last checkpoint is taken), a folder that
                `save` wrote, or the hub id (``owner/name`` or ``owner/name@revision``) of such a folder; a local path
                comes first. The network is used for a hub id, and for a ``.ckpt`` or run whose backbone was given by
                hub id, unless the model is in the local cache.
            device: where the model goes; None: the GPU if there is one.
            **options: further arguments of the constructor.

        Raises:
            FileNotFoundError: there is no such file or hub id, or no model in the folder.
            ValueError: the file is damaged, of another backbone, or was not written by ``mmemb fit``; or this machine
                has no such device.
        """
        place = _device(device)
        found = saved.read(path)
        if options.get("controller") is None:
            options["controller"] = create("controller", "rl", **found.decision)
        embedder = cls(found.backbone.to(place), found.pooler.to(place), **options)
        embedder._identity = found.identity
        return embedder

    def encode(
        self,
        items: One,
        *,
        side: Side = "query",
        reason: Reason = "auto",
        budget: int | None = None,
        return_rationales: bool = False,
        dim: int | None = None,
        instruction: str = "",
        bank: Tensor | None = None,
    ) -> Embeddings:
        """Embeds one thing or a list of things; batches that do not fit the memory are halved.

        Args:
            items: a string (text), a path (picture), a PIL image, a dict (an item as data files have it, pictures as
                paths or PIL images) or an `Item`; or a list of these. A list within the list is one item of several
                parts, in order.
            side: what the items are: queries, or the targets that queries look for.
            reason: ``auto`` lets the controller decide for every query and thinks about no target; ``always`` and
                ``never`` decide for all.
            budget: most rationale tokens of a row; None: the embedder's own. A controller's own smaller budget holds.
            return_rationales: keep what was thought.
            dim: width of the embeddings: their first entries, normalised again (Matryoshka); None: all.
            instruction: the task in words, for everything that does not bring its own.
            bank: [M, D] reference embeddings, for a controller that asks for confidence.

        Returns:
            Embeddings in the order given, normalised, float32, on the CPU.

        Raises:
            FileNotFoundError: a picture does not exist.
            ValueError: something cannot be embedded, or an argument is out of its range.
        """
        if side not in get_args(Side):
            raise ValueError(f"encode: side is {side!r}; give 'query' or 'target'")
        check_numbers("encode", at_least=1, at_most=self.pooler.size, dim=dim)
        check_numbers("encode", at_least=1, budget=budget)
        things = list(items) if isinstance(items, list | tuple) else [items]
        queries = [as_item(thing, instruction=instruction, place=f"items[{row}]") for row, thing in enumerate(things)]
        most = self.encoder.budget if budget is None else budget
        if side == "target" and reason == "auto":
            reason = "never"
        controller = self._controller(reason)
        if reason == "never":  # one plain pass: no cache to hold, no decision to read
            found = direct(self.encoder.encode_queries(queries))
        else:
            found = self.encoder.encode(queries, controller, bank=bank, budget=most)
        values = {each.name: getattr(found, each.name) for each in fields(found)}
        if not return_rationales:
            values["rationale"] = [""] * len(queries)
        return Embeddings(**values).truncated_to(dim)

    @staticmethod
    def similarity(queries: Encoded | Tensor | Any, targets: Encoded | Tensor | Any) -> Tensor:
        """Cosines [B, M] of two sets of embeddings (`Embeddings`, tensors or arrays)."""
        return similarity(queries, targets)

    @property
    def identity(self) -> str:
        """The architecture and a digest of the weights: what embeddings must share to be compared."""
        if self._identity is None:
            self._identity = model_identity(self.backbone, self.pooler)
        return self._identity

    def save(self, folder: str | Path) -> Path:
        """Writes backbone, pooler and, last, the settings that make it whole; `from_checkpoint` reads them back.

        Raises:
            ValueError: the pooler keeps an argument of its constructor under another name.
        """
        folder = Path(folder)
        saved.write(folder, self.backbone, self.pooler, identity=self.identity, controller=self.controller)
        return folder

    def _controller(self, reason: str) -> Controller:
        if reason == "auto":
            return self.controller
        if reason == "always":
            return create("controller", "always_reason")
        if reason == "never":
            return create("controller", "never")
        raise ValueError(f"encode: reason is {reason!r}; give 'auto', 'always' or 'never'")


def as_item(thing: One, *, instruction: str = "", place: str = "item") -> Item:
    """An `Item` of whatever was given.

    Args:
        thing: as in `Embedder.encode`.
        instruction: the task in words; an `Item` keeps its own.
        place: names the thing in messages.

    Raises:
        FileNotFoundError: a picture does not exist.
        ValueError: it is of no kind that can be embedded, or empty.
    """
    if isinstance(thing, Item):
        return thing
    if isinstance(thing, Mapping):
        item = parse_item(dict(thing), field=place, find=_picture)
        return item if item.instruction or not instruction else replace(item, instruction=instruction)
    parts = list(thing) if isinstance(thing, list | tuple) else [thing]
    if not parts:
        raise ValueError(f"{place}: an empty list cannot be embedded; give at least one part")
    return Item(instruction, tuple(_part(part, place) for part in parts))


def _part(thing: Any, place: str) -> Part:
    if isinstance(thing, Text | Image | Video | Page):
        return thing
    if isinstance(thing, str):
        return Text(thing)
    if isinstance(thing, PILImage):
        return Image(thing)
    if isinstance(thing, Path):
        return Image(_picture(place, thing))
    kind = type(thing).__name__
    raise ValueError(
        f"{place}: a {kind} cannot be embedded; give a string, a pathlib.Path, a PIL image, a dict or an Item"
    )


def _picture(place: str, source: Any) -> Any:
    """A picture's source as `Image` takes it: absolute path, ``bundled:`` name or PIL image."""
    if isinstance(source, PILImage) or (isinstance(source, str) and source.startswith(BUNDLED)):
        return source
    if not isinstance(source, str | Path) or not str(source):
        raise ValueError(f"{place}: expected the path of a picture or a PIL image, got a {type(source).__name__}")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{place}: there is no picture {source}; correct the path (a plain string is text)")
    return str(path.resolve())


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); name another, or none") from error
    return place


def load_encoder(model: str, batch_size: int) -> Encoder:
    """A frozen model by where it lies, on the GPU where there is one.

    Args:
        model: a checkpoint or run folder of ``mmemb fit``, or a folder of `Embedder.save`; or a bare backbone's folder
            or hub id, read at ``<emb>``.
        batch_size: rows of one forward pass.
    """
    path = Path(model)
    if path.suffix == ".ckpt" or (path / "embedder.json").is_file() or (path / "checkpoints").is_dir():
        embedder = Embedder.from_checkpoint(path)
        return Encoder(embedder.backbone, embedder.pooler, batch_size=batch_size)
    backbone = create("backbone", "transformers", model=model)
    pooler = create("pooler", "embed_token")
    Model.assemble(backbone, pooler)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Encoder(backbone.to(device), pooler.to(device), batch_size=batch_size)
