"""Files are whole or absent after any failure and with several writers."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmemb.common.files import remove_temporary, whole_file, whole_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_at_the_end_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent  # same folder: a rename to another disk would be a copy
        assert f".{os.getpid()}." in temporary.name
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException], begun: bool
) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def fail() -> None:
        with whole_file(path) as temporary:
            if begun:
                temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_a_failed_rename_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError), whole_file(tmp_path / "a") as temporary:
        temporary.write_text("a file cannot take the place of a folder")
    assert names(tmp_path) == ["a"]


def test_the_file_has_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "a.txt", "new")
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == wanted


def test_sync_flushes_the_file_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    synced: list[tuple[bool, bool]] = []

    def fsync(handle: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "b.txt", "not synced")
    assert synced == []
    with whole_file(path, sync=True) as temporary:
        temporary.write_text("new")
    assert synced == [(False, False), (True, True)]


def test_a_failed_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"), whole_file(path, sync=True) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_two_writers_in_one_process_do_not_clash(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as outer:
        outer.write_text("outer")
        with whole_file(path) as inner:
            assert inner != outer
            inner.write_text("inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert names(tmp_path) == ["a.txt"]


_WRITER = """
import sys
from mmemb.common.files import whole_file
for turn in range(300):
    with whole_file(sys.argv[1]) as temporary, open(temporary, "w") as file:
        for _ in range(20):
            file.write(sys.argv[2] * 1000)
            file.flush()
"""


def test_processes_that_write_the_same_file_never_mix_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(path), letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {"a" * 20_000, "b" * 20_000}
    assert seen
    assert names(tmp_path) == ["a.txt"]


_KILLED = """
import sys, time
from mmemb.common.files import whole_file
with whole_file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_file_and_a_removable_temporary_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "scores-1.txt", "old")
    write_text(tmp_path / "other.part", "somebody's own")
    child = subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 3
    remove_temporary(tmp_path, "candidates-*")
    assert len(names(tmp_path)) == 3
    remove_temporary(tmp_path, "scores-*")
    assert names(tmp_path) == ["other.part", "scores-1.txt"]


def test_a_folder_changes_only_when_all_its_files_are_written(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    target.mkdir(parents=True)
    (target / "kept").write_text("kept")
    (target / "config").write_text("old")

    def fail() -> None:
        with whole_folder(target) as temporary:
            (temporary / "config").write_text("new")
            raise ValueError("no config")

    with pytest.raises(ValueError, match="no config"):
        fail()
    assert (target / "config").read_text() == "old"
    with whole_folder(target) as temporary:
        (temporary / "config").write_text("new")
        (temporary / "weights").write_text("new")
        assert names(target) == ["config", "kept"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "config": "new",
        "kept": "kept",
        "weights": "new",
    }
    assert names(tmp_path / "deep") == ["model"]
