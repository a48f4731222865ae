"""Runs mypy over the whole project, `components/` included.

The distribution joins two folders into one package: `src/mmemb` and `components` (as `mmemb.components`). Python learns
this from the install; mypy follows no such hook. So a folder of links that looks like the installed package is made
(`build/typing/mmemb`), mypy checks that, and its messages are shown with the real paths.

    python tools/typecheck.py [mypy options]

Exits with mypy's status.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINKS = Path("build/typing")
"""The folder of links, relative to the root: mypy prints paths as it was given them."""
SCRIPTS = ("benchmarks", "tools")
"""Folders checked beside the package; tests are left to pytest."""


def link_package(root: Path) -> Path:
    """Makes the folder of links afresh and returns it.

    Args:
        root: the project's root, with `src/mmemb` and `components`.
    """
    package = root / LINKS / "mmemb"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    for entry in (root / "src" / "mmemb").iterdir():
        if entry.name not in ("__pycache__", "components"):
            (package / entry.name).symlink_to(entry)
    (package / "components").symlink_to(root / "components")
    return package


def real_paths(text: str) -> str:
    """mypy's messages with the links' paths replaced by what they point to."""
    text = re.sub(rf"{re.escape(str(LINKS))}/mmemb/components/", "components/", text)
    return text.replace(f"{LINKS}/mmemb/", "src/mmemb/")


def main(options: list[str]) -> int:
    """Checks everything and returns mypy's exit status (0 clean, 1 errors, 2 mypy itself failed)."""
    link_package(ROOT)
    folders = [name for name in SCRIPTS if any((ROOT / name).rglob("*.py"))]
    command = [sys.executable, "-m", "mypy", *options, str(LINKS / "mmemb"), *folders]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(LINKS)}, capture_output=True, text=True, check=False
    )
    sys.stdout.write(real_paths(done.stdout))
    sys.stderr.write(real_paths(done.stderr))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
