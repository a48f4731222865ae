"""Tests of the public embedder: what it accepts, and that checkpoints and saved folders load unchanged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from mmemb.common.checkpoint import write_checkpoint
from mmemb.components.backbones.tiny import FOLDER
from mmemb.inference.embedder import Embedder, as_item
from mmemb.interfaces import Backbone, Pooler, Prefix, SetupContext
from mmemb.registry import create
from mmemb.types import Image, Item, ModelInputs, Text, Video
from tests.unit.inference.fakes import FakeBackbone, FakePooler


def embedder(**options: Any) -> Embedder:
    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    return Embedder(FakeBackbone(), pooler, **options)


def test_strings_pictures_paths_items_and_lists_are_accepted(tmp_path: Path) -> None:
    picture = PILImage.new("RGB", (4, 4))
    picture.save(tmp_path / "a.png")
    item = Item("own", (Text("red"),))
    assert as_item("red", instruction="find") == Item("find", (Text("red"),))
    assert as_item(picture).parts == (Image(picture),)
    assert as_item(tmp_path / "a.png").parts == (Image(str(tmp_path / "a.png")),)
    assert as_item(item, instruction="other") is item
    assert as_item(["red", picture, Text("dog")]).parts == (Text("red"), Image(picture), Text("dog"))
    out = embedder().encode(["red apple", item, ["blue", tmp_path / "a.png"]], reason="never", instruction="what is")
    assert out.embedding.shape == (3, 16)
    single = embedder().encode("red apple", reason="never", instruction="what is")
    torch.testing.assert_close(single.embedding, out.embedding[:1], atol=1e-5, rtol=0)


def test_errors_name_inputs_that_cannot_be_embedded() -> None:
    with pytest.raises(ValueError, match=r"items\[1\]: type int cannot be embedded"):
        embedder().encode(["red", 3], reason="never")
    with pytest.raises(FileNotFoundError, match=r"items\[0\]: there is no picture /gone\.png"):
        embedder().encode(Path("/gone.png"), reason="never")
    with pytest.raises(ValueError, match="an empty list"):
        as_item([])
    with pytest.raises(ValueError, match="reason is 'maybe'; give 'auto', 'always' or 'never'"):
        embedder().encode("red", reason="maybe")  # type: ignore[arg-type]


def test_reason_decides_which_queries_reason() -> None:
    both = embedder(budget=5)
    texts = ["red apple", "what is the capital of chile", "left"]
    assert not both.encode(texts, reason="never").thought.any()
    always = both.encode(texts, reason="always")
    assert always.thought.all()
    assert always.tokens.max() <= 7
    auto = both.encode(texts, reason="auto")
    assert auto.thought.tolist() == (auto.probability > 0.5).tolist()
    given = embedder(controller=create("controller", "always_reason", budget=2))
    assert given.encode(texts).thought.all()


def test_dicts_are_items_as_in_data_files(tmp_path: Path) -> None:
    picture = PILImage.new("RGB", (4, 4))
    picture.save(tmp_path / "a.png")
    assert as_item({"text": "red"}, instruction="find") == Item("find", (Text("red"),))
    assert as_item({"text": "red", "instruction": "own"}, instruction="find").instruction == "own"
    assert as_item({"image": picture}).parts == (Image(picture),)
    assert as_item({"image": str(tmp_path / "a.png")}).parts == (Image(str(tmp_path / "a.png")),)
    both = as_item({"parts": [{"video": [tmp_path / "a.png", picture]}, {"text": "dog"}]})
    assert both.parts == (Video((str(tmp_path / "a.png"), picture)), Text("dog"))
    with pytest.raises(ValueError, match=r"items\[0\]\.txt"):
        embedder().encode([{"txt": "red"}])
    with pytest.raises(FileNotFoundError, match="there is no picture gone.png"):
        embedder().encode({"image": "gone.png"})


def test_targets_skip_reasoning_unless_requested() -> None:
    eager = embedder(controller=create("controller", "always_reason", budget=2), budget=4)
    assert eager.encode(["red apple"]).thought.all()
    assert not eager.encode(["red apple"], side="target").thought.any()
    assert eager.encode(["red apple"], side="target", reason="always").thought.all()
    with pytest.raises(ValueError, match="side is 'document'; give 'query' or 'target'"):
        eager.encode("red", side="document")  # type: ignore[arg-type]


def test_a_call_chooses_the_budget_and_whether_to_return_rationales() -> None:
    model = embedder(budget=9)
    texts = ["red apple", "what is the capital of chile", "left"]
    assert model.encode(texts, reason="always", budget=2).tokens.max() <= 4
    assert model.encode(texts, reason="always", budget=30).tokens.max() > 11
    assert model.encode(texts, reason="always").rationale == [""] * 3
    assert any(model.encode(texts, reason="always", return_rationales=True).rationale)
    with pytest.raises(ValueError, match=r"encode\.budget is 0; give 1 or more"):
        model.encode(texts, budget=0)


def test_a_call_may_raise_the_budget_unless_the_controller_has_its_own() -> None:
    texts = ["red apple", "what is the capital of chile", "left"]
    eager = embedder(controller=create("controller", "always_reason"), budget=2)
    assert eager.encode(texts).tokens.max() <= 4
    assert eager.encode(texts, budget=30).tokens.max() > 11
    by_default = embedder(budget=2)
    by_default.controller.offset = 100.0  # type: ignore[attr-defined]  # all queries reason
    assert by_default.encode(texts, budget=30).tokens.max() > 11
    bound = embedder(controller=create("controller", "always_reason", budget=2), budget=2)
    assert bound.encode(texts, budget=30).tokens.max() <= 4


def test_embeddings_are_tensors_and_arrays_and_can_be_truncated() -> None:
    model = embedder()
    whole = model.encode(["red apple", "blue", "dog"])
    half = model.encode(["red apple", "blue", "dog"], dim=8)
    assert len(whole) == 3
    assert isinstance(whole.numpy(), np.ndarray)
    np.testing.assert_array_equal(np.asarray(whole), whole.embedding.numpy())
    expected = torch.nn.functional.normalize(whole.embedding[:, :8], dim=1)
    torch.testing.assert_close(half.embedding, expected)
    torch.testing.assert_close(half.embedding.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.similarity(whole, whole.numpy()[:2]), whole.embedding @ whole.embedding[:2].T)
    for dim in (0, 17):
        with pytest.raises(ValueError, match=f"dim is {dim}; .* 1 to 16"):
            model.encode("red", dim=dim)
    with pytest.raises(ValueError, match="16 and 8 dimensions"):
        model.similarity(whole, half)


class Narrow(FakeBackbone):
    """A backbone that has memory for three rows."""

    def prefill(self, inputs: ModelInputs) -> Prefix:
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("no more")
        return super().prefill(inputs)


def test_halving_a_batch_that_does_not_fit_into_memory_changes_no_result() -> None:
    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    texts = [" ".join([["red", "apple", "dog", "peso"][i % 4]] * (1 + i)) for i in range(13)]
    narrow = Embedder(Narrow(), pooler, batch_size=12, budget=6)
    with pytest.warns(UserWarning, match="do not fit into memory") as told:
        halved = narrow.encode(texts, reason="always", return_rationales=True)
    assert [str(each.message).partition(";")[0] for each in told] == [
        "12 rows do not fit into memory",
        "6 rows do not fit into memory",
    ]
    wide = Embedder(FakeBackbone(), pooler, batch_size=12, budget=6)
    expected = wide.encode(texts, reason="always", return_rationales=True)
    assert halved.rationale == expected.rationale
    torch.testing.assert_close(halved.embedding, expected.embedding, atol=1e-5, rtol=0)


def test_a_single_row_that_does_not_fit_into_memory_is_an_error() -> None:
    class None_(FakeBackbone):
        def prefill(self, inputs: ModelInputs) -> Prefix:
            raise torch.OutOfMemoryError("no more")

    pooler = FakePooler()
    pooler.setup(SetupContext(hidden_size=16))
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="with 1 at once"):
        Embedder(None_(), pooler).encode(["red", "dog"])


@pytest.fixture(scope="module")
def parts() -> tuple[Backbone, Pooler]:
    backbone = create("backbone", "tiny", weights="random", seed=5)
    pooler = create("pooler", "attention", projection=24, dim=12)
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    with torch.no_grad():
        pooler.query.normal_()
    return backbone, pooler


def checkpoint(parts: tuple[Backbone, Pooler]) -> dict[str, Any]:
    """Writes a checkpoint as `mmemb fit` does: settings by class path, weights by component.

    The settings have another seed, so equal outputs can only come from the weights.
    """
    backbone, pooler = parts
    base = "mmemb.components"
    return {
        "hyper_parameters": {
            "backbone": {
                "class_path": f"{base}.backbones.tiny.TinyBackbone",
                "init_args": {"weights": "random", "seed": 6},
            },
            "pooler": {
                "class_path": f"{base}.poolers.attention.Attention",
                "init_args": {"heads": 1, "projection": 24, "dim": 12},
            },
        },
        "state_dict": {
            **{f"backbone.{name}": value for name, value in backbone.state_dict().items()},
            **{f"pooler.{name}": value for name, value in pooler.state_dict().items()},
            "objective.infonce.log_scale": torch.zeros(()),
        },
        "backbone_identity": backbone.identity,
    }


def test_a_checkpoint_loads_the_model_that_wrote_it(parts: tuple[Backbone, Pooler], tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint(checkpoint(parts), path)
    expected = Embedder(*parts, budget=3).encode(["red apple", "dog"], reason="always", return_rationales=True)
    for source in (path, tmp_path):
        loaded = Embedder.from_checkpoint(source, device="cpu", budget=3)
        out = loaded.encode(["red apple", "dog"], reason="always", return_rationales=True)
        assert out.rationale == expected.rationale
        torch.testing.assert_close(out.embedding, expected.embedding, atol=1e-6, rtol=0)


def test_the_decision_settings_are_loaded_with_the_model(parts: tuple[Backbone, Pooler], tmp_path: Path) -> None:
    """They come from the evaluation of the same step, otherwise from the control phase, otherwise from the logits."""

    def decision(source: Path) -> tuple[float, float]:
        controller: Any = Embedder.from_checkpoint(source, device="cpu").controller
        return controller.offset, controller.spread

    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    write_checkpoint({**checkpoint(parts), "global_step": 9}, path)
    assert decision(path) == (0.0, 1.0)
    write_checkpoint({**checkpoint(parts), "global_step": 9, "phases": [{}, {"policy": [1.5, 2.0]}]}, path)
    assert decision(path) == (-1.5, 2.0)
    summary = tmp_path / "run" / "summary.json"
    for step, expected in ((9, (-0.25, 2.0)), (8, (-1.5, 2.0))):
        summary.write_text(json.dumps({"settings": {"step": step, "calibration": {"rl": {"offset": -0.25}}}}))
        assert decision(path) == expected
    summary.write_text(json.dumps({"settings": {"step": 9, "calibration": {}}}))
    assert decision(path) == (-1.5, 2.0)
    own = Embedder(*parts, controller=create("controller", "rl", offset=0.5, spread=3.0))
    assert decision(own.save(tmp_path / "model")) == (0.5, 3.0)


def test_a_saved_folder_loads_the_same_model(parts: tuple[Backbone, Pooler], tmp_path: Path) -> None:
    own = Embedder(*parts, budget=3)
    own.save(tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "backbone",
        "embedder.json",
        "pooler.safetensors",
    ]
    loaded = Embedder.from_checkpoint(tmp_path / "model", device="cpu", budget=3)
    expected, out = (each.encode(["red apple", "dog"], reason="always") for each in (own, loaded))
    torch.testing.assert_close(out.embedding, expected.embedding, atol=1e-6, rtol=0)
    assert loaded.backbone.identity == own.backbone.identity
    assert loaded.backbone.max_rationale_tokens == own.backbone.max_rationale_tokens


def test_a_saved_folder_keeps_precision_and_limits(tmp_path: Path) -> None:
    limits = {"max_prompt_tokens": 300, "max_rationale_tokens": 20}
    backbone = create("backbone", "transformers", model=str(FOLDER), weights="random", dtype="bfloat16", **limits)
    pooler = create("pooler", "embed_token")
    pooler.setup(SetupContext(hidden_size=backbone.hidden_size))
    folder = Embedder(backbone, pooler).save(tmp_path / "model")
    loaded = Embedder.from_checkpoint(folder, device="cpu").backbone
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {name: getattr(loaded, name) for name in limits} == limits
    assert loaded.processor.max_prompt_tokens == 300  # type: ignore[attr-defined]

    settings = json.loads((folder / "embedder.json").read_text())
    of_an_earlier_version = {key: settings[key] for key in settings if key not in ("max_prompt_tokens", "dtype")}
    (folder / "embedder.json").write_text(json.dumps(of_an_earlier_version))
    older = Embedder.from_checkpoint(folder, device="cpu").backbone
    assert {parameter.dtype for parameter in older.parameters()} == {torch.float32}
    assert older.max_rationale_tokens == 20


def test_a_hub_id_is_read_from_the_cache(
    parts: tuple[Backbone, Pooler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--embedder"
    Embedder(*parts).save(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text("a" * 40)
    for identity in ("someone/embedder", "someone/embedder@v1"):
        loaded = Embedder.from_checkpoint(identity, device="cpu")
        assert loaded.identity == Embedder(*parts).identity
    with pytest.raises(FileNotFoundError, match="someone/other: this is neither a local path nor a hub model"):
        Embedder.from_checkpoint("someone/other")


def test_identity_distinguishes_checkpoints_of_one_architecture(parts: tuple[Backbone, Pooler], tmp_path: Path) -> None:
    own = Embedder(*parts)
    assert Embedder(*parts).identity == own.identity
    assert Embedder.from_checkpoint(own.save(tmp_path / "m"), device="cpu").identity == own.identity
    other = create("backbone", "tiny", weights="random", seed=6)
    assert other.identity == own.backbone.identity
    assert Embedder(other, parts[1]).identity != own.identity


def test_errors_name_bad_checkpoints(parts: tuple[Backbone, Pooler], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give the folder of a run or a \.ckpt file"):
        Embedder.from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        Embedder.from_checkpoint(tmp_path / "none.ckpt")
    for age, name in enumerate(("version_10", "version_9")):
        last = tmp_path / "runs" / name / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True)
        last.touch()
        os.utime(last, (0, 1000 - age))
    with pytest.raises(FileNotFoundError, match=r"its newest run is .*version_10$"):
        Embedder.from_checkpoint(tmp_path / "runs")
    path, whole = tmp_path / "a.ckpt", checkpoint(parts)
    write_checkpoint({**whole, "hyper_parameters": {}}, path)
    with pytest.raises(ValueError, match="settings of backbone and pooler are missing"):
        Embedder.from_checkpoint(path)
    write_checkpoint({**whole, "backbone_identity": "other@1#2"}, path)
    with pytest.raises(ValueError, match=r"written by the backbone 'other@1#2'"):
        Embedder.from_checkpoint(path)
    lost = {name: value for name, value in whole["state_dict"].items() if not name.startswith("pooler.")}
    write_checkpoint({**whole, "state_dict": lost}, path)
    with pytest.raises(ValueError, match="its weights do not fit the pooler"):
        Embedder.from_checkpoint(path)


def test_a_checkpoint_cannot_name_another_class(parts: tuple[Backbone, Pooler], tmp_path: Path) -> None:
    settings = checkpoint(parts)
    settings["hyper_parameters"]["pooler"] = {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}
    write_checkpoint(settings, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="no model can be built from its settings"):
        Embedder.from_checkpoint(tmp_path / "a.ckpt")


def test_a_component_that_does_not_keep_an_argument_cannot_be_saved(tmp_path: Path) -> None:
    class Hiding(FakePooler):
        def __init__(self, secret: int = 1) -> None:
            super().__init__()

    pooler = Hiding()
    pooler.setup(SetupContext(hidden_size=16))
    with pytest.raises(ValueError, match="does not keep its argument 'secret'"):
        Embedder(FakeBackbone(), pooler).save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_saved_settings_are_plain_json(parts: tuple[Backbone, Pooler], tmp_path: Path) -> None:
    folder = Embedder(*parts).save(tmp_path / "m")
    settings = json.loads((folder / "embedder.json").read_text())
    assert settings["pooler"]["init_args"] == {"heads": 1, "projection": 24, "dim": 12}
