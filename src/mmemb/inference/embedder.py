"""The public way to embed: load a trained model, give it anything, say whether it may think.

embedder = Embedder.from_checkpoint("runs/r1/version_0")
queries = embedder.encode(["currency of chile", Path("flag.png")])
targets = embedder.encode(["chilean peso", "euro"], side="target")
embedder.similarity(queries, targets)  # [2, 2]
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL.Image import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmemb.checkpoint import read_checkpoint, refuse_other_backbone
from mmemb.data.images import BUNDLED
from mmemb.data.records import parse_item
from mmemb.inference.embeddings import Embeddings, direct, similarity
from mmemb.inference.encoder import Encoder
from mmemb.inference.index import model_identity
from mmemb.interfaces import Backbone, Controller, Pooler
from mmemb.registry import create
from mmemb.types import Encoded, Image, Item, Page, Part, Text, Video

Reason: TypeAlias = Literal["auto", "always", "never"]
Side: TypeAlias = Literal["query", "target"]
One: TypeAlias = str | Path | PILImage | Item | Mapping[str, Any] | Sequence[Any]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_SETTINGS, _BACKBONE, _POOLER = "embedder.json", "backbone", "pooler.safetensors"
_KEPT = ("max_prompt_tokens", "max_rationale_tokens", "dtype")
"""Arguments of the backbone that its own folder does not hold."""


class Embedder:
    """Items -> embeddings, with or without thinking.

    Args:
        backbone: the model.
        pooler: reads the embedding; already built.
        controller: decides under ``reason="auto"``; None follows the model's own decision token (`rl`).
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
            ValueError: the file is damaged, of another backbone, or was not written by ``mmemb fit``.
        """
        folder = Path(path).expanduser()
        if not folder.exists() and _HUB_ID.fullmatch(str(path)):
            folder = _download(str(path))
        identity = None
        if folder.is_dir() and (folder / _SETTINGS).is_file():
            backbone, pooler, identity = _read_folder(folder)
        else:
            backbone, pooler = _read_lightning(_last_checkpoint(folder) if folder.is_dir() else folder)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        embedder = cls(backbone.to(place), pooler.to(place), **options)
        embedder._identity = identity
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
        if dim is not None and not 1 <= dim <= self.pooler.size:
            raise ValueError(f"encode: dim is {dim}; this model's embeddings can be cut to 1 to {self.pooler.size}")
        if budget is not None and budget < 1:
            raise ValueError(f"encode: budget is {budget}; it counts tokens from 1 (reason='never' thinks about none)")
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
        settings = {
            "format": 1,
            "pooler": _describe(self.pooler),
            **{name: getattr(self.backbone, name) for name in _KEPT if hasattr(self.backbone, name)},
            # Saving may merge adapters into the weights: the same model with another digest.
            "identity": self.identity,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save(folder / _BACKBONE)
        aside = folder / f".{_POOLER}.part"
        save_file({name: value.contiguous() for name, value in self.pooler.state_dict().items()}, aside)
        os.replace(aside, folder / _POOLER)
        aside = folder / f".{_SETTINGS}.part"
        aside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, folder / _SETTINGS)
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


def _download(name: str) -> Path:
    """The folder of a hub id in the local cache, fetched if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{name}: neither a path here nor a model of the hub that can be read: {first}"
        ) from error
    if not (folder / _SETTINGS).is_file():
        raise FileNotFoundError(f"{name}: no {_SETTINGS} in it; upload a folder that Embedder.save wrote")
    return folder


def _last_checkpoint(folder: Path) -> Path:
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: neither {_SETTINGS} nor checkpoints/last.ckpt in it; give a run's folder or a .ckpt file"
        )
    return path


def _read_lightning(path: Path) -> tuple[Backbone, Pooler]:
    """Backbone and pooler of an `EmbeddingModule` checkpoint: built from its settings, then given its weights."""
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters", {})
    if not all(isinstance(settings.get(part), Mapping) for part in ("backbone", "pooler")):
        raise ValueError(f"{path}: the settings of backbone and pooler are not in it; give a checkpoint of `mmemb fit`")
    parser = ArgumentParser(exit_on_error=False)
    # The types keep a checkpoint from naming anything but a backbone and a pooler.
    parser.add_argument("--backbone", type=Backbone)
    parser.add_argument("--pooler", type=Pooler)
    try:
        built = parser.instantiate_classes(
            parser.parse_object({part: _plain(settings[part]) for part in ("backbone", "pooler")})
        )
    except ArgumentError as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"{path}: its settings do not build a model here: {first}") from error
    backbone, pooler = built.backbone, built.pooler
    refuse_other_backbone(checkpoint, identity=backbone.identity, path=path)
    pooler.build(backbone.hidden_size)
    _load(backbone, checkpoint["state_dict"], "backbone.", path)
    _load(pooler, checkpoint["state_dict"], "pooler.", path)
    return backbone, pooler


def _read_folder(folder: Path) -> tuple[Backbone, Pooler, str | None]:
    """Backbone, pooler and identity of a folder that `Embedder.save` wrote."""
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    # Folders of earlier versions have not all of them.
    kept = {name: settings[name] for name in _KEPT if name in settings}
    backbone = create("backbone", "transformers", model=str(folder / _BACKBONE), **kept)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pooler", type=Pooler)
    pooler = parser.instantiate_classes(parser.parse_object({"pooler": settings["pooler"]})).pooler
    pooler.build(backbone.hidden_size)
    pooler.load_state_dict(load_file(folder / _POOLER))
    return backbone, pooler, settings.get("identity")


def _load(part: nn.Module, state: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        part.load_state_dict(own)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its weights do not fit the {prefix[:-1]} of its settings: {first}") from error


def _plain(value: Any) -> Any:
    """Settings as plain containers: checkpoints keep them as mappings of several kinds."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _describe(part: Any) -> dict[str, Any]:
    """Class path and arguments of a part that keeps every argument under its own name, as ours do."""
    path = f"{type(part).__module__}.{type(part).__qualname__}"
    names = [
        name for name in inspect.signature(type(part).__init__).parameters if name not in ("self", "args", "kwargs")
    ]
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise ValueError(f"{path} does not keep its argument {missing[0]!r} as an attribute; it cannot be saved")
    return {"class_path": path, "init_args": {name: getattr(part, name) for name in names}}
