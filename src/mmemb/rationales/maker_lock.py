"""How ranks wait for the one that makes a pool: they look at the disk, for a collective call would time out.

A process group gives up after half an hour or less (`torch.distributed`'s default), and making a pool may take days. So
the maker touches a file beside the pool while it works, and the others look at both every few seconds. A maker that
failed or was killed touches nothing any more, which ends the others too. It costs the maker one sleeping thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT = 10.0
"""Seconds between two touches."""
PATIENCE = 300.0
"""Seconds without a touch after which the maker counts as gone: far above a network file system's delays."""


def sign_of(pool: Path) -> Path:
    """The file that is touched while a pool is made."""
    return pool.with_name(f"{pool.name}.making")


@contextmanager
def at_work(sign: Path, *, beat: float = BEAT) -> Iterator[None]:
    """Inside, the file is touched; afterwards it is gone, whether the work was done or failed."""
    sign.parent.mkdir(parents=True, exist_ok=True)
    sign.touch()
    done = threading.Event()

    def touch() -> None:
        while not done.wait(beat):
            with suppress(OSError):  # one touch missed is no harm
                sign.touch()

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sign.unlink(missing_ok=True)


def wait_until(whole: Callable[[], bool], sign: Path, *, every: float = 2.0, patience: float = PATIENCE) -> None:
    """Returns once the pool is whole.

    Args:
        whole: whether it is; asked again and again.
        sign: the file that its maker touches.
        every: seconds between two looks.
        patience: seconds without a touch after which the maker counts as gone.

    Raises:
        ValueError: the maker is gone.
    """
    seen: float | None = None
    since = time.monotonic()
    while not whole():
        touched = _touched(sign)
        if touched != seen:
            seen, since = touched, time.monotonic()
        elif time.monotonic() - since > patience:
            raise ValueError(
                f"{sign}: not touched for {patience:.0f} s, so the process that makes the pool has stopped before the "
                f"pool was whole; see that process's own error and start the run again, which goes on where it was"
            )
        time.sleep(every)


def _touched(sign: Path) -> float | None:
    try:
        return sign.stat().st_mtime
    except OSError:
        return None
