"""Tests that every family keeps the `Backbone` contract, with tiny random models and the bundled `tiny`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemb.components.backbones.tuning import LoraSettings
from mmemb.interfaces import Backbone
from mmemb.types import EMB, END_THINK, THINK, Image, Item, ModelInputs, Page, Text, Video

ALL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "tiny")
TOLERANCE = 1e-4  # float32: sums in another order


@pytest.fixture(scope="module", params=ALL)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backbone(family: str, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(family)


@pytest.fixture
def items(picture: Callable[..., Any]) -> list[Item]:
    """A mixed batch: one picture, pictures of odd sizes with text, text only, frames, and a page with text."""
    return [
        Item("what is shown", (Image(picture(64, 64, 1)),)),
        Item("find", (Image(picture(96, 32, 2)), Text("left of the"), Image(picture(80, 50, 3)))),
        Item("", (Text("peso of chile ?"),)),
        Item("what is left", (Video((picture(32, 32, 4), picture(32, 64, 5))),)),
        Item("what is left", (Page(picture(100, 120, 6)), Text("red dog"))),
    ]


def embed(backbone: Backbone, inputs: ModelInputs) -> Tensor:
    with torch.no_grad():
        return backbone(inputs)[torch.arange(len(inputs)), inputs.emb_position]


def test_direct_rows_end_in_emb_and_only_emb_is_labelled(backbone: Backbone, items: list[Item]) -> None:
    inputs = backbone.prepare(items)
    emb = backbone.token_id(EMB)
    width = inputs.tensors["input_ids"].shape[1]
    assert inputs.emb_position.tolist() == [width - 1] * len(items)
    assert inputs.tensors["input_ids"][:, -1].tolist() == [emb] * len(items)
    assert (inputs.tensors["attention_mask"].diff(dim=1) >= 0).all()  # left-padded
    assert inputs.labels[:, -1].tolist() == [emb] * len(items)
    assert (inputs.labels[:, :-1] == -100).all()


def test_in_reasoned_rows_decision_rationale_and_both_ends_are_labelled(backbone: Backbone, items: list[Item]) -> None:
    inputs = backbone.prepare(items[:2], rationales=["red apple", None])
    think, end, emb = (backbone.token_id(token) for token in (THINK, END_THINK, EMB))
    labelled = [row[row != -100].tolist() for row in inputs.labels]
    assert labelled[0][0] == think
    assert labelled[0][-2:] == [end, emb]
    assert backbone.decode(labelled[0]) == "red apple"
    assert len(labelled[0]) == 3 + backbone.count_tokens("red apple")
    assert labelled[1] == [emb]
    kept = inputs.labels != -100
    assert torch.equal(inputs.labels[kept], inputs.tensors["input_ids"][kept])


def test_a_bare_prompt_has_no_emb_and_no_labels(backbone: Backbone, items: list[Item]) -> None:
    bare, full = backbone.prepare(items, embed=False), backbone.prepare(items)
    assert (bare.emb_position == -1).all()
    assert (bare.labels == -100).all()
    assert torch.equal(bare.tensors["input_ids"], full.tensors["input_ids"][:, :-1])


def test_in_a_response_prompt_and_decision_are_not_labelled(backbone: Backbone, items: list[Item]) -> None:
    inputs = backbone.prepare_response(items, ["dog"] * len(items))
    ids, labels = inputs.tensors["input_ids"], inputs.labels
    count = backbone.count_tokens("dog")
    assert (ids[:, -count - 2] == backbone.token_id(THINK)).all()
    assert (labels[:, : -count - 1] == -100).all()
    assert torch.equal(labels[:, -count - 1 :], ids[:, -count - 1 :])
    assert (labels[:, -1] == backbone.token_id(END_THINK)).all()
    assert (inputs.emb_position == -1).all()


def test_a_long_rationale_is_cut(family: str, make_backbone: Callable[..., Backbone]) -> None:
    short = make_backbone(family, max_rationale_tokens=5)
    assert short.max_rationale_tokens == 5
    inputs = short.prepare([Item("", (Text("dog"),))], rationales=["red apple dog cat " * 20])
    assert int((inputs.labels != -100).sum()) == 5 + 3


def test_states_and_logits_have_their_shapes(backbone: Backbone, items: list[Item]) -> None:
    inputs = backbone.prepare(items, rationales=["red"] * len(items))
    with torch.no_grad():
        hidden = backbone(inputs)
        logits = backbone.logits(hidden[:, -2:])
    assert hidden.shape == (*inputs.tensors["input_ids"].shape, backbone.hidden_size)
    assert logits.shape[:2] == (len(items), 2)
    assert logits.shape[2] > backbone.token_id(EMB)
    assert hidden.isfinite().all()


def test_logits_are_those_of_the_whole_model(backbone: Backbone, items: list[Item]) -> None:
    inputs = backbone.prepare(items)
    with torch.no_grad():
        expected = backbone.model(**inputs.tensors).logits
        torch.testing.assert_close(backbone.logits(backbone(inputs)), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_preparing_is_deterministic_and_pictures_matter(backbone: Backbone, items: list[Item]) -> None:
    first, second = backbone.prepare(items), backbone.prepare(items)
    for name, value in first.tensors.items():
        assert torch.equal(value, second.tensors[name]), name
    other = [Item(items[0].instruction, items[4].parts[:1])]
    assert (embed(backbone, backbone.prepare(items[:1])) - embed(backbone, backbone.prepare(other))).abs().max() > 1e-3


def test_a_row_alone_equals_the_row_in_a_batch(backbone: Backbone, items: list[Item]) -> None:
    rationales = ["red apple", None, "dog and cat and flag", None, "peso"]
    together = embed(backbone, backbone.prepare(items, rationales=rationales))
    for row, item in enumerate(items):
        alone = embed(backbone, backbone.prepare([item], rationales=[rationales[row]]))
        torch.testing.assert_close(alone[0], together[row], atol=TOLERANCE, rtol=TOLERANCE)


def test_extending_a_prefix_equals_encoding_again(backbone: Backbone, items: list[Item]) -> None:
    texts = ["red apple", "dog and cat", "peso", "a flag", "left"]
    direct = embed(backbone, backbone.prepare(items))
    reasoned = embed(backbone, backbone.prepare(items, rationales=texts))
    emb = torch.full((len(items), 1), backbone.token_id(EMB))
    with torch.no_grad():
        prefix = backbone.prefill(backbone.prepare(items, embed=False))
        torch.testing.assert_close(
            backbone.extend(backbone.fork(prefix), emb)[0][:, -1], direct, atol=TOLERANCE, rtol=TOLERANCE
        )
        # Rows of unequal length, token by token, right-padded under a mask.
        labels = backbone.prepare(items, rationales=texts).labels
        tails = [row[row != -100][:-1] for row in labels]
        longest = max(len(tail) for tail in tails)
        tokens, mask = torch.zeros(len(items), longest, dtype=torch.int64), torch.zeros(len(items), longest).long()
        for row, tail in enumerate(tails):
            tokens[row, : len(tail)], mask[row, : len(tail)] = tail, 1
        going = backbone.fork(prefix)
        for column in range(longest):
            _, going = backbone.extend(going, tokens[:, column : column + 1], mask[:, column : column + 1])
        at_once, block = backbone.extend(backbone.fork(prefix), tokens, mask)
        assert torch.equal(going.next_position, block.next_position)
        torch.testing.assert_close(going.hidden, block.hidden, atol=TOLERANCE, rtol=TOLERANCE)
        ends = at_once[torch.arange(len(items)), mask.sum(1) - 1]
        torch.testing.assert_close(block.hidden, ends, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(backbone.extend(going, emb)[0][:, -1], reasoned, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_fork_of_rows_is_independent_and_may_repeat_them(backbone: Backbone, items: list[Item]) -> None:
    emb, think = backbone.token_id(EMB), backbone.token_id(THINK)
    rows = torch.tensor([3, 0, 3])
    with torch.no_grad():
        prefix = backbone.prefill(backbone.prepare(items, embed=False))
        expected = embed(backbone, backbone.prepare(items))
        chosen = backbone.fork(prefix, rows)
        torch.testing.assert_close(chosen.hidden, prefix.hidden[rows])
        backbone.extend(backbone.fork(chosen), torch.full((3, 2), think))  # must not change the others
        out, _ = backbone.extend(chosen, torch.full((3, 1), emb))
        torch.testing.assert_close(out[:, -1], expected[rows], atol=TOLERANCE, rtol=TOLERANCE)
        out, _ = backbone.extend(backbone.fork(prefix), torch.full((5, 1), emb))
        torch.testing.assert_close(out[:, -1], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_masked_extension_leaves_the_row_as_it_was(backbone: Backbone, items: list[Item]) -> None:
    emb = torch.full((2, 1), backbone.token_id(EMB))
    with torch.no_grad():
        prefix = backbone.prefill(backbone.prepare(items[:2], embed=False))
        mask = torch.tensor([[0, 0], [1, 1]])
        _, going = backbone.extend(backbone.fork(prefix), torch.full((2, 2), backbone.token_id(THINK)), mask)
        assert (going.next_position - prefix.next_position).tolist() == [0, 2]
        assert torch.equal(going.hidden[0], prefix.hidden[0])
        out, _ = backbone.extend(going, emb)
    torch.testing.assert_close(
        out[0, -1], embed(backbone, backbone.prepare(items[:1]))[0], atol=TOLERANCE, rtol=TOLERANCE
    )


def test_a_saved_and_loaded_model_is_the_same(
    family: str, make_backbone: Callable[..., Backbone], items: list[Item], tmp_path: Path
) -> None:
    from mmemb.components.backbones.transformers import TransformersBackbone

    backbone = make_backbone(family)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.01)
    backbone.save(tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    pixels = {"max_prompt_tokens": 512}
    again = TransformersBackbone(str(tmp_path / "saved"), **pixels).eval()
    assert again.identity == backbone.identity
    assert again.prompt_settings == backbone.prompt_settings
    inputs, same = (
        backbone.prepare(items, rationales=["red apple"] * 5),
        again.prepare(items, rationales=["red apple"] * 5),
    )
    for name, value in inputs.tensors.items():
        assert torch.equal(value, same.tensors[name]), name
    assert torch.equal(embed(backbone, inputs), embed(again, same))


def test_adapters_learn_switch_off_and_merge(
    family: str, make_backbone: Callable[..., Backbone], items: list[Item], tmp_path: Path
) -> None:
    from mmemb.components.backbones.transformers import TransformersBackbone

    plain = make_backbone(family)
    backbone = make_backbone(family, lora=LoraSettings(rank=4, alpha=8))
    inputs = backbone.prepare_response(items, ["red apple"] * len(items))
    before = backbone(inputs).detach()
    torch.testing.assert_close(before, plain(inputs), atol=TOLERANCE, rtol=TOLERANCE)  # a new adapter changes nothing
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trained
    assert not [name for name in trained if "visual" in name or "vision" in name]
    losses = train(backbone, inputs, steps=5)
    assert losses[-1] < losses[0]
    after = backbone(inputs).detach()
    assert (after - before).abs().max() > 1e-3
    with backbone.without_adapters(), torch.no_grad():
        torch.testing.assert_close(backbone(inputs), before, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(backbone(inputs), after)
    assert backbone.identity == plain.identity
    backbone.save(tmp_path / "merged")
    merged = TransformersBackbone(str(tmp_path / "merged"), max_prompt_tokens=512)
    with torch.no_grad():
        torch.testing.assert_close(merged(inputs), after, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(backbone(inputs), after)  # saving does not change the adapters


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_learns_through_adapters(
    quantization: str, family: str, make_backbone: Callable[..., Backbone], items: list[Item], tmp_path: Path
) -> None:
    from mmemb.components.backbones.transformers import TransformersBackbone

    make_backbone(family).save(tmp_path / "base")
    backbone = TransformersBackbone(
        str(tmp_path / "base"), quantization=quantization, lora=LoraSettings(rank=4, alpha=16), max_prompt_tokens=512
    )
    kinds = {type(module).__name__ for module in backbone.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    inputs = backbone.prepare_response(items[:3], ["red apple"] * 3)
    with torch.no_grad():
        backbone.eval()(inputs)  # a validation before training must not end training
    losses = train(backbone.train(), inputs, steps=10)
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(ValueError, match="quantised backbone cannot be saved"):
        backbone.save(tmp_path / "out")


def test_the_whole_model_learns(family: str, make_backbone: Callable[..., Backbone], items: list[Item]) -> None:
    backbone = make_backbone(family)
    losses = train(backbone, backbone.prepare_response(items, ["red apple"] * len(items)), steps=5, rate=1e-3)
    assert losses[-1] < losses[0]
    untouched = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    allowed = ("post_layernorm", "layers.1", "blocks.1")  # no layers after the states that the decoder reads
    assert not [name for name in untouched if not any(part in name for part in allowed)], untouched


def train(backbone: Backbone, inputs: ModelInputs, *, steps: int, rate: float = 1e-2) -> list[float]:
    """Trains on one batch and returns the next-token loss of each step."""
    optimizer = torch.optim.Adam([p for p in backbone.parameters() if p.requires_grad], lr=rate)
    target = inputs.labels[:, 1:]
    losses = []
    for _ in range(steps):
        states = backbone(inputs)[:, :-1][target != -100]
        loss = torch.nn.functional.cross_entropy(backbone.logits(states).float(), target[target != -100])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
