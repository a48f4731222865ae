"""Makes the folder of the ``tiny`` backbone (config, tokenizer, chat template, image processor) or packs its weights.

    python tools/build_tiny.py skeleton               # everything but the weights, from the bundled texts
    python tools/build_tiny.py pack runs/tiny/export  # weights of a saved backbone, in half precision

The tokenizer is a byte-level BPE with few merges, and the words of the bundled texts are added whole. So a rationale is
short, which matters because decoding is a loop in Python, and a name is learned as one token. Words include their
leading blank even at the start of a text, so a word is the same token at any position. Other texts use the merges and
bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmemb.common.files import whole_file, write_text

FOLDER = Path(__file__).resolve().parent.parent / "components" / "backbones" / "tiny"
VOCABULARY = 1536
MERGES = 150
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
    "<emb>",
)
# One token opens a picture and one closes the prompt (its state predicts the decision). More tokens would cost time.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "{% else %}{% if not loop.first %} {% endif %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
)


def build_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE with few merges, and adds the most frequent words of the corpus whole."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lines = list(corpus)
    words = Counter(word for line in lines for word, _ in split.pre_tokenize_str(line))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIALS) + 256 + MERGES,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    description = json.loads(tokenizer.to_str())
    description["model"]["ignore_merges"] = True  # words of the vocabulary stay whole; the merges are for the others
    vocabulary = description["model"]["vocab"]
    for word, _ in sorted(words.items(), key=lambda entry: (-entry[1], entry[0])):
        if len(vocabulary) >= VOCABULARY:
            break
        vocabulary.setdefault(word, len(vocabulary))
    return Tokenizer.from_str(json.dumps(description))


def build_config(tokenizer: Tokenizer) -> dict[str, object]:
    """Config of a Qwen3-VL with 4 decoder layers of width 160 and a picture encoder of 2 blocks of width 128."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIALS}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 160,
            "intermediate_size": 448,
            "num_hidden_layers": 4,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "initializer_range": 0.05,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "hidden_size": 128,
            "depth": 2,
            "num_heads": 4,
            "intermediate_size": 256,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [],
            "out_hidden_size": 160,
            "initializer_range": 0.05,
        },
    }


def skeleton(folder: Path, corpus: Iterable[str]) -> None:
    """Writes everything but the weights.

    Raises:
        ValueError: the folder has weights already. They know tokens by number, and other texts make another tokenizer.
    """
    if (weights := folder / "model.safetensors").exists():
        raise ValueError(f"{weights}: weights of the current tokenizer exist; delete them to build a new one")
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIALS),
        padding_side="left",
        model_max_length=1024,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=128 * 128
    ).save_pretrained(folder)
    write_text(folder / "config.json", json.dumps(build_config(tokenizer), indent=2) + "\n")
    write_text(folder / "backbone.json", json.dumps({"origin": "tiny@1"}) + "\n")


def pack(source: Path, folder: Path) -> None:
    """Copies the weights of a saved backbone into the folder in half precision."""
    import torch
    from safetensors.torch import load_file, save_file

    state = {
        name: value.to(torch.float16).contiguous() for name, value in load_file(source / "model.safetensors").items()
    }
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("skeleton", help="config, tokenizer, chat template, image processor")
    packing = commands.add_parser("pack", help="trained weights, in half precision")
    packing.add_argument("source", type=Path, help="folder of a saved backbone")
    arguments = parser.parse_args()
    if arguments.command == "skeleton":
        from mmemb.data.bundled import all_texts

        try:
            skeleton(FOLDER, all_texts())
        except ValueError as error:
            sys.exit(str(error))
    else:
        pack(arguments.source, FOLDER)


if __name__ == "__main__":
    main()
