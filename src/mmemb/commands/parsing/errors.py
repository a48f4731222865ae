"""Reports a user's mistake in one line on stderr that names the place and the fix, with exit code 2 and no traceback.

A user's mistake is a `ValueError` or `OSError` that our own code raised about its input, or any input that a parser
refused. Every other error is a defect, in our code or in a library, and keeps its traceback. ``MMEMB_DEBUG=1`` shows
every traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmemb.registry import PluginError

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
DEBUG = "MMEMB_DEBUG"

_WORKER = re.compile(r"^Caught (\w+) in DataLoader worker process \d+\.", re.MULTILINE)


class UsageError(ValueError):
    """The command line or a config cannot be understood. The message is one line."""


def _own_folders() -> tuple[str, ...]:
    import mmemb

    folders = [*mmemb.__path__]
    components = sys.modules.get("mmemb.components")
    if components is not None:
        folders += [*components.__path__]
    return tuple(str(Path(folder).resolve()) + os.sep for folder in folders)


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and str(Path(frames[-1].filename).resolve()).startswith(_own_folders())


def _raised_in(package: str, error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and package in Path(frames[-1].filename).parts


def _from_worker(message: str) -> str | None:
    """The message of an error that our code raised in a data-loader worker. None for any other error."""
    if not _WORKER.match(message):
        return None
    files = re.findall(r'^\s*File "([^"]+)", line \d+', message, re.MULTILINE)
    if not files or not str(Path(files[-1]).resolve()).startswith(_own_folders()):
        return None
    last = message.strip().rsplit("\n", 1)[-1]
    return last.split(": ", 1)[-1]


def one_line(text: str) -> str:
    """Replaces line breaks and runs of blanks by single spaces."""
    return " ".join(text.split())


def explain(error: BaseException) -> str | None:
    """Explains a user's mistake in one line. None for a defect, which needs its traceback."""
    message: str | None = None
    if isinstance(error, UsageError | PluginError):
        message = str(error)
    elif isinstance(error, OSError):
        message = _explain_os(error)
    elif isinstance(error, ValueError):
        message = _explain_value(error)
    elif type(error).__name__ == "MisconfigurationException":
        # Lightning raises it for settings that this machine does not support. Compared by name: importing it is slow.
        message = f"{error} (a setting of the trainer)"
    return one_line(message) if message is not None else None


def _explain_value(error: ValueError) -> str | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ValueError) and _raised_by_us(cause):
            return str(cause)
        # When a nested part refuses its arguments, jsonargparse wraps the error in one for each type that it tried.
        cause = (cause.__cause__ or cause.__context__) if _raised_in("jsonargparse", cause) else None
    return _from_worker(str(error))


def _explain_os(error: OSError) -> str | None:
    if isinstance(error, ConnectionError | TimeoutError):
        return str(error) if _raised_by_us(error) else None
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _raised_by_us(error):
        return error.strerror or str(error)
    if error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    ):  # from a library, without a file name
        return f"{error.strerror}; make room where the run writes, and start it again"
    return _from_worker(str(error))


def tell_interrupted(hint: str) -> None:
    """Prints one line for a command that Ctrl-C or SIGTERM stopped."""
    print(f"mmemb: interrupted; {hint}" if hint else "mmemb: interrupted", file=sys.stderr, flush=True)


def tell(message: str) -> None:
    """Prints one error line. In a run of several processes every rank may print its own."""
    print(f"mmemb: error: {message}", file=sys.stderr, flush=True)


@contextmanager
def _told_once() -> Iterator[None]:
    """Prevents a thread from printing an error that the main thread raises later, on the next write to TensorBoard."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs, /) -> None:
        error = failed.exc_value
        mistake = error is not None and explain(error) is not None
        if not mistake or getattr(failed.thread, "exception", None) is not error:
            before(failed)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def guarded(run: Callable[[], int], *, debug: bool = False, hint: str = "") -> int:
    """Runs a command and reports mistakes in one line with exit code 2, and Ctrl-C in one line with exit code 130.

    Args:
        run: the command. It returns its exit code.
        debug: shows every error with its traceback, as ``MMEMB_DEBUG=1`` does.
        hint: what to do after Ctrl-C.

    Returns:
        The exit code.
    """
    debug = debug or os.environ.get(DEBUG, "") not in ("", "0")
    try:
        if debug:
            return run()
        with _told_once():
            return run()
    except KeyboardInterrupt:
        if debug:
            raise
        tell_interrupted(hint)
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.code, str):
            tell(one_line(stop.code))
            return EXIT_MISTAKE
        return int(stop.code or 0)
    except Exception as error:
        message = explain(error)
        if message is None or debug:
            raise
        tell(message)
        return EXIT_MISTAKE
