"""The worker whose rationales come from a local vision-language model other than the one in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mmemb.common.digests import bytes_digest, digest
from mmemb.interfaces import Backbone, Worker
from mmemb.types import Item, Rationale

from ._prompts import REQUEST, asked
from ._sampling import check_sampling, sample_rationales

_BLOCKS, _BLOCK_BYTES = 16, 65536
_PROCESSING = ("chat_template*", "tokenizer*", "*processor_config.json", "*_tokens*.json", "vocab.*", "merges.txt")


class TransformersWorker(Worker, name="transformers"):
    """Samples rationales from a local Qwen2-VL, Qwen2.5-VL, Qwen3-VL, SmolVLM or Idefics3 model, by hub id or folder.

    The `transformers` backbone loads the model at the first proposal, and also handles its chat template and pictures.
    It supports the families in `mmemb.components.backbones.families`. Samples are decoded in batches of similar length.
    The k samples of an item share a prefill.

    Args:
        model: hub id or local folder.
        revision: branch, tag or commit of the hub's model.
        style: ``instruct`` lets the model write right after the prompt. ``thinking`` makes it write between ``<think>``
            and ``</think>``, for a model that knows those tokens.
        instruction: the request that follows the item.
        temperature: temperature of the sampling, > 0.
        max_new_tokens: maximum length of a rationale, in tokens.
        batch_size: number of sequences that are decoded at once.
        dtype: precision of the parameters.
        device: device of the model; null for a GPU if there is one.
        quantization: ``nf4`` (4 bits) or ``int8`` holds the decoder's linear layers in fewer bits.
        max_prompt_tokens: maximum number of tokens in a prompt, pictures included.
        max_pixels: largest picture area; a larger picture is shrunk. null for the model's own limit.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        style: Literal["instruct", "thinking"] = "instruct",
        instruction: str = REQUEST,
        temperature: float = 1.0,
        max_new_tokens: int = 96,
        batch_size: int = 32,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        device: str | None = None,
        quantization: Literal["none", "nf4", "int8"] = "none",
        max_prompt_tokens: int = 4096,
        max_pixels: int | None = None,
    ) -> None:
        check_sampling(self.name, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size)
        if style not in ("instruct", "thinking"):
            raise ValueError(f"transformers worker: style is {style!r}; give instruct or thinking")
        self.model = model
        self.revision = revision
        self.style = style
        self.instruction = instruction
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.device = device
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "quantization": quantization,
            "max_prompt_tokens": max_prompt_tokens,
            "max_pixels": max_pixels,
        }
        self._backbone: Backbone | None = None

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """See `Worker.propose`. A sample's seed depends on its item's content and its number, not on other items.

        Equal texts of one item are merged (the first stays) and empty ones are dropped, so fewer than k may be left.

        Raises:
            FileNotFoundError: the model's folder is missing.
            ValueError: the model cannot be read, or its family is not supported.
        """
        return sample_rationales(
            self._loaded(),
            [asked(item, self.instruction) for item in items],
            k,
            worker=self.name,
            seed=seed,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            think=self.style == "thinking",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The model's identity and a mark of its weights, its loading options, the prompt and the sampling settings.

        No weights are loaded. ``max_prompt_tokens`` is not included: a longer prompt is an error, and the user may
        raise the limit and continue.
        """
        return {
            "worker": self.name,
            **source(self.model, revision=self.revision),
            **{name: value for name, value in self._options.items() if name != "max_prompt_tokens"},
            "style": self.style,
            "instruction": self.instruction,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }

    def release(self) -> None:
        """Drops the model; the next proposal loads it again."""
        self._backbone = None

    def _loaded(self) -> Backbone:
        if self._backbone is None:
            import torch

            from mmemb.components.backbones.transformers import TransformersBackbone

            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            backbone = TransformersBackbone(self.model, revision=self.revision, **self._options)
            self._backbone = backbone.requires_grad_(False).eval()
            if self._options["quantization"] == "none":  # a quantised model stays where it was packed
                self._backbone.to(device)
        return self._backbone


def source(model: str, *, revision: str | None) -> dict[str, str]:
    """Identifies a model without loading it: its identity, with the hub's commit or digests of a folder's files.

    A few blocks of every weight file are read, since training changes all of them. The files that shape prompts (chat
    template, tokenizer, picture processor) are read whole.

    Raises:
        FileNotFoundError: the model's folder or its config is missing.
        ValueError: the config cannot be read, or its family is not supported.
    """
    from mmemb.components.backbones import loading

    folder = Path(model).expanduser()
    config, _ = loading.load_config(str(folder) if folder.is_dir() else model, revision=revision, overrides={})
    identity = f"{loading.origin_of(str(folder) if folder.is_dir() else model, revision)}#{loading.digest(config)}"
    if not folder.is_dir():
        return {"model": identity, "weights": str(getattr(config, "_commit_hash", None) or revision or "main")}
    weights = digest([_probe(file) for file in sorted(folder.glob("*.safetensors"))])
    processing = [file for pattern in _PROCESSING for file in sorted(folder.glob(pattern))]
    read = {file.name: bytes_digest(file.read_bytes()) for file in processing}
    return {"model": identity, "weights": weights, "processing": digest(read)}


def _probe(file: Path) -> list[str]:
    size = file.stat().st_size
    blocks = []
    with file.open("rb") as stream:
        for block in range(_BLOCKS):
            stream.seek(block * size // _BLOCKS)
            blocks.append(stream.read(_BLOCK_BYTES))
    return [file.name, str(size), bytes_digest(*blocks)]
