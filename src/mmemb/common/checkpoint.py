"""Writes checkpoints that are whole or absent, and reads them without running code from them.

A checkpoint is written into a temporary file, forced to the disk and renamed. A reader never sees half a checkpoint,
and a full disk costs the new checkpoint, never the old one. Reading accepts tensors and plain containers only
(``weights_only=True``), so a checkpoint from elsewhere cannot run code. A checkpoint of another backbone is refused.
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
"""Key in a checkpoint for the `Backbone.identity` of the model that wrote it."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Recorder:
    """A binary file that keeps the first error of `write`. The zip writer of torch replaces it with its own error."""

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
        path: target file. Its folder is made if necessary.

    Raises:
        OSError: the file cannot be written (disk full, quota, file size limit, permission). Nothing is left behind, and
            an older checkpoint at the path is unchanged.
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
    return OSError(error.errno, f"cannot write the checkpoint {target}: {reason}; no partial file is left; {remedy}")


_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,  # a truncated file: EINVAL
    # A file of another kind, such as a text whose first letter is a pickle opcode:
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
        map_location: passed to `torch.load`.
        identity: `Backbone.identity` of the model that will load the weights. None skips the check.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, is damaged, contains more than tensors and plain containers, or comes
            from another backbone.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, f"there is no checkpoint {path}; give the path of a .ckpt file")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        # The message of torch is left out for this error: it recommends loading the file unsafely.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "" if refused else f" ({str(error).strip().split(chr(10), 1)[0]})"
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain containers{reason}; the file is truncated, "
            "contains other objects too, or comes from another program; give another file"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} contains a {type(checkpoint).__name__} and no checkpoint; give another file")
    if identity is not None:
        refuse_other_backbone(checkpoint, identity=identity, path=path)
    return checkpoint


def refuse_other_backbone(
    checkpoint: Mapping[str, Any], *, identity: str, path: str | os.PathLike[str] = "the checkpoint"
) -> None:
    """Refuses a checkpoint that another backbone or another program wrote.

    Args:
        checkpoint: the checkpoint as read.
        identity: `Backbone.identity` of the model that will load the weights.
        path: where the checkpoint comes from. Part of the message.

    Raises:
        ValueError: the checkpoint has no identity, or another one. The message gives both.
    """
    written = checkpoint.get(IDENTITY_KEY)
    if written is None:
        raise ValueError(
            f"{path} has no {IDENTITY_KEY!r}, so another program wrote it; give a checkpoint that mmemb wrote"
        )
    if written != identity:
        raise ValueError(
            f"{path} was written by the backbone {written!r}, but this run has {identity!r}; give the config of the "
            "checkpoint's training run (config.yaml in its run folder), or another checkpoint"
        )
