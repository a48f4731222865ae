"""Tests how a backbone is loaded: folders, overrides, seeds, frozen parts, identity, and the error messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemb.components.backbones import loading
from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.backbones.transformers import TransformersBackbone
from mmemb.interfaces import Backbone
from mmemb.registry import resolve
from mmemb.types import EMB, END_THINK, THINK, Image, Item, Text

ITEM = Item("what is shown ?", (Text("red apple"),))
Folder = Callable[[str], Path]


@pytest.fixture
def copied(model_folder: Folder, tmp_path: Path) -> Path:
    """A folder with a tiny Qwen3-VL that a test may damage."""
    return Path(shutil.copytree(model_folder("qwen3_vl"), tmp_path / "model"))


def test_both_names_are_registered() -> None:
    assert resolve("backbone", "transformers") is TransformersBackbone
    assert resolve("backbone", "tiny") is TinyBackbone


def test_random_weights_depend_on_their_seed_and_do_not_change_the_random_state_of_the_caller() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = TinyBackbone(weights="random", seed=1)
    assert torch.equal(torch.rand(1), expected)
    states = [TinyBackbone(weights="random", seed=seed).state_dict() for seed in (1, 2)]
    assert all(torch.equal(value, states[0][name]) for name, value in first.state_dict().items())
    assert not torch.equal(*(state["model.model.language_model.embed_tokens.weight"] for state in states))


def test_overrides_can_shrink_a_config(model_folder: Folder) -> None:
    backbone = TransformersBackbone(
        str(model_folder("qwen3_vl")),
        weights="random",
        config_overrides={
            "text_config": {"num_hidden_layers": 1, "hidden_size": 16},
            "vision_config": {"out_hidden_size": 16},
        },
    )
    assert backbone.hidden_size == 16
    assert len(backbone.model.model.language_model.layers) == 1
    assert backbone(backbone.prepare([ITEM])).shape[-1] == 16
    assert backbone.identity != TransformersBackbone(str(model_folder("qwen3_vl"))).identity


def test_identity_is_of_model_revision_and_architecture(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("qwen2_vl")
    origin, _, digest = backbone.identity.partition("#")
    assert origin == "qwen2_vl@main"
    assert len(digest) == 12
    backbone.save(tmp_path / "elsewhere" / "renamed")
    assert TransformersBackbone(str(tmp_path / "elsewhere" / "renamed")).identity == backbone.identity
    assert TransformersBackbone(str(tmp_path / "elsewhere" / "renamed"), dtype="bfloat16").identity == backbone.identity


def test_added_special_tokens_start_near_the_mean_and_differ(make_backbone: Callable[..., Any]) -> None:
    backbone = make_backbone("qwen2_vl")
    ids = [backbone.token_id(token) for token in (THINK, END_THINK, EMB)]
    assert len(set(ids)) == 3
    for table in (backbone.model.get_input_embeddings().weight, backbone.model.get_output_embeddings().weight):
        rows = table[ids]
        others = table[: min(ids)]
        assert (rows - others.mean(0)).norm(dim=1).max() < 0.5 * (others - others.mean(0)).norm(dim=1).mean()
        assert torch.cdist(rows, rows)[0, 1:].min() > 0
    again = make_backbone("qwen2_vl")
    assert torch.equal(again.model.get_input_embeddings().weight, backbone.model.get_input_embeddings().weight)


def test_frozen_parts_get_no_gradient(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("smolvlm", frozen=["vision", "lm_head"])
    learns = {name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}
    assert learns
    assert not [name for name in learns if name.startswith(("model.vision_model", "model.connector", "lm_head"))]
    with pytest.raises(ValueError, match="frozen part 'visoin': no parameter name .*vision, lm_head"):
        make_backbone("smolvlm", frozen=["visoin"])


def test_pixel_limits_change_what_a_picture_costs(
    make_backbone: Callable[..., Any], picture: Callable[..., Any]
) -> None:
    item = Item("", (Image(picture(64, 64)),))
    lengths = []
    for limits in ({"max_pixels": 32 * 32}, {}, {"min_pixels": 128 * 128, "max_pixels": 256 * 256}):
        backbone = make_backbone("qwen2_vl", **limits)
        ids = backbone.prepare([item]).tensors["input_ids"]
        lengths.append(int((ids == backbone.model.config.image_token_id).sum()))
    assert lengths == [4, 16, 64]
    with pytest.raises(ValueError, match="sizes its pictures itself; remove min_pixels"):
        make_backbone("smolvlm", max_pixels=100)


def test_gradient_checkpointing_saves_memory_and_gives_the_same_gradients(make_backbone: Callable[..., Any]) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = make_backbone("qwen3_vl", gradient_checkpointing=checkpointing).train()
        assert backbone.model.is_activation_checkpointing is checkpointing
        backbone(backbone.prepare([ITEM]))[:, -1].square().sum().backward()
        gradients.append(backbone.model.model.language_model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_fresh_backbone_is_in_training_mode(model_folder: Folder) -> None:
    backbone = TransformersBackbone(str(model_folder("qwen2_vl")))
    assert all(module.training for module in backbone.modules())


def test_a_failed_save_leaves_nothing_half_written(
    make_backbone: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone("qwen2_vl")
    backbone.save(tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(backbone.image_processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        backbone.save(tmp_path / "kept")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_error_names_a_missing_folder_or_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.*no such folder"):
        TransformersBackbone(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="the folder has no config.json"):
        TransformersBackbone(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{broken", "its config cannot be read"),
        ('{"model_type": "nonesuch"}', "its config cannot be read"),
        ('{"model_type": "llama"}', "is a 'llama', not an image-text-to-text model; take one of qwen2_vl"),
        ('{"model_type": "llava"}', "the family 'llava' is not supported yet; take one of qwen2_vl"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message) as caught:
        TransformersBackbone(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "its weights cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "its weights cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer or image processor cannot be read"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "its tokenizer or image processor cannot be read",
        ),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template; take its instruct version"),
    ],
)
def test_the_error_names_the_missing_piece_of_a_folder(
    copied: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(copied)
    with pytest.raises(ValueError, match=message) as caught:
        TransformersBackbone(str(copied))
    assert "\n" not in str(caught.value)


def test_missing_weights_are_an_error(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(copied / "model.safetensors")
    del state["model.language_model.norm.weight"]
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing .*model.language_model.norm.weight"):
        TransformersBackbone(str(copied))


def test_an_old_style_chat_template_is_found(copied: Path) -> None:
    template = (copied / "chat_template.jinja").read_text()
    (copied / "chat_template.jinja").unlink()
    (copied / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert TransformersBackbone(str(copied)).processor.chat_template == template


def test_quantisation_needs_weights(model_folder: Folder) -> None:
    with pytest.raises(ValueError, match="quantization='nf4' needs weights: pretrained"):
        TransformersBackbone(str(model_folder("qwen2_vl")), weights="random", quantization="nf4")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "cuda:0"),
        ({"LOCAL_RANK": "1"}, "cuda:1"),
        ({"SLURM_LOCALID": "1"}, "cuda:1"),
        ({"LOCAL_RANK": "3"}, "cuda:1"),  # each process sees fewer GPUs than there are processes
    ],
)
def test_quantised_weights_are_packed_on_the_gpu_of_the_process(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.own_device() == expected


def test_without_a_gpu_quantised_weights_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.own_device() == "cpu"


def test_a_home_folder_may_be_written_with_a_tilde(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder("qwen3_vl"), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TransformersBackbone("~/model").identity == TransformersBackbone(str(tmp_path / "model")).identity


@pytest.mark.slow
def test_a_plain_model_is_loaded_silently_and_without_optional_libraries(model_folder: Folder) -> None:
    code = (
        "import sys; from mmemb.components.backbones.transformers import TransformersBackbone as Model; "
        f"Model({str(model_folder('qwen3_vl'))!r}); print(sorted({{'bitsandbytes', 'peft'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
