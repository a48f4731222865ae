"""Fixtures: tiny models of every supported family, with random weights, as folders made once per test session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from mmemb.interfaces import Backbone

WORDS = "red green apple dog cat flag scene what is shown left of the picture peso chile and a , ? answer find"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SMOL_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _tokenizer(specials: tuple[str, ...], image: str, end: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=specials[0], eos_token=end, extra_special_tokens=list(specials)
    )
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}" + end + "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def _qwen(family: str, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

    ids = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image_token", "image_pad"),
            ("vision_start_token", "vision_start"),
            ("vision_end_token", "vision_end"),
        )
    }
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": MROPE}
    text |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    if family == "qwen2_vl":
        vision = {"embed_dim": 16, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
        return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    if family == "qwen2_5_vl":
        vision = {
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        }
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    vision = {
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text |= {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def _make(family: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, SmolVLMConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    if family == "smolvlm":
        tokenizer = _tokenizer(SMOL_SPECIALS, "<image>", "<end_of_utterance>")
        config: Any = SmolVLMConfig(
            text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            tie_word_embeddings=False,
        )
        processor: Any = SmolVLMImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
        )
    else:
        tokenizer = _tokenizer(SPECIALS, "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>")
        config = _qwen(family, tokenizer)
        processor = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model_folder("qwen2_vl")``: a folder with a tiny model of the family, made at the first call."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            _make(family, made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def make_backbone(model_folder: Callable[[str], Path]) -> Callable[..., Backbone]:
    """``make_backbone("tiny" or a family, **arguments)``: a fresh backbone in evaluation mode."""
    from mmemb.components.backbones.tiny import TinyBackbone
    from mmemb.components.backbones.transformers import TransformersBackbone

    def make(family: str, **arguments: Any) -> Backbone:
        if family == "tiny":
            return TinyBackbone(**{"weights": "random", **arguments}).eval()
        return TransformersBackbone(str(model_folder(family)), **arguments).eval()

    return make


@pytest.fixture(scope="session")
def picture() -> Callable[..., PILImage.Image]:
    """``picture(width, height, seed)``: noise that is smooth enough to be resized without large changes."""
    import numpy as np

    def make(width: int = 64, height: int = 64, seed: int = 0) -> PILImage.Image:
        noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        return PILImage.fromarray(noise).resize((width, height), PILImage.Resampling.BICUBIC)

    return make
