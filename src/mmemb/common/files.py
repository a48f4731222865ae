"""Writing files so that they are whole or absent, and naming a Parquet file that is damaged.

Every file of this project is written by `whole_file`: under a temporary name in the target's folder, then renamed. A
reader meets the old file or the new one, never half of either. A process that is killed outright leaves its temporary
file and nothing else.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

TEMPORARY = ".part"
"""How the name of a temporary file ends."""


@contextmanager
def whole_file(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """Gives a temporary name to write under. The file moves to its own name if the block ends without an error.

    After an error the temporary file is removed and an older file at ``path`` is as it was. The temporary name is
    ``.<name>.<process id>.<random>.part``, so writers in several processes or on several machines never share one.

    Args:
        path: target file; its folder is made.
        sync: forces the file, and the name in its folder, to the disk, so that both survive a power cut.

    Raises:
        OSError: the folder, the file or its name cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid4().hex[:8]}{TEMPORARY}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file in UTF-8, whole or not at all; its folder is made. Returns the path."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary folder to fill. Its files move into ``path``, in the order of their names, after the block.

    After an error in the block ``path`` is as it was. The move itself goes file by file: a reader who must not meet a
    mixture waits for a file that is written after this block. Sub-folders are not supported.

    Args:
        path: target folder; it and those above it are made. Files of the same name are replaced, others stay.

    Raises:
        OSError: a folder or a file cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}.", suffix=TEMPORARY, dir=target.parent))
    try:
        yield temporary
        target.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary(folder: Path, name: str) -> None:
    """Removes what a killed process left of `whole_file` in a folder.

    Call it only where no other process can be writing these files.

    Args:
        folder: where to look; sub-folders are left alone.
        name: pattern of the targets' names, such as ``scores-*``.
    """
    for path in folder.glob(f".{name}.*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where the system allows to open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; the file itself is synced
    finally:
        os.close(handle)


@contextmanager
def named_damage(path: Path, remedy: str) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into one line with the file's name and what to do.

    Args:
        path: the file that is read in the block.
        remedy: what to do about it.

    Raises:
        ValueError: the file is not Parquet or is damaged. The disk's own errors pass unchanged.
    """
    import pyarrow as pa  # takes 0.1 s or more, and most users of this module only write

    try:
        yield
    # A damaged page or footer is an OSError without a number, a damaged column name a UnicodeDecodeError.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable Parquet file ({reason}); {remedy}") from None
