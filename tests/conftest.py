"""Shared by every test: offline, seeded, GPU tests skipped without a GPU, the command line as a fixture."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import sys
from collections.abc import Callable, Generator
from functools import cache
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
_DURATIONS = _HERE / "durations.json"
"""Seconds by test file, relative to this folder; ``pytest --store-durations`` measures them again."""

_UNTRACED_FROM = 45.0
"""Files of so many seconds are left out of coverage where it traces every line, which may double their time."""

_LOOPBACK = {"localhost", "::1", "0.0.0.0", "::"}


class Ran(NamedTuple):
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option that measures the files again."""
    parser.addoption("--store-durations", action="store_true", help=f"write each file's seconds to {_DURATIONS.name}")


def pytest_configure(config: pytest.Config) -> None:
    """Measures in the main process, which hears of every test; the workers of xdist would each write their own part."""
    if config.getoption("--store-durations") and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Stopwatch())


@cache
def durations() -> dict[Path, float]:
    """Seconds by test file, as they were measured last."""
    known = json.loads(_DURATIONS.read_text(encoding="utf-8"))
    return {_HERE / name: seconds for name, seconds in known.items()}


class Stopwatch:
    """Adds up the seconds of each file's tests and writes them down; files that did not run keep what they had."""

    def __init__(self) -> None:
        self.seconds: dict[Path, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts set-up, call and tear-down."""
        path = _HERE.parent / report.nodeid.split("::")[0]
        self.seconds[path] = self.seconds.get(path, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        """Writes the file, the longest first, without files that are gone."""
        known = {path: seconds for path, seconds in {**durations(), **self.seconds}.items() if path.exists()}
        ordered = sorted(known, key=lambda path: (-known[path], path))
        kept = {path.relative_to(_HERE).as_posix(): round(known[path], 1) for path in ordered}
        _DURATIONS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; skips tests marked ``gpu`` where there is no CUDA device.

    No process is then left with a long file at the end. A file that was never measured may be long: it comes first.
    """
    items.sort(key=lambda item: -durations().get(item.path, math.inf))  # stable: the order within a file stays
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Takes no coverage of long files where it would trace every line; sys.monitoring is cheap enough for all of them.

    The marker ``no_cover`` of pytest-cov does nothing under xdist.
    """
    traced = "coverage" in sys.modules and os.environ.get("COVERAGE_CORE") != "sysmon"
    if not traced or durations().get(item.path, 0.0) < _UNTRACED_FROM:
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
