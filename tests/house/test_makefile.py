"""Tests the set-up by `make` with a fake Python and pip: done once, repeated after a failure, refused if too old."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER = """#!/usr/bin/env bash
# Checks versions like a real Python; `-m venv DIR` makes DIR/bin/python, which logs its arguments.
[ "$1" = "-c" ] && exec {python} -c "import sys; sys.version_info = {version}; sys.executable = '$0'
${{2}}"
mkdir -p "$3/bin" && cp "$PWD/inner" "$3/bin/python" && cp "$PWD/inner" "$3/bin/mmemb" && chmod +x "$3"/bin/*
"""
INNER = """#!/usr/bin/env bash
[ "$*" = "-m pip --version" ] && exit 0
[ "$1" = "-c" ] && exec "$REAL" -c "import sys; sys.version_info = $VERSION; $2"
echo "$(basename "$0") $*${COVERAGE_CORE:+ with $COVERAGE_CORE}" >> log
[[ "$*" != *install* ]] || [ ! -e broken ]
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile and a fake Python 3.11."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "inner").write_text(INNER)
    python(tmp_path, (3, 11, 4))
    return tmp_path


def python(folder: Path, version: tuple[int, ...]) -> None:
    """Writes the fake interpreter."""
    file = folder / "python"
    file.write_text(INTERPRETER.format(python=sys.executable, version=version))
    file.chmod(0o755)


def make(folder: Path, *words: str, version: tuple[int, ...] = (3, 11, 4)) -> subprocess.CompletedProcess[str]:
    """Runs make in the folder, without the variables of an outer make. The environment's Python reports ``version``."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "COVERAGE"))
    }
    environment |= {"REAL": sys.executable, "VERSION": repr(version)}
    return subprocess.run(
        ["make", "PYTHON=./python", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def log(folder: Path) -> list[str]:
    """The calls of the environment's programs with their arguments, one line per call."""
    file = folder / "log"
    return file.read_text().splitlines() if file.exists() else []


def test_make_run_installs_once_and_trains_each_time(clone: Path) -> None:
    assert make(clone, "run").returncode == 0
    assert make(clone, "run").returncode == 0
    installs = [line for line in log(clone) if "install" in line]
    assert installs == ["python -m pip install --disable-pip-version-check -c constraints.txt -e ."]
    assert log(clone).count("mmemb fit --config recipes/r1.yaml") == 2


def test_make_test_installs_the_development_tools_and_measures_coverage(clone: Path) -> None:
    assert make(clone, "test").returncode == 0
    install, tests = log(clone)
    assert install.endswith("-c constraints.txt -e .[dev]")
    assert tests.startswith("python -m pytest")
    assert tests.endswith("--cov --cov-report=term")


def test_coverage_uses_sys_monitoring_from_python_3_12_on(clone: Path) -> None:
    assert make(clone, "test", version=(3, 12, 1)).returncode == 0
    assert log(clone)[-1].endswith("--cov --cov-report=term with sysmon")


def test_a_failed_install_is_repeated(clone: Path) -> None:
    (clone / "broken").touch()
    assert make(clone, "run").returncode != 0
    (clone / "broken").unlink()
    assert make(clone, "run").returncode == 0
    assert sum("install" in line for line in log(clone)) == 2


def test_changed_requirements_are_installed(clone: Path) -> None:
    make(clone, "run")
    later = (clone / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(clone / "constraints.txt", (later, later))
    make(clone, "run")
    assert sum("install" in line for line in log(clone)) == 2


def test_an_old_python_is_an_error_of_one_line(clone: Path) -> None:
    python(clone, (3, 10, 2))
    done = make(clone, "run")
    assert done.returncode != 0
    assert "mmemb needs Python 3.11 or newer, and ./python is 3.10" in done.stderr
    assert not (clone / ".venv").exists()


def test_the_error_for_a_missing_python_names_it(clone: Path) -> None:
    done = make(clone, "run", "PYTHON=no-such-python")
    assert "there is no no-such-python" in done.stderr


def test_help_is_the_default_and_lists_every_command(clone: Path) -> None:
    shown = make(clone).stdout
    for command in ("run", "test", "lint", "format", "clean", "help"):
        assert f"\n  {command} " in shown
    assert log(clone) == []
