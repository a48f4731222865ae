"""Reads and writes the model of an embedder.

A model comes from a checkpoint of `mmemb fit`, a folder that `Embedder.save` wrote, or a hub id. Reading a model never
runs code from a file: it reads only tensors, plain settings and the names of registered components.
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
"""Arguments of the backbone that the backbone's own folder does not keep."""
_DECISION = ("offset", "spread")


@dataclass(frozen=True)
class Saved:
    """A model that was read from disk.

    Attributes:
        backbone: the backbone, on the CPU.
        pooler: the pooler with its weights.
        identity: digest that the saved model had. None means that it must be computed again.
        decision: arguments of the controller `rl` with which the model decides: ``offset`` and ``spread``.
    """

    backbone: Backbone
    pooler: Pooler
    identity: str | None = None
    decision: dict[str, float] = field(default_factory=dict)


def read(path: str | Path) -> Saved:
    """Reads a model. `Embedder.from_checkpoint` describes the argument and the errors."""
    folder = Path(path).expanduser()
    if not folder.exists() and _HUB_ID.fullmatch(str(path)):
        folder = _download(str(path))
    if folder.is_dir() and (folder / _SETTINGS).is_file():
        return _read_folder(folder)
    return _read_lightning(_last_checkpoint(folder) if folder.is_dir() else folder)


def write(folder: Path, backbone: Backbone, pooler: Pooler, *, identity: str, controller: Any) -> None:
    """Writes a folder that `read` can read; see `Embedder.save`.

    The settings are written last, so a folder with settings is complete.
    """
    settings = {
        "format": 1,
        "pooler": _describe(pooler),
        **{name: getattr(backbone, name) for name in _KEPT if hasattr(backbone, name)},
        "decision": {name: getattr(controller, name) for name in _DECISION if hasattr(controller, name)},
        # Saving may merge adapters into the weights. That changes the digest of the same model.
        "identity": identity,
    }
    backbone.save(folder / _BACKBONE)
    with whole_file(folder / _POOLER) as temporary:
        save_file({name: value.contiguous() for name, value in pooler.state_dict().items()}, temporary)
    write_text(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")


def _download(name: str) -> Path:
    """Returns the folder of a hub id in the local cache. Downloads it if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{name}: this is neither a local path nor a hub model that can be read: {first}"
        ) from error
    if not (folder / _SETTINGS).is_file():
        raise FileNotFoundError(f"{name}: there is no {_SETTINGS} in it; upload a folder that Embedder.save wrote")
    return folder


def _last_checkpoint(folder: Path) -> Path:
    path = folder / "checkpoints" / "last.ckpt"
    if not path.is_file():
        runs = sorted(folder.glob("*/checkpoints/last.ckpt"), key=lambda found: found.stat().st_mtime)
        wanted = f"its newest run is {runs[-1].parent.parent}" if runs else "give the folder of a run or a .ckpt file"
        raise FileNotFoundError(f"{folder}: it has neither {_SETTINGS} nor checkpoints/last.ckpt; {wanted}")
    return path


def _read_lightning(path: Path) -> Saved:
    """Builds the model of an `EmbeddingModule` checkpoint from its settings and loads its weights."""
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters", {})
    if not all(isinstance(settings.get(part), Mapping) for part in ("backbone", "pooler")):
        raise ValueError(f"{path}: the settings of backbone and pooler are missing; give a checkpoint of `mmemb fit`")
    parser = ArgumentParser(exit_on_error=False)
    # With these types, a checkpoint can name nothing but a backbone and a pooler.
    parser.add_argument("--backbone", type=Backbone)
    parser.add_argument("--pooler", type=Pooler)
    try:
        built = parser.instantiate_classes(
            parser.parse_object({part: _plain(settings[part]) for part in ("backbone", "pooler")})
        )
    except ArgumentError as error:
        first = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"{path}: no model can be built from its settings: {first}") from error
    backbone, pooler = built.backbone, built.pooler
    refuse_other_backbone(checkpoint, identity=backbone.identity, path=path)
    Model.assemble(backbone, pooler)
    _load(backbone, checkpoint["state_dict"], "backbone.", path)
    _load(pooler, checkpoint["state_dict"], "pooler.", path)
    return Saved(backbone, pooler, decision=_decision(path, checkpoint))


def _decision(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Returns the settings with which the model decides whether to reason.

    They come from the calibration in the run's evaluation, otherwise from the control phase. The control phase learns
    ``sigmoid((l_think - l_emb - center) / spread)``. A model without a control phase follows its plain logits.
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
    # The calibration holds only for the model of its own step.
    if settings.get("step") != checkpoint.get("global_step") or not isinstance(offset, int | float):
        return learned
    return {**learned, "offset": float(offset)}


def _read_folder(folder: Path) -> Saved:
    """Reads the model in a folder that `write` wrote."""
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    # Folders of earlier versions lack some of these settings.
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
        raise ValueError(f"{path}: its weights do not fit the {prefix[:-1]} in its settings: {first}") from error


def _plain(value: Any) -> Any:
    """Turns settings into plain containers, because checkpoints keep them as mappings of several types."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _describe(part: Any) -> dict[str, Any]:
    """Returns the class path and arguments of a component.

    The component must keep every argument as an attribute of the same name, as all built-in components do.
    """
    path = f"{type(part).__module__}.{type(part).__qualname__}"
    names = [
        name for name in inspect.signature(type(part).__init__).parameters if name not in ("self", "args", "kwargs")
    ]
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise ValueError(
            f"{path} cannot be saved: it does not keep its argument {missing[0]!r} as an attribute of that name"
        )
    return {"class_path": path, "init_args": {name: getattr(part, name) for name in names}}
