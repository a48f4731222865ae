"""Loads config, tokenizer, image processor and model from a hub id or a folder, by the auto classes.

Code from the hub is never run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import cached_file
from transformers.utils import logging as library_logging

from mmemb.common.digests import bytes_digest
from mmemb.types import EMB, END_THINK, THINK

from .families import FAMILIES, Family
from .pictures import IdeficsPictures, Pictures, QwenPictures

MARKER = "backbone.json"
"""File in a saved folder that holds the identity of the saved model."""
_NOT_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "use_cache",
    "_attn_implementation",
    "attn_implementation",
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def load_config(model: str, *, revision: str | None, overrides: Mapping[str, Any]) -> tuple[PreTrainedConfig, Family]:
    """Loads the config of a model, merges the overrides in, and finds the model's family.

    Raises:
        FileNotFoundError: the model is written as a path, and the folder does not exist or has no config.
        ValueError: the config cannot be read, the model is not an image-text-to-text model, or the adapter does not
            know its family.
    """
    path = Path(model)
    if not path.is_dir() and (path.is_absolute() or model.startswith(".")):
        raise FileNotFoundError(
            f"backbone model {model!r}: there is no such folder; give one with config.json, or a hub id (owner/name)"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"backbone model {model!r}: the folder has no config.json; give a folder written by save_pretrained"
        )
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # the hub, the file system and the config classes raise nearly anything
        raise ValueError(
            f"backbone model {model!r}: its config cannot be read ({_one_line(error)}); "
            f"check the name, the network or the file"
        ) from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"backbone model {model!r} is a {config.model_type!r}, not an image-text-to-text model; "
            f"take one of {', '.join(FAMILIES)}"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"backbone model {model!r}: the family {config.model_type!r} is not supported yet; "
            f"take one of {', '.join(FAMILIES)}"
        )
    if overrides:
        config = type(config).from_dict(_merged(config.to_dict(), overrides))
    return config, FAMILIES[config.model_type]


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in overrides.items():
        old = out.get(key)
        out[key] = _merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return out


@dataclass(frozen=True)
class LoadedProcessor:
    """Tokenizer (with the three special tokens), image processor, chat template, and ids of newly added tokens."""

    tokenizer: Any
    image_processor: Any
    chat_template: str
    added: tuple[int, ...]


def load_processor(model: str, *, revision: str | None) -> LoadedProcessor:
    """Loads the pieces of a model's processor.

    They come from the library's processor if it can be built. Without torchvision it often cannot, because its video
    part is missing. Then tokenizer and image processor are loaded one by one, the image processor in its Pillow
    version.

    Raises:
        ValueError: a piece is missing or cannot be read.
    """
    kwargs: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    processor: Any = None
    try:
        processor = AutoProcessor.from_pretrained(model, **kwargs)
    except (ImportError, ValueError, TypeError, OSError):
        processor = None  # the code below reports the piece that is really missing
    try:
        if isinstance(processor, ProcessorMixin):
            tokenizer, image_processor = processor.tokenizer, processor.image_processor
        else:
            tokenizer = AutoTokenizer.from_pretrained(model, **kwargs)
            image_processor = AutoImageProcessor.from_pretrained(model, **kwargs)
    except Exception as error:
        raise ValueError(
            f"backbone model {model!r}: its tokenizer or image processor cannot be read ({_one_line(error)}); "
            f"the folder needs tokenizer.json and preprocessor_config.json"
        ) from error
    template = getattr(processor, "chat_template", None) or tokenizer.chat_template or _template_file(model, revision)
    if not template:
        raise ValueError(
            f"backbone model {model!r} has no chat template; take its instruct version or add chat_template.jinja"
        )
    known = tokenizer.get_vocab()
    missing = [token for token in (THINK, END_THINK, EMB) if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    added = tuple(int(index) for index in tokenizer.convert_tokens_to_ids(missing))
    return LoadedProcessor(tokenizer, image_processor, template, added)


def _template_file(model: str, revision: str | None) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        file = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            text = Path(file).read_text(encoding="utf-8")
            return text if name.endswith("jinja") else json.loads(text)["chat_template"]
    return None


def make_pictures(family: Family, config: PreTrainedConfig, image_processor: Any, image_token: str) -> Pictures:
    """Makes the object that turns pictures into tensors for this family."""
    if family.pictures == "qwen":
        return QwenPictures(image_processor, image_token)
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    return IdeficsPictures(image_processor, image_token, tokens)


def load_model(
    model: str,
    config: PreTrainedConfig,
    *,
    revision: str | None,
    random_weights: bool,
    seed: int,
    dtype: str,
    attention: str,
    quantization: Any,
) -> nn.Module:
    """Loads the model with its own weights, or with random weights drawn from a seed.

    The caller's random state does not change. The model is on the CPU. A quantised model is on the GPU of this process
    if there is one, because its weights are packed on the device to which they are loaded.

    Raises:
        ValueError: the weights cannot be read.
    """
    kind = getattr(torch, dtype)
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForImageTextToText.from_config(config, dtype=kind, attn_implementation=attention)
    extra: dict[str, Any] = (
        {} if quantization is None else {"quantization_config": quantization, "device_map": {"": own_device()}}
    )
    try:
        with without_bars() if Path(model).is_dir() else contextlib.nullcontext():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model,
                config=config,
                revision=revision,
                dtype=kind,
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
    except Exception as error:
        raise ValueError(
            f"backbone model {model!r}: its weights cannot be read ({_one_line(error)}); "
            f"provide model.safetensors or set weights: random"
        ) from error
    network, report = loaded
    if missing := sorted(report["missing_keys"]):  # the library would fill them with random numbers
        raise ValueError(
            f"backbone model {model!r}: {len(missing)} weights are missing from its safetensors (first {missing[0]}); "
            f"complete the folder or drop config_overrides"
        )
    return network


def own_device() -> str:
    """The GPU of this process, or the CPU if there is none. Torchrun, Lightning or SLURM number a machine's GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return f"cuda:{rank % torch.cuda.device_count()}"


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hides the library's progress bars while the context lasts; for local files they only flash by.

    A download keeps its own bar.
    """
    if not library_logging.is_progress_bar_enabled():
        yield
        return
    library_logging.disable_progress_bar()
    try:
        yield
    finally:
        library_logging.enable_progress_bar()


def fit_embeddings(model: Any, *, length: int, added: Sequence[int]) -> None:
    """Grows the embedding to the tokenizer's length and starts the rows of added tokens near the mean of the others.

    A little noise (from a fixed seed) is added, because the model could not distinguish equal rows.
    """
    rows = list(added)
    if not rows:
        return
    if length > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(length, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    tables = {id(part.weight): part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for weight in tables.values():
            known = weight[: min(rows)].float()
            noise = torch.randn(len(rows), weight.shape[1], generator=generator).to(weight.device)
            weight[rows] = (known.mean(0) + 0.1 * known.std(0) * noise).to(weight.dtype)


def origin_of(model: str, revision: str | None) -> str:
    """``name@revision``: the same for the hub's model and for any folder saved from it."""
    path = Path(model)
    marker = path / MARKER
    if marker.is_file():
        return str(json.loads(marker.read_text(encoding="utf-8"))["origin"])
    return f"{path.resolve().name if path.is_dir() else model}@{revision or 'main'}"


def digest(config: PreTrainedConfig) -> str:
    """Twelve hex digits of the config's fields that shape the network."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strip(inner) for key, inner in value.items() if key not in _NOT_ARCHITECTURE}
        return value

    text = json.dumps(strip(config.to_dict()), sort_keys=True, default=str)
    return bytes_digest(text.encode())[:12]
