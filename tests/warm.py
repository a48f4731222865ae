"""A server that runs `mmemb` and `python` in forks of a process that has imported what they import.

Starting torch, Lightning and transformers takes seconds a command; a fork has them at once, and is as much a process of
its own: arguments, environment, folder, standard streams and exit code are those of the caller.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ("torch", "lightning", "transformers", "mmemb.commands.train", "mmemb.training.module", "mmemb.inference")

# A caller: any `python -c`, `python -m` or `mmemb` on the path that `commands` gives.
CALLER = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    asked = {{"command": {command!r}, "words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
    sys.exit(int(server.recv(16) or b"1"))
"""


@contextmanager
def commands(folder: Path) -> Iterator[Path]:
    """A folder of `mmemb` and `python`, to be put first on the path, that work while the context is open."""
    address, programs = folder / "server", folder / "bin"
    programs.mkdir()
    for command in ("mmemb", "python"):
        path = programs / command
        path.write_text(CALLER.format(python=sys.executable, address=str(address), command=command), encoding="utf-8")
        path.chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.warm", str(address)], cwd=ROOT)
    try:
        while not address.exists():
            if server.poll() is not None:
                raise RuntimeError(f"the server of warm commands ended with status {server.returncode}")
            time.sleep(0.05)
        yield programs
    finally:
        server.terminate()
        server.wait()


def serve(address: str) -> None:
    """Answers callers until the process that started it is gone."""
    for name in PRELOADED:
        __import__(name)
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks below
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(f"{address}.part")
        server.listen()
        server.settimeout(1.0)
        os.replace(f"{address}.part", address)  # where it is, it listens
        while os.getppid() == parent:
            with suppress(TimeoutError):
                caller, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    answer(caller)
                caller.close()


def answer(caller: socket.socket) -> NoReturn:
    """Runs what a caller asks for in a fork of its own, tells the caller how that ended, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    caller.settimeout(None)
    content, streams, _, _ = socket.recv_fds(caller, 2**20, 3)
    child = os.fork()
    if child == 0:
        caller.close()
        become(json.loads(content), streams)
    for stream in streams:
        os.close(stream)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    caller.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def become(asked: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """Turns this process into the one asked for and ends it as that one ends."""
    for stream, number in zip(streams, (0, 1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code: object = 0
    try:
        run(asked["command"], asked["words"])
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        output.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run(command: str, words: Sequence[str]) -> None:
    """`mmemb WORDS`, `python -c CODE WORDS` or `python -m MODULE WORDS`."""
    if command == "mmemb":
        from mmemb.__main__ import main

        sys.argv = ["mmemb", *words]
        raise SystemExit(main())
    how, what, *rest = words
    sys.path.insert(0, "")
    if how == "-c":
        module = sys.modules["__main__"] = ModuleType("__main__")
        sys.argv = ["-c", *rest]
        exec(compile(what, "<string>", "exec"), module.__dict__)
    elif how == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        raise SystemExit(f"python {how}: warm commands know -c and -m alone")


if __name__ == "__main__":
    serve(sys.argv[1])
