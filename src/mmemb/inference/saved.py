"""What an embedder is made of on disk: a checkpoint of `mmemb fit`, a folder that `Embedder.save` wrote, a hub id.

Nothing here runs code from a file: tensors, plain settings and the names of registered parts only.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmemb.common.checkpoint import read_checkpoint, refuse_other_backbone
from mmemb.common.files import whole_file, write_text
from mmemb.interfaces import Backbone, Model, Pooler
from mmemb.registry import create

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_SETTINGS, _BACKBONE, _POOLER = "embedder.json", "backbone", "pooler.safetensors"
_KEPT = ("max_prompt_tokens", "max_rationale_tokens", "dtype")
"""Arguments of the backbone that its own folder does not hold."""
_DECISION = ("offset", "spread")


@dataclass(frozen=True)
class Saved:
    """A model as it was read.

    Attributes:
        backbone: on the CPU.
        pooler: built, with its weights.
        identity: digest that the saved model had; None where it is to be taken anew.
        decision: arguments of the controller `rl` with which the model decides: its ``offset`` and ``spread``.
    """

    backbone: Backbone
    pooler: Pooler
    identity: str | None = None
    decision: dict[str, float] = field(default_factory=dict)


def read(path: str | Path) -> Saved:
    """Reads a model; see `Embedder.from_checkpoint`."""
    folder = Path(path).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(str(path)):
        folder = _download(str(path))
    if folder.is_dir() and (folder / _SETTINGS).is_file():
        return _read_folder(folder)
    return _read_lightning(_last_checkpoint(folder) if folder.is_dir() else folder)


def write(folder: Path, backbone: Backbone, pooler: Pooler, *, identity: str, controller: Any) -> None:
    """Writes what `read` reads; see `Embedder.save`. The settings, which make the folder whole, come last."""
    settings = {
        "format": 1,
        "pooler": _describe(pooler),
        **{name: getattr(backbone, name) for name in _KEPT if hasattr(backbone, name)},
        "decision": {name: getattr(controller, name) for name in _DECISION if hasattr(controller, name)},
        # Saving may merge adapters into the weights: the same model with another digest.
        "identity": identity,
    }
    backbone.save(folder / _BACKBONE)
    with whole_file(folder / _POOLER) as temporary:
        save_file({name: value.contiguous() for name, value in pooler.state_dict().items()}, temporary)
    write_text(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")


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
        runs = sorted(folder.glob("*/checkpoints/last.ckpt"), key=lambda found: found.stat().st_mtime)
        wanted = f"its newest run is {runs[-1].parent.parent}" if runs else "give a run's folder or a .ckpt file"
        raise FileNotFoundError(f"{folder}: neither {_SETTINGS} nor checkpoints/last.ckpt in it; {wanted}")
    return path


def _read_lightning(path: Path) -> Saved:
    """The model of an `EmbeddingModule` checkpoint: built from its settings, then given its weights."""
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
    Model.assemble(backbone, pooler)
    _load(backbone, checkpoint["state_dict"], "backbone.", path)
    _load(pooler, checkpoint["state_dict"], "pooler.", path)
    return Saved(backbone, pooler, decision=_decision(path, checkpoint))


def _decision(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """How the model decides: as the run's evaluation calibrated it, else as the control phase left it.

    The phase learns sigmoid((l_think - l_emb - center) / spread); a model without one follows its logits as they are.
    """
    policies = [state["policy"] for state in checkpoint.get("phases", ()) if state.get("policy")]
    policy = policies[-1] if policies else None
    learned = {} if policy is None else {"offset": -float(policy[0]), "spread": float(policy[1])}
    summary = path.parent.parent / "summary.json"
    if not summary.is_file():
        return learned
    try:
        settings = json.loads(summary.read_text(encoding="utf-8"))["settings"]
        offset = settings["calibration"]["rl"]["offset"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return learned
    # Of another step's model nothing is known.
    if settings.get("step") != checkpoint.get("global_step") or not isinstance(offset, int | float):
        return learned
    return {**learned, "offset": float(offset)}


def _read_folder(folder: Path) -> Saved:
    """The model of a folder that `write` wrote."""
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    # Folders of earlier versions have not all of them.
    kept = {name: settings[name] for name in _KEPT if name in settings}
    backbone = create("backbone", "transformers", model=str(folder / _BACKBONE), **kept)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pooler", type=Pooler)
    pooler = parser.instantiate_classes(parser.parse_object({"pooler": settings["pooler"]})).pooler
    Model.assemble(backbone, pooler)
    pooler.load_state_dict(load_file(folder / _POOLER))
    return Saved(backbone, pooler, settings.get("identity"), settings.get("decision") or {})


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
