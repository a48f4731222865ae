"""Tests that workers read only the item, keep to k and the seed, and name a missing field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

from mmemb.common.digests import item_digest, module_digest
from mmemb.components.backbones.tiny import FOLDER
from mmemb.components.workers.metadata import MetadataWorker
from mmemb.components.workers.model import ModelWorker
from mmemb.interfaces import Model, SetupContext, Worker
from mmemb.registry import available, create
from mmemb.types import EMB, END_THINK, THINK, Image, Item, Text
from tests.unit.components.chat_server import chat_server
from tests.unit.inference.fakes import FakeBackbone, FakePooler

ITEMS = [
    Item("what is", (Text("the currency of chile"),), {"rationale": "chile peso", "country": "chile"}),
    Item("what is", (Image("bundled:noto/1f921"), Text("the capital")), {"rationale": "peru lima", "country": "peru"}),
    Item("", (Image("bundled:noto/1f47b"),), {"rationale": "red apple", "country": ""}),
]


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """The arguments without which a worker cannot be built."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with chat_server() as server:
        yield {
            "openai": {"model": "m", "base_url": server.url},
            "transformers": {"model": str(FOLDER), "dtype": "float32", "max_new_tokens": 8},
            "corrupting": {"worker": MetadataWorker({"a": "{rationale} is here", "b": "{country} {rationale}"})},
        }


@pytest.fixture(params=available("worker"))
def worker(request: pytest.FixtureRequest, arguments: dict[str, dict[str, Any]]) -> Worker:
    made = create("worker", request.param, **arguments.get(request.param, {}))
    assert isinstance(made, Worker)
    made.setup(SetupContext(model=Model(FakeBackbone(seed=3), FakePooler()), items=ITEMS))
    return made


def test_every_worker_gives_at_most_k_distinct_rationales_per_item(worker: Worker) -> None:
    for k in (1, 4):
        proposals = worker.propose(ITEMS, k, seed=0)
        assert len(proposals) == len(ITEMS)
        assert any(proposals)
        for rationales in proposals:
            texts = [rationale.text for rationale in rationales]
            assert len(texts) <= k
            assert all(texts)
            assert len(set(texts)) == len(texts)
            assert all(rationale.worker == worker.name for rationale in rationales)
            assert {rationale.finish_reason for rationale in rationales} <= {"stop", "length", "template"}
            assert all(len(rationale.prompt_hash) == 16 for rationale in rationales)
            assert all(token not in text for text in texts for token in (THINK, END_THINK, EMB))


def test_the_rationales_of_every_worker_depend_on_the_seed_and_not_on_the_batch(worker: Worker) -> None:
    whole = worker.propose(ITEMS, 4, seed=5)
    assert worker.propose(ITEMS, 4, seed=5) == whole
    assert [worker.propose([item], 4, seed=5)[0] for item in ITEMS] == whole
    assert worker.propose(ITEMS[::-1], 4, seed=5) == whole[::-1]


def test_every_worker_has_settings_for_the_hash(worker: Worker) -> None:
    settings = worker.settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["worker"] == worker.name


def test_every_worker_accepts_an_empty_list_of_items(worker: Worker) -> None:
    assert worker.propose([], 4, seed=0) == []


def test_metadata_takes_the_unchanged_rationale_field() -> None:
    texts = [rationales[0].text for rationales in MetadataWorker().propose(ITEMS, 2, seed=0)]
    assert texts == ["chile peso", "peru lima", "red apple"]


def test_metadata_fills_its_templates_in_order_and_merges_equal_ones() -> None:
    worker = MetadataWorker(
        {"a": "flag of {country}", "b": "{country}", "c": "flag of {country} ", "d": "{{{country}}}"}
    )
    first, _, last = worker.propose(ITEMS, 9, seed=0)
    assert [each.text for each in first] == ["flag of chile", "chile", "{chile}"]
    assert [each.text for each in last] == ["flag of", "{}"]  # the empty text is not a candidate
    assert len(worker.propose(ITEMS, 2, seed=0)[0]) == 2
    assert first[0].seed == -1
    assert first[0].finish_reason == "template"


def test_the_error_for_a_missing_field_names_field_and_item() -> None:
    worker = MetadataWorker({"hop": "{country} -> {currency}"})
    with pytest.raises(ValueError, match="'what is the currency of chile' has no field 'currency'") as caught:
        worker.propose(ITEMS, 1, seed=0)
    assert "the template 'hop'" in str(caught.value)
    assert "its fields: country, rationale" in str(caught.value)


@pytest.mark.parametrize(("template", "message"), [("{a", "not well formed"), ("{a.b}", "has {a.b}"), ("{}", "has {}")])
def test_a_template_without_valid_field_names_is_an_error(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"the template 'x' (is )?{message}"):
        MetadataWorker({"x": template})


def test_model_uses_its_own_instruction_for_pictures_and_does_not_change_texts() -> None:
    asked: list[Item] = []

    class Listening(FakeBackbone):
        def prepare(self, items, **options):  # type: ignore[no-untyped-def]
            asked.extend(items)
            return super().prepare(items, **options)

    worker = ModelWorker(Listening(), instruction="red or blue")
    worker.propose(ITEMS, 2, seed=0)
    assert {(item.instruction, item.text, len(item.parts)) for item in asked} == {
        ("what is", "the currency of chile", 1),
        ("red or blue", "", 1),
    }
    assert all(not item.fields for item in asked)


def test_samples_of_model_record_model_seed_and_length() -> None:
    backbone = FakeBackbone(seed=3)
    rationales = ModelWorker(backbone, max_new_tokens=5).propose(ITEMS[:1], 6, seed=0)[0]
    assert len(rationales) > 1
    assert len({each.seed for each in rationales}) == len(rationales)
    for each in rationales:
        assert each.model == "fake"
        assert each.tokens == backbone.count_tokens(each.text) <= 5
        assert each.finish_reason in {"stop", "length"}


def test_model_samples_once_for_queries_that_share_a_picture() -> None:
    backbone = FakeBackbone(seed=3)
    picture = Image("bundled:red")
    items = [Item(question, (picture, Text(question)), {"rationale": question}) for question in ("capital", "currency")]
    one, other = ModelWorker(backbone).propose(items, 3, seed=0)
    assert one == other
    alone = FakeBackbone(seed=3)
    ModelWorker(alone).propose(items[:1], 3, seed=0)
    assert backbone.cells == alone.cells


def test_model_samples_separately_for_pictures_whose_paths_end_alike(tmp_path: Path) -> None:
    asked: list[Item] = []

    class Listening(FakeBackbone):
        def prepare(self, items, **options):  # type: ignore[no-untyped-def]
            asked.extend(items)
            return super().prepare(items, **options)

    items = []
    for colour in ("red", "blue"):
        path = tmp_path / colour / "images" / "0.png"
        path.parent.mkdir(parents=True)
        PILImage.new("RGB", (8, 8), colour).save(path)
        items.append(Item("", (Image(str(path)),)))
    assert item_digest(items[0]) == item_digest(items[1])  # on purpose: the paths may be swapped on another disk
    found = ModelWorker(Listening()).propose(items, 1, seed=0)
    assert len(found) == 2
    assert {item.parts[0] for item in asked} == {item.parts[0] for item in items}


def test_model_does_not_change_the_training_mode_and_the_gradients() -> None:
    backbone = FakeBackbone()
    backbone.train()
    backbone.head.eval()
    ModelWorker(backbone).propose(ITEMS, 2, seed=0)
    assert backbone.training
    assert not backbone.head.training
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_model_keeps_the_model_that_it_was_built_with() -> None:
    own = FakeBackbone(seed=1)
    worker = ModelWorker(own)
    worker.setup(SetupContext(model=Model(FakeBackbone(seed=2), FakePooler())))
    assert worker.backbone is own


def test_model_without_a_model_raises_an_error() -> None:
    with pytest.raises(ValueError, match="no model yet; pass backbone=, or call setup"):
        ModelWorker().propose(ITEMS, 1, seed=0)
    with pytest.raises(ValueError, match=r"workers\.\w+\.temperature is 0; give a number above 0"):
        ModelWorker(temperature=0)


def test_settings_of_model_differ_for_trained_and_fresh_weights() -> None:
    backbone = FakeBackbone()
    before = ModelWorker(backbone).settings
    with torch.no_grad():
        backbone.head.bias += 0.1
    assert ModelWorker(backbone).settings != before


def test_settings_of_model_depend_on_the_limits_of_the_model() -> None:
    class Seeing(FakeBackbone):
        prompt_settings = {"picture_size": {"longest_edge": 4096}}

    assert ModelWorker(Seeing()).settings == {**ModelWorker(FakeBackbone()).settings, **Seeing.prompt_settings}


def test_the_probe_of_weights_is_the_same_at_another_precision_and_with_a_fresh_adapter() -> None:
    def with_adapter(seed: int) -> torch.nn.Module:
        backbone = FakeBackbone().bfloat16().float()
        backbone.lora_A = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.normal_(backbone.lora_A.weight, generator=torch.Generator().manual_seed(seed))
        return backbone

    assert module_digest(with_adapter(0)) == module_digest(with_adapter(1)) == module_digest(with_adapter(0).bfloat16())


def test_the_error_for_an_address_without_a_scheme_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "host:8000/v1")
    with pytest.raises(ValueError, match=r"OPENAI_BASE_URL is 'host:8000/v1'; .* as in http://host:8000/v1"):
        create("worker", "openai", model="m")
    create("worker", "openai", model="m", base_url="http://host:8000/v1")
