"""Runs mypy over the whole project, `components/` included.

The distribution joins two folders into one package: `src/mmemb` and `components` (as `mmemb.components`). The
installation tells Python so, but mypy does not follow it. So this tool makes a folder of links that looks like the
installed package (`build/typing/mmemb`). It runs mypy on that folder and prints the messages with the real paths.

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
"""The folder of links, relative to the root, because mypy prints paths as they were given."""
SCRIPTS = ("benchmarks", "tools")
"""Folders that are checked in addition to the package; tests are not checked."""


def link_package(root: Path) -> Path:
    """Makes the folder of links again and returns it.

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
    """The messages of mypy, with the paths of links replaced by the real paths."""
    text = re.sub(rf"{re.escape(str(LINKS))}/mmemb/components/", "components/", text)
    return text.replace(f"{LINKS}/mmemb/", "src/mmemb/")


def main(options: list[str]) -> int:
    """Checks everything and returns mypy's exit status: 0 no errors, 1 errors, 2 mypy itself failed."""
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
