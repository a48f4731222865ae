"""Tests that a new tokenizer is not written to a folder whose weights were trained with another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.build_tiny import skeleton


def test_the_skeleton_is_not_made_in_a_folder_with_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors: .*delete"):
        skeleton(tmp_path, ["a red apple"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    skeleton(tmp_path, ["a red apple"])
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= {path.name for path in tmp_path.iterdir()}
