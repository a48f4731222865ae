"""Checkpoints are whole or absent, run no code, and name their backbone."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmemb.common import checkpoint as module
from mmemb.common.checkpoint import read_checkpoint, refuse_other_backbone, write_checkpoint
from mmemb.training.callbacks.checkpoint import SafeCheckpointIO

CONTENT: dict[str, Any] = {
    "state_dict": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "global_step": 7,
    "nested": [{"a": (1, "b", None, True)}],
    "backbone_identity": "tiny-1",
}


class Code:
    """An object whose unpickling would write a file."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_written_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    write_checkpoint(CONTENT, path)
    found = read_checkpoint(path, identity="tiny-1")
    torch.testing.assert_close(found["state_dict"], CONTENT["state_dict"], rtol=0, atol=0)
    assert found["nested"] == CONTENT["nested"]
    assert names(tmp_path) == ["a.ckpt"]


class FullDisk:
    """A file that accepts some bytes and then raises an error."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 5000, 20_000])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({"global_step": 1}, path)
    recorder = module._Recorder
    monkeypatch.setattr(module, "_Recorder", lambda file: recorder(FullDisk(file, room)))  # type: ignore[arg-type]
    with pytest.raises(
        OSError, match="cannot write the checkpoint .*last.ckpt: No space left.*free some space"
    ) as caught:
        write_checkpoint({"big": torch.zeros(8000)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["last.ckpt"]
    assert read_checkpoint(path) == {"global_step": 1}


def test_a_disk_that_is_full_at_the_sync_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Disk quota exceeded"):
        write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    assert names(tmp_path) == []


def test_a_real_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from mmemb.common.checkpoint import write_checkpoint\n"
        "try: write_checkpoint({'big': torch.zeros(1_000_000)}, sys.argv[1])\n"
        "except OSError as error: print(error)\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    command = [sys.executable, "-c", code, str(tmp_path / "a.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot write the checkpoint" in done.stdout
    assert "File too large" in done.stdout
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_checkpoint(CONTENT, tmp_path / "file" / "a.ckpt")


def test_another_kind_of_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        write_checkpoint({"function": lambda: None}, tmp_path / "a.ckpt")
    assert names(tmp_path) == []


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt cannot be read as a checkpoint of tensors and plain containers"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_raises_a_message_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_checkpoint({"big": torch.zeros(50_000)}, path)
    whole = path.read_bytes()
    cut = [whole[: len(whole) * tenths // 10] for tenths in range(10)]
    for content in (*cut, b"PK", b"\x80\x02garbage", b"test: 1", b"hello world", b"Read me", b"version 1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.ckpt cannot be read as a checkpoint") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*none.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="list.ckpt contains a list"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_another_backbone_is_refused_with_both_identities(tmp_path: Path) -> None:
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt was written by the backbone 'tiny-1', but this run has 'tiny-2'"):
        read_checkpoint(tmp_path / "a.ckpt", identity="tiny-2")
    with pytest.raises(ValueError, match="a.ckpt has no 'backbone_identity', so another program wrote it"):
        refuse_other_backbone({"state_dict": {}}, identity="tiny-2", path="a.ckpt")


def test_lightning_reads_and_writes_checkpoints(tmp_path: Path) -> None:
    plugin = SafeCheckpointIO()
    path = tmp_path / "a.ckpt"
    plugin.save_checkpoint(dict(CONTENT), path)
    with pytest.raises(ValueError, match="a.ckpt has no 'pytorch-lightning_version', so no training wrote it"):
        plugin.load_checkpoint(path)
    plugin.save_checkpoint(CONTENT | {"pytorch-lightning_version": "2.6"}, path)
    assert plugin.load_checkpoint(path)["global_step"] == 7
    with pytest.raises(ValueError, match="weights_only=True"):
        plugin.load_checkpoint(path, weights_only=False)
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint({}, path, storage_options={})
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(path)
    (tmp_path / "sharded.ckpt").mkdir()
    plugin.remove_checkpoint(tmp_path / "sharded.ckpt")
    assert list(tmp_path.iterdir()) == []
