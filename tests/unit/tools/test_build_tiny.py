"""A new tokenizer is not put beside weights that were trained with another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.build_tiny import skeleton


def test_the_skeleton_is_not_made_beside_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors: weights of the present tokenizer are there; delete"):
        skeleton(tmp_path, ["a red apple"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    skeleton(tmp_path, ["a red apple"])
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= {path.name for path in tmp_path.iterdir()}
