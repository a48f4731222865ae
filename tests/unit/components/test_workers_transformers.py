"""Tests that the transformers worker loads its own model, asks it to reason, and samples as the `model` worker does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mmemb.components.backbones.tiny import FOLDER, TinyBackbone
from mmemb.components.backbones.transformers import TransformersBackbone
from mmemb.components.workers._prompts import thought
from mmemb.components.workers.model import ModelWorker
from mmemb.components.workers.transformers import TransformersWorker
from mmemb.types import Image, Item, Text

ITEMS = [
    Item("what is shown ?", (Image("bundled:noto/1f921"),), {"rationale": "clown face"}),
    Item("what is", (Text("the capital of chile"),), {"rationale": "santiago"}),
]


def worker(model: str | Path = FOLDER, **options: object) -> TransformersWorker:
    settings = {"dtype": "float32", "max_new_tokens": 8, "instruction": "say it", **options}
    return TransformersWorker(str(model), **settings)  # type: ignore[arg-type]


def test_it_writes_the_same_as_the_model_worker_for_the_same_prompt() -> None:
    prompts = [Item(item.instruction, (*item.parts, Text("say it"))) for item in ITEMS]
    mine = worker(style="thinking", temperature=0.7).propose(ITEMS, 3, seed=4)
    theirs = ModelWorker(TinyBackbone().eval(), instruction=None, temperature=0.7, max_new_tokens=8).propose(
        prompts, 3, seed=4
    )
    assert [[each.text for each in found] for found in mine] == [[each.text for each in found] for found in theirs]
    assert [[each.seed for each in found] for found in mine] == [[each.seed for each in found] for found in theirs]
    assert any(mine)


def test_it_releases_its_model_and_writes_the_same_after_loading_it_again() -> None:
    made = worker(style="thinking")
    before = made.propose(ITEMS, 2, seed=0)
    assert all(before)
    made.release()
    assert made._backbone is None
    assert made.propose(ITEMS, 2, seed=0) == before


def test_settings_include_the_picture_limit_and_not_the_prompt_limit() -> None:
    assert worker(max_pixels=4096).settings != worker().settings
    assert worker(max_prompt_tokens=64).settings == worker().settings


def test_an_instruct_model_writes_without_the_opening_bracket() -> None:
    thinking = worker(style="thinking").propose(ITEMS, 4, seed=0)
    plain = worker(style="instruct").propose(ITEMS, 4, seed=0)
    assert [[each.text for each in found] for found in plain] != [[each.text for each in found] for found in thinking]
    assert any(plain)  # the small model knows only rationales in brackets, so some texts may be empty


def test_settings_identify_the_model_without_loading_it(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "tiny")
    one = worker(tmp_path / "tiny", style="thinking")
    before = one.settings
    assert one._backbone is None
    assert before["model"] == one.propose(ITEMS, 1, seed=0)[0][0].model
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    save_file({name: value * 1.01 for name, value in weights.items()}, tmp_path / "tiny" / "model.safetensors")
    assert worker(tmp_path / "tiny").settings["weights"] != before["weights"]
    assert worker(tmp_path / "tiny").settings["model"] == before["model"]


def test_settings_depend_on_the_files_that_shape_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(FOLDER, folder)
    before, shown = worker(folder).settings, TransformersBackbone(str(folder)).prompt_settings
    assert TransformersBackbone(str(folder)).prompt_settings == shown
    template = folder / "chat_template.jinja"
    template.write_text("be brief . " + template.read_text(encoding="utf-8"), encoding="utf-8")
    assert TransformersBackbone(str(folder)).prompt_settings != shown
    after = worker(folder).settings
    assert {name for name in after if after[name] != before[name]} == {"processing"}


def test_error_messages_name_the_mistake() -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        worker("/no/such/model").propose(ITEMS, 1, seed=0)
    with pytest.raises(ValueError, match="style is 'loud'; give instruct"):
        worker(style="loud")
    with pytest.raises(ValueError, match=r"workers\.transformers\.batch_size is 0; give 1 or more"):
        worker(batch_size=0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a red apple", "a red apple"),
        ("<think>long thought</think> a red apple", "a red apple"),
        ("long thought </think>\n a red apple ", "a red apple"),
        ("<think>a red apple</think>", "a red apple"),
        ("a <emb> red apple", "a   red apple"),
    ],
)
def test_brackets_are_removed_from_an_answer(answer: str, expected: str) -> None:
    assert thought(answer) == expected
