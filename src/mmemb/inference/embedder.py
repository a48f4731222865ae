"""Provides the public API for embedding: load a trained model, give it items, and say whether it may reason.

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
    """Turns items into embeddings, with or without reasoning.

    Args:
        backbone: the model.
        pooler: reads the embedding from the hidden states. It must be set up.
        controller: decides when ``reason="auto"``. None follows the model's own decision (`rl`). For a checkpoint, its
            offset comes from the calibration in the run's evaluation, otherwise from the control phase. Without
            either, the plain logits decide.
        batch_size: number of rows in one forward pass.
        budget: maximum number of rationale tokens per row.
        progress: whether to show a progress bar over items.
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
        """Loads a model. It reads only tensors and plain settings and never runs code from the file.

        Args:
            path: a ``.ckpt`` that ``mmemb fit`` wrote, the folder of its run (for the last checkpoint), or a folder
                that `save` wrote. The hub id of such a folder works too, as ``owner/name`` or ``owner/name@revision``.
                A local path takes precedence. The network is used for a hub id, and for a ``.ckpt`` or run whose
                backbone was given by hub id, unless the model is in the local cache.
            device: the device of the model. None takes the GPU if there is one.
            **options: further arguments of the constructor.

        Raises:
            FileNotFoundError: the file or hub id does not exist, or the folder has no model.
            ValueError: the file is damaged, is of another backbone, or was not written by ``mmemb fit``. Also raised
                if this machine does not have the device.
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
        """Embeds one input or a list of inputs. Batches that do not fit into memory are halved.

        Args:
            items: a string (text), a path (picture), a PIL image, a dict or an `Item`, or a list of these. A dict is an
                item as in data files, with pictures as paths or PIL images. A list within the list is one item with
                several parts, in order.
            side: whether the items are queries, or the targets that queries look for.
            reason: ``auto`` lets the controller decide for each query, and targets skip reasoning. ``always`` and
                ``never`` apply to all items.
            budget: maximum number of rationale tokens per row. None takes the embedder's own. A smaller budget of the
                controller applies.
            return_rationales: whether to return the rationales.
            dim: width of the embeddings: only the first entries, normalised again (Matryoshka). None keeps all.
            instruction: the task in words, for all items without an instruction of their own.
            bank: [M, D] embeddings over which the confidence is computed, for a controller that needs it.

        Returns:
            the embeddings in the order given, normalised, float32, on the CPU.

        Raises:
            FileNotFoundError: a picture does not exist.
            ValueError: an input cannot be embedded, or an argument is out of range.
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
        if reason == "never":  # one plain pass: it needs no cache and no decision
            found = direct(self.encoder.encode_queries(queries))
        else:
            found = self.encoder.encode(queries, controller, bank=bank, budget=most)
        values = {each.name: getattr(found, each.name) for each in fields(found)}
        if not return_rationales:
            values["rationale"] = [""] * len(queries)
        return Embeddings(**values).truncated_to(dim)

    @staticmethod
    def similarity(queries: Encoded | Tensor | Any, targets: Encoded | Tensor | Any) -> Tensor:
        """Computes the cosines [B, M] of two sets of embeddings (`Embeddings`, tensors or arrays)."""
        return similarity(queries, targets)

    @property
    def identity(self) -> str:
        """The architecture and a digest of the weights. Only embeddings with equal identity can be compared."""
        if self._identity is None:
            self._identity = model_identity(self.backbone, self.pooler)
        return self._identity

    def save(self, folder: str | Path) -> Path:
        """Writes backbone, pooler and settings to a folder that `from_checkpoint` can read.

        The settings are written last, so a folder with settings is complete.

        Raises:
            ValueError: the pooler does not keep an argument of its constructor under the same name.
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
    """Turns any supported input into an `Item`.

    Args:
        thing: an input as in `Embedder.encode`.
        instruction: the task in words. An `Item` keeps its own.
        place: name of the input in error messages.

    Raises:
        FileNotFoundError: a picture does not exist.
        ValueError: the input is empty, or its type cannot be embedded.
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
        f"{place}: type {kind} cannot be embedded; give a string, a pathlib.Path, a PIL image, a dict or an Item"
    )


def _picture(place: str, source: Any) -> Any:
    """Returns the source of a picture in a form that `Image` takes: absolute path, ``bundled:`` name or PIL image."""
    if isinstance(source, PILImage) or (isinstance(source, str) and source.startswith(BUNDLED)):
        return source
    if not isinstance(source, str | Path) or not str(source):
        raise ValueError(f"{place}: type {type(source).__name__} is no picture; give a non-empty path or a PIL image")
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{place}: there is no picture {source}; correct the path, or give text as a string")
    return str(path.resolve())


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"device {str(device)!r} cannot be used on this machine ({reason}); give another device or none"
        ) from error
    return place


def load_encoder(model: str, batch_size: int) -> Encoder:
    """Loads a model from a path or hub id as an encoder, on the GPU if there is one.

    Args:
        model: a checkpoint or run folder of ``mmemb fit``, or a folder of `Embedder.save`. The folder or hub id of a
            backbone alone works too; then the embedding is the state at ``<emb>``.
        batch_size: number of rows in one forward pass.
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
