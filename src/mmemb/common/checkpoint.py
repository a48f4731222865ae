"""Checkpoints that are whole or absent, hold no code, and fit the backbone they are loaded into.

A checkpoint is streamed into a temporary file, forced to the disk and renamed. A reader never meets half a checkpoint,
and a full disk costs the new checkpoint, never the old one. Reading accepts tensors and plain containers only
(``weights_only=True``), so a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import errno
import os
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from mmemb.common.files import whole_file

IDENTITY_KEY = "backbone_identity"
"""Key of a checkpoint that holds `Backbone.identity` of the model that wrote it."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Recorder:
    """A binary file that remembers the first error of `write`, which torch's zip writer replaces by its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint that is whole or absent, and forces it to the disk.

    Args:
        checkpoint: tensors and plain containers.
        path: target file; its folder is made.

    Raises:
        OSError: it cannot be written (disk full, quota, file size limit, permission). Nothing is left behind, and an
            older checkpoint at the path is as it was.
    """
    target = Path(path)
    recorder: _Recorder | None = None
    try:
        with whole_file(target, sync=True) as temporary, open(temporary, "wb") as file:
            recorder = _Recorder(cast(BinaryIO, file))
            torch.save(dict(checkpoint), cast(BinaryIO, recorder))
    except BaseException as error:
        cause = recorder.error if recorder is not None and recorder.error is not None else error
        if isinstance(cause, OSError):
            raise _explained(cause, target) from error
        raise


def _explained(error: OSError, target: Path) -> OSError:
    remedy = "free some space or point the run at another disk" if error.errno in _NO_ROOM else "check the folder"
    reason = error.strerror or str(error)
    return OSError(
        error.errno, f"cannot write the checkpoint {target}: {reason}; nothing half-written is left, {remedy}"
    )


_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,  # a file that was cut short: EINVAL
    # A file of another kind, such as a text whose first letter is a pickle instruction:
    LookupError,
    ValueError,
    struct.error,
)


def read_checkpoint(
    path: str | os.PathLike[str], *, map_location: Any = "cpu", identity: str | None = None
) -> dict[str, Any]:
    """Reads a checkpoint without running any code from it.

    Args:
        path: the file.
        map_location: as `torch.load` takes it.
        identity: `Backbone.identity` of the model that will take the weights; None leaves it unchecked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, is damaged, holds more than tensors and plain containers, or comes
            from another backbone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, f"there is no checkpoint {path}; give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        # Torch's message for this error advises to load the file unsafely.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "" if refused else f" ({str(error).strip().split(chr(10), 1)[0]})"
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain containers{reason}; it was cut short, holds "
            "other objects too, or was written by another program: give another file"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    if identity is not None:
        refuse_other_backbone(checkpoint, identity=identity, path=path)
    return checkpoint


def refuse_other_backbone(
    checkpoint: Mapping[str, Any], *, identity: str, path: str | os.PathLike[str] = "the checkpoint"
) -> None:
    """Raises for a checkpoint that another backbone or another program wrote.

    Args:
        checkpoint: as read.
        identity: `Backbone.identity` of the model that will take the weights.
        path: where the checkpoint comes from, for the message.

    Raises:
        ValueError: the checkpoint has no identity, or another one. The message gives both.
    """
    written = checkpoint.get(IDENTITY_KEY)
    if written is None:
        raise ValueError(f"{path} has no {IDENTITY_KEY!r}, so another program wrote it; give one of an mmemb training")
    if written != identity:
        raise ValueError(
            f"{path} was written by the backbone {written!r}, but this run has {identity!r}; give the config that the "
            "checkpoint was trained with (config.yaml in its run folder), or another checkpoint"
        )
