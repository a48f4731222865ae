"""Shared by every test: offline, seeded, GPU tests skipped without a GPU, the command line as a fixture."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

# Before any test imports the libraries that read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest

_AT_ONCE = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _AT_ONCE > 1:  # tests side by side share the cores, or their threads wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _AT_ONCE)))

_HERE = Path(__file__).resolve().parent
_LONG = (
    "integration/test_bad_input.py",
    "docs/test_docs.py",
    "unit/kernels/test_infonce_triton.py",
    "integration/test_resume.py",
    "unit/training/test_refresh.py",
    "integration/test_commands.py",
    "commands/test_rationales.py",
    "unit/training/test_control.py",
)
"""Files that take a minute and more, the longest first. They begin first, so that no process is left with one of them
at the end, and coverage is not taken of them: tracing doubles their time, and others reach most of their lines.
"""

_LOOPBACK = {"localhost", "::1", "0.0.0.0", "::"}


class Ran(NamedTuple):
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the long files first; skips tests marked ``gpu`` where there is no CUDA device."""
    place = {_HERE / name: number for number, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path, len(place)))  # stable: the order within a file stays
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Takes no coverage of the long files. (The marker ``no_cover`` of pytest-cov does nothing under xdist.)"""
    if "coverage" not in sys.modules or item.path not in {_HERE / name for name in _LONG}:
        return (yield)
    coverage, stopped = sys.modules["coverage"].Coverage, []
    while (tracer := coverage.current()) is not None:  # a process of xdist has two, one within the other
        tracer.stop()
        stopped.append(tracer)
    try:
        return (yield)
    finally:
        for tracer in reversed(stopped):
            tracer.start()


def _is_local(address: Any) -> bool:
    """Unix sockets and this machine itself."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    return host in _LOOPBACK or host.startswith("127.") or host in {socket.gethostname(), _own_address()}


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuses every connection that would leave this machine."""
    for name in ("connect", "connect_ex"):
        real = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, _real: Callable[..., Any] = real) -> Any:
            if not _is_local(address):
                raise OSError(f"a test tried to reach {address[0]}; tests run offline")
            return _real(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers for a test whatever ran before it; a library imported later has a fixed start."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs ``mmemb`` in this process: ``cli("components", "--kind", "selector") -> (code, out, err)``."""

    def run(*argv: str) -> Ran:
        from mmemb.__main__ import main

        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) or stop.code is None else 1
        out, err = capsys.readouterr()
        return Ran(int(code or 0), out, err)

    return run
