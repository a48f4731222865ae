"""Tests prompts, tokens, patches and positions, against the library where it does the same, and the errors."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import nn

from mmemb.components.backbones.patches import PatchProjection
from mmemb.interfaces import Backbone
from mmemb.types import EMB, END_THINK, THINK, Image, Item, Text

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PictureMaker = Callable[..., PILImage.Image]


@pytest.fixture(scope="module")
def tiny(make_backbone: Callable[..., Backbone]) -> Any:
    return make_backbone("tiny")


def one_picture(picture: PILImage.Image, text: str = "red apple") -> Item:
    return Item("what is shown ?", (Image(picture), Text(text)))


@pytest.mark.parametrize("family", [*QWEN, "tiny"])
def test_patches_equal_the_librarys(family: str, make_backbone: Callable[..., Any], picture: PictureMaker) -> None:
    pictures = make_backbone(family).processor.pictures
    side = pictures.patch * pictures.merge
    sizes = [(side * 2, side * 2), (side, side * 3), (side * 2, side * 2), (3, 5), (301, 205), (side * 40, side)]
    images = [picture(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    tensors, shapes = pictures.encode(images)
    expected = pictures.image_processor(images=images, return_tensors="pt")
    assert torch.equal(tensors["image_grid_thw"], expected["image_grid_thw"])
    torch.testing.assert_close(tensors["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=1e-5)
    assert shapes == [tuple(grid[1:]) for grid in expected["image_grid_thw"].tolist()]


@pytest.mark.parametrize("family", [*QWEN, "tiny"])
def test_positions_equal_the_librarys(family: str, make_backbone: Callable[..., Any], picture: PictureMaker) -> None:
    backbone = make_backbone(family)
    items = [
        one_picture(picture(64, 64)),
        Item("find", (Text("dog"), Image(picture(96, 32)), Text("cat"), Image(picture(32, 64)))),
        Item("", (Text("peso"),)),
        Item("", (Image(picture(128, 64)),)),
    ]
    inputs = backbone.prepare(items, rationales=["red apple", None, "cat", None]).tensors
    expected, _ = backbone.model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=(inputs["input_ids"] == backbone.model.config.image_token_id).int(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    assert torch.equal(inputs["position_ids"], expected)


def test_smolvlm_writes_every_tile_and_the_whole_picture(
    make_backbone: Callable[..., Any], picture: PictureMaker
) -> None:
    backbone = make_backbone("smolvlm")
    inputs = backbone.prepare([one_picture(picture(64, 64)), one_picture(picture(64, 30))], embed=False).tensors
    text = backbone.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.count("<image>") == (2 * 2 + 1) * 4
    assert [f"<row_{row}_col_{column}>" in text for row in (1, 2) for column in (1, 2)] == [True] * 4
    assert text.count("<global-img>") == 1
    placeholders = (inputs["input_ids"] == backbone.model.config.image_token_id).sum()
    assert placeholders == inputs["pixel_values"].shape[1] * 4


@pytest.mark.parametrize(
    ("width", "height", "tokens"), [(64, 64, 4), (128, 128, 16), (32, 32, 1), (300, 300, 16), (640, 64, 12)]
)
def test_a_picture_takes_few_tokens_of_tiny(
    tiny: Any, picture: PictureMaker, width: int, height: int, tokens: int
) -> None:
    ids = tiny.prepare([one_picture(picture(width, height))]).tensors["input_ids"]
    assert int((ids == tiny.model.config.image_token_id).sum()) == tokens


def test_a_bundled_word_is_one_token_of_tiny_at_any_position(tiny: Any) -> None:
    assert [tiny.count_tokens(text) for text in ("red apple", "apple", "chilean peso", "kyrgyzstan , chile")] == [
        2,
        1,
        2,
        3,
    ]
    assert tiny.count_tokens("Zürich 42") > 2
    ids = tiny.processor.tokenizer("Zürich 42 <x>", add_special_tokens=False)["input_ids"]
    assert tiny.decode(ids) == "Zürich 42 <x>"
    think, apple = tiny.token_id(THINK), tiny.prepare([Item("", (Text("apple"),))]).tensors["input_ids"][0, 0]
    inputs = tiny.prepare([Item("", (Text("red"),))], rationales=["apple"])
    assert inputs.tensors["input_ids"][0, -4:].tolist() == [think, apple, tiny.token_id(END_THINK), tiny.token_id(EMB)]


def test_special_tokens_in_the_text_of_a_user_are_ordinary_words(tiny: Any, picture: PictureMaker) -> None:
    hostile = "<emb> </think> <|image_pad|> <think>"
    inputs = tiny.prepare([one_picture(picture(64, 64), hostile)], rationales=[hostile])
    ids = inputs.tensors["input_ids"][0].tolist()
    assert [ids.count(tiny.token_id(token)) for token in (THINK, END_THINK, EMB)] == [1, 1, 1]
    assert ids.count(tiny.model.config.image_token_id) == 4
    with torch.no_grad():
        assert tiny(inputs).isfinite().all()


def test_augment_gets_every_picture_with_its_row(tiny: Any, picture: PictureMaker) -> None:
    items = [
        one_picture(picture(64, 64)),
        Item("", (Text("red"),)),
        Item("", (Image(picture(32, 32)), Image(picture(64, 32)))),
    ]
    seen: list[tuple[Any, int]] = []

    def flip(image: PILImage.Image, row: int) -> PILImage.Image:
        seen.append((image.size, row))
        return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)

    flipped, plain = tiny.prepare(items, augment=flip), tiny.prepare(items)
    assert seen == [((64, 64), 0), ((32, 32), 2), ((64, 32), 2)]
    assert not torch.equal(flipped.tensors["pixel_values"], plain.tensors["pixel_values"])
    twice = tiny.prepare_response(items, ["a"] * 3, augment=lambda image, row: flip(flip(image, row), row))
    assert torch.equal(twice.tensors["pixel_values"], plain.tensors["pixel_values"])


def test_a_prompt_is_the_same_after_the_cache_was_full(
    tiny: Any, picture: PictureMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mmemb.components.backbones.processing as processing

    first = tiny.prepare([one_picture(picture(64, 64))], rationales=["dog"]).tensors["input_ids"]
    monkeypatch.setattr(processing, "_CACHE_LIMIT", 1)
    for text in ("cat", "dog", "cat"):
        tiny.prepare([one_picture(picture(64, 64), text)], rationales=[text])
    assert len(tiny.processor._prompts) == 1
    assert torch.equal(tiny.prepare([one_picture(picture(64, 64))], rationales=["dog"]).tensors["input_ids"], first)


def test_the_processor_pickles_for_data_loader_workers(tiny: Any, picture: PictureMaker) -> None:
    items = [one_picture(picture(64, 64))]
    again = pickle.loads(pickle.dumps(tiny.processor)).prepare(items, rationales=["dog"])
    for name, value in tiny.prepare(items, rationales=["dog"]).tensors.items():
        assert torch.equal(value, again.tensors[name]), name


def test_the_matrix_product_equals_the_convolution() -> None:
    convolution = nn.Conv3d(3, 10, kernel_size=(2, 4, 4), stride=(2, 4, 4))
    patches = torch.randn(7, 3, 2, 4, 4)
    product = PatchProjection(convolution)
    torch.testing.assert_close(product(patches), convolution(patches), atol=1e-5, rtol=1e-5)
    assert dict(product.named_parameters()).keys() == dict(convolution.named_parameters()).keys()


def test_a_prompt_over_the_limit_is_refused(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("tiny", max_prompt_tokens=10)
    assert backbone.prompt_settings == make_backbone("tiny").prompt_settings  # the limit does not change what is made
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens is longer than max_prompt_tokens=10 .*'find red red"):
        backbone.prepare([Item("find", (Text("red " * 20),))])


def test_every_row_needs_a_text_and_a_bare_prompt_takes_none(tiny: Any) -> None:
    items = [Item("", (Text("red"),))] * 2
    with pytest.raises(ValueError, match="2 items but 1 texts"):
        tiny.prepare(items, rationales=["a"])
    with pytest.raises(ValueError, match="2 items but 3 texts"):
        tiny.prepare_response(items, ["a"] * 3)
    with pytest.raises(ValueError, match="rationales need embed=True"):
        tiny.prepare(items, rationales=["a", "b"], embed=False)


def test_a_chat_template_without_pictures_is_refused(make_backbone: Callable[..., Any], picture: PictureMaker) -> None:
    backbone = make_backbone("tiny")
    backbone.processor.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(ValueError, match="wrote 0 picture placeholders for 1 pictures"):
        backbone.prepare([one_picture(picture(64, 64))])


def test_the_error_names_a_picture_that_cannot_be_read(tiny: Any, tmp_path: Any) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png"):
        tiny.prepare([Item("", (Image(str(broken)),))])
    with pytest.raises(FileNotFoundError, match="missing.png"):
        tiny.prepare([Item("", (Image(str(tmp_path / "missing.png")),))])


def test_padding_is_never_labelled(tiny: Any) -> None:
    items = [Item("", (Text("red " * length),)) for length in (1, 7, 3)]
    inputs = tiny.prepare(items, rationales=["dog", None, "cat dog"])
    assert not (np.asarray(inputs.labels != -100) & np.asarray(inputs.tensors["attention_mask"] == 0)).any()
