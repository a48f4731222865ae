"""Lets ranks wait for the rank that makes a pool. They look at the disk, because a collective call would time out.

By default, a `torch.distributed` process group times out after half an hour or less. Making a pool may take days. So
the maker touches a file next to the pool while it works, and the others check the pool and this file every few seconds.
A maker that failed or was killed no longer touches the file, and this ends the others too. The cost is one sleeping
thread in the maker.
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
"""Seconds without a touch after which the maker counts as stopped: far above the delays of a network file system."""


def sign_of(pool: Path) -> Path:
    """Returns the path of the file that the maker touches while it makes the pool."""
    return pool.with_name(f"{pool.name}.making")


@contextmanager
def at_work(sign: Path, *, beat: float = BEAT) -> Iterator[None]:
    """Touches the file every ``beat`` seconds inside the context. Removes it at the end, also after an error."""
    sign.parent.mkdir(parents=True, exist_ok=True)
    sign.touch()
    done = threading.Event()

    def touch() -> None:
        while not done.wait(beat):
            with suppress(OSError):  # one missed touch does no harm
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
    """Waits until the pool is whole.

    Args:
        whole: returns whether the pool is whole. Called at each check.
        sign: the file that the maker touches.
        every: seconds between two checks.
        patience: seconds without a touch after which the maker counts as stopped.

    Raises:
        ValueError: the maker has stopped.
    """
    seen: float | None = None
    since = time.monotonic()
    while not whole():
        touched = _touched(sign)
        if touched != seen:
            seen, since = touched, time.monotonic()
        elif time.monotonic() - since > patience:
            raise ValueError(
                f"{sign}: not touched for {patience:.0f} s, so the process that makes the pool stopped before the pool "
                f"was whole; read the error of that process, then start the run again to continue the pool"
            )
        time.sleep(every)


def _touched(sign: Path) -> float | None:
    try:
        return sign.stat().st_mtime
    except OSError:
        return None
