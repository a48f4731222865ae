"""Any image-text-to-text model of the transformers library as a backbone.

Legend: B rows, T columns, L new columns, R chosen rows, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mmemb.common.digests import digest
from mmemb.common.files import whole_folder
from mmemb.interfaces import Backbone, Prefix
from mmemb.types import Item, ModelInputs

from . import loading, tuning
from .patches import use_matrix_product
from .processing import PromptProcessor
from .tuning import LoraSettings, Quantization

Dtype = Literal["float32", "bfloat16", "float16"]


class TransformersBackbone(Backbone, name="transformers"):
    """Any image-text-to-text model of the transformers library, by hub id or folder.

    A video is treated as its frames, one picture after the other.

    Args:
        model: hub id or local folder. With ``weights: random``, a folder with only a config and a processor suffices.
        revision: branch, tag or commit of the hub's model.
        config_overrides: config fields to change, nested as in config.json (``{text_config: {num_hidden_layers: 2}}``).
        weights: ``pretrained`` reads the model's safetensors, ``random`` draws random weights.
        seed: seed of the random weights.
        dtype: precision of the parameters.
        attention: attention implementation of the transformers library.
        frozen: parts that do not learn, by the beginning of their parameters' names; ``vision`` is the picture encoder.
        lora: low-rank adapters; everything else is then frozen.
        quantization: ``nf4`` (4 bits) or ``int8`` holds the decoder's linear layers in fewer bits, by bitsandbytes.
        max_prompt_tokens: maximum number of tokens in a prompt, pictures included.
        max_rationale_tokens: maximum number of tokens in a rationale; a longer one is cut.
        min_pixels: smallest picture area; a smaller picture is enlarged. None: the model's own limit.
        max_pixels: largest picture area; a larger picture is shrunk. None: the model's own limit.
        gradient_checkpointing: recompute the layers in the backward pass to save memory.

    Raises:
        FileNotFoundError: the model's folder or its config is missing.
        ValueError: the model cannot be read, its family is not supported, or a setting does not fit it.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        config_overrides: dict[str, Any] | None = None,
        weights: Literal["pretrained", "random"] = "pretrained",
        seed: int = 0,
        dtype: Dtype = "float32",
        attention: str = "sdpa",
        frozen: Sequence[str] = (),
        lora: LoraSettings | None = None,
        quantization: Quantization = "none",
        max_prompt_tokens: int = 2048,
        max_rationale_tokens: int = 64,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if quantization != "none" and weights == "random":
            raise ValueError(f"quantization={quantization!r} needs weights: pretrained")
        model = os.path.expanduser(model)
        config, family = loading.load_config(model, revision=revision, overrides=config_overrides or {})
        loaded = loading.load_processor(model, revision=revision)
        tokenizer, image_processor = loaded.tokenizer, loaded.image_processor
        _set_pixels(image_processor, min_pixels=min_pixels, max_pixels=max_pixels, model=model)
        self.family = family
        self.identity_origin = loading.origin_of(model, revision)
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.image_processor = image_processor
        self.processor = PromptProcessor(
            tokenizer,
            chat_template=loaded.chat_template,
            pictures=loading.make_pictures(family, config, image_processor, image_token),
            image_token=image_token,
            positions=family.positions,
            max_prompt_tokens=max_prompt_tokens,
            max_rationale_tokens=max_rationale_tokens,
        )
        self.max_prompt_tokens = max_prompt_tokens
        self.max_rationale_tokens = max_rationale_tokens
        self.dtype = dtype
        network: Any = loading.load_model(
            model,
            config,
            revision=revision,
            random_weights=weights == "random",
            seed=seed,
            dtype=dtype,
            attention=attention,
            quantization=tuning.quantization_config(
                quantization, compute_dtype=getattr(torch, dtype), skip=family.vision
            ),
        )
        loading.fit_embeddings(network, length=len(tokenizer), added=loaded.added)
        use_matrix_product(network)
        self.hidden_size = int(network.config.get_text_config().hidden_size)
        self._identity = f"{self.identity_origin}#{loading.digest(network.config)}"
        tuning.freeze(network, frozen, vision=family.vision)
        self.lora = lora
        if lora is not None:
            tuning.add_lora(network, lora, exclude=family.vision, new_tokens=loaded.added)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            network.activation_checkpointing_enable({"use_reentrant": False})
            network.enable_input_require_grads()
        tuning.keep_trainable_on_cpu(network)
        self.model = network.train()  # the library returns models in evaluation mode, where checkpointing is off

    def prepare(
        self,
        items: Sequence[Item],
        *,
        rationales: Sequence[str | None] | None = None,
        embed: bool = True,
        augment: Callable[[Any, int], Any] | None = None,
    ) -> ModelInputs:
        """See `Backbone.prepare`."""
        return self.processor.prepare(items, rationales=rationales, embed=embed, augment=augment)

    def prepare_response(
        self, items: Sequence[Item], responses: Sequence[str], *, augment: Callable[[Any, int], Any] | None = None
    ) -> ModelInputs:
        """See `Backbone.prepare_response`; a response longer than ``max_rationale_tokens`` is cut."""
        return self.processor.prepare_response(items, responses, augment=augment)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Hidden states [B, T, H] of the last layer (after the final norm)."""
        return self._base(**inputs.tensors, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [..., V] of hidden states [..., H]."""
        return self.model.get_output_embeddings()(hidden)

    def prefill(self, inputs: ModelInputs) -> Prefix:
        """Encodes B prompts once and keeps the key-value cache."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        hidden = self._base(**inputs.tensors, use_cache=True, past_key_values=cache).last_hidden_state
        last = inputs.tensors["position_ids"][..., -1]  # [B] or [3, B]; left-padded, so the last column is real
        return Prefix(
            cache=cache,
            attention_mask=inputs.tensors["attention_mask"],
            next_position=(last.amax(0) if last.ndim == 2 else last) + 1,
            hidden=hidden[:, -1],
        )

    def extend(self, prefix: Prefix, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Prefix]:
        """Encodes L more tokens [B, L] after a prefix, with a mask [B, L] (1 = real).

        Returns the states [B, L, H] and the longer prefix. Its ``hidden`` is the state of each row's last real token. A
        row without real tokens keeps the old state.
        """
        mask = torch.ones_like(tokens) if mask is None else mask.to(tokens)
        steps = mask.cumsum(1)
        positions = (prefix.next_position[:, None] + steps - 1).clamp(min=0)  # [B, L]
        attention_mask = torch.cat([prefix.attention_mask, mask], dim=1)
        hidden = self._base(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=positions.expand(3, -1, -1) if self.family.positions == "mrope" else positions,
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state
        column = (mask * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(1)  # 0: no real token
        newest = hidden[torch.arange(len(tokens), device=tokens.device), (column - 1).clamp(min=0)]
        return hidden, Prefix(
            cache=prefix.cache,
            attention_mask=attention_mask,
            next_position=prefix.next_position + steps[:, -1],
            hidden=torch.where((column > 0)[:, None], newest, prefix.hidden),
        )

    def fork(self, prefix: Prefix, rows: Tensor | None = None) -> Prefix:
        """An independent copy of a prefix, or of its given rows [R] int64 (a row may repeat).

        Without rows no tensor is copied, because the cache's layers never grow in place but make new tensors.
        """
        cache = copy.copy(prefix.cache)
        cache.layers = [copy.copy(layer) for layer in prefix.cache.layers]
        if rows is None:
            return Prefix(cache, prefix.attention_mask, prefix.next_position, prefix.hidden)
        cache.batch_select_indices(rows)
        return Prefix(cache, prefix.attention_mask[rows], prefix.next_position[rows], prefix.hidden[rows])

    def join(self, prefixes: Sequence[Prefix]) -> Prefix:
        """Joins the rows of several prefixes into one prefix; shorter ones get masked columns on the left."""
        width = max(prefix.attention_mask.shape[1] for prefix in prefixes)
        cache = copy.copy(prefixes[0].cache)
        cache.layers = [_joined(layers) for layers in zip(*(prefix.cache.layers for prefix in prefixes), strict=True)]
        masks = [pad(prefix.attention_mask, (width - prefix.attention_mask.shape[1], 0)) for prefix in prefixes]
        return Prefix(
            cache=cache,
            attention_mask=torch.cat(masks),
            next_position=torch.cat([prefix.next_position for prefix in prefixes]),
            hidden=torch.cat([prefix.hidden for prefix in prefixes]),
        )

    def token_id(self, token: str) -> int:
        """Id of one of the special tokens ``<think>``, ``</think>``, ``<emb>``."""
        return self.processor.ids[token]

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """Limits of the picture area (for some families sides), and a digest of all files that shape a prompt.

        These files are chat template, tokenizer and picture processor.
        """
        return {
            "picture_size": dict(getattr(self.image_processor, "size", None) or {}),
            "processing": self._processing_digest,
        }

    @functools.cached_property
    def _processing_digest(self) -> str:
        pictures = json.loads(self.image_processor.to_json_string())
        # These fields describe the file and do not change what it does. They differ between a model and its saved copy.
        own = {name: value for name, value in pictures.items() if not name.endswith(("_type", "_class", "_path"))}
        tokenizer = self.processor.tokenizer.backend_tokenizer.to_str()
        return digest([self.processor.chat_template, tokenizer, own])

    @property
    def joins_prefixes(self) -> bool:
        """Whether every layer of the cache holds only keys and values."""
        layers = DynamicCache(config=self.model.config.get_text_config()).layers
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    @property
    def keeps_cache_in_training(self) -> bool:
        """False with gradient checkpointing, for which the library switches caches off."""
        return not self.gradient_checkpointing

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the tokenizer's other special tokens. Each of them ends a rationale, as ``</think>`` does."""
        own = set(self.processor.ids.values())
        known = self.processor.tokenizer.added_tokens_decoder.items()
        return tuple(number for number, token in known if token.special and number not in own)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens and outer blanks."""
        return str(self.processor.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text as `prepare` makes them. Special tokens spelt out in it become ordinary characters."""
        return self.processor.tokenize(text)

    def count_tokens(self, text: str) -> int:
        """Length of a text in tokens, not counting special tokens."""
        return self.processor.count_tokens(text)

    @property
    def has_adapters(self) -> bool:
        """Whether the model has LoRA adapters that can be switched off."""
        return self.lora is not None

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Switches the adapters off while the context lasts, so the base model answers.

        Without LoRA nothing changes.
        """
        if self.lora is None:
            yield
            return
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def save(self, folder: Path) -> None:
        """Writes weights (safetensors), config and processor to a folder that can be loaded by its path.

        Adapters are merged into the weights. The folder changes only when everything has been written.

        Raises:
            ValueError: the weights are quantised, so merging would lose what the adapters learned.
        """
        if getattr(self.model, "is_quantized", False):
            raise ValueError("a quantised backbone cannot be saved as a model; keep its training checkpoint instead")
        with whole_folder(folder) as temporary:
            with tuning.merged(self.model) as state, loading.without_bars():
                self.model.save_pretrained(temporary, state_dict=state)
            self.processor.tokenizer.chat_template = self.processor.chat_template
            self.processor.tokenizer.save_pretrained(temporary)
            self.image_processor.save_pretrained(temporary)
            (temporary / loading.MARKER).write_text(json.dumps({"origin": self.identity_origin}), encoding="utf-8")

    @property
    def identity(self) -> str:
        """Model id, revision and a digest of the architecture: ``name@revision#digest``."""
        return self._identity

    @property
    def _base(self) -> Any:
        """The model without its vocabulary head; it returns states after the final norm."""
        return self.model.model


def _joined(layers: Sequence[Any]) -> Any:
    """Joins one layer of several caches: keys and values [B, heads, T, width], with the newest column last in each."""
    joined = copy.copy(layers[0])
    columns = max(layer.keys.shape[-2] for layer in layers)
    for name in ("keys", "values"):
        parts = [getattr(layer, name) for layer in layers]
        setattr(joined, name, torch.cat([pad(part, (0, 0, columns - part.shape[-2], 0)) for part in parts]))
    if joined.is_sliding:  # a sliding layer has seen more columns than it keeps
        joined.cumulative_length = max(layer.cumulative_length for layer in layers)
    return joined


def _set_pixels(image_processor: Any, *, min_pixels: int | None, max_pixels: int | None, model: str) -> None:
    changes: Mapping[str, int | None] = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    wanted = {key: value for key, value in changes.items() if value is not None}
    if not wanted:
        return
    size = image_processor.size
    if not (hasattr(image_processor, "patch_size") and hasattr(image_processor, "merge_size")):
        raise ValueError(f"backbone model {model!r} sizes its pictures itself; remove min_pixels and max_pixels")
    for key, value in wanted.items():
        size[key] = value
