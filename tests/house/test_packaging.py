"""Tests the contents of an installed distribution (folders, data, licence), and that the type checker sees them all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from mmemb import registry

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUNDLED_SUFFIXES = {".json", ".zip", ".parquet"}


def folders_with_code() -> set[str]:
    """Names of the packages, from the folders with an `__init__.py`."""
    names = {
        ".".join(file.parent.relative_to(ROOT / "src").parts) for file in (ROOT / "src" / "mmemb").rglob("__init__.py")
    }
    components = {
        ".".join(("mmemb", *file.parent.relative_to(ROOT).parts)) for file in (ROOT / "components").rglob("__init__.py")
    }
    return names | components


def expected_files() -> set[str]:
    """Paths inside a wheel of every module and data file of the tree."""
    found = set()
    for base, prefix in ((ROOT / "src" / "mmemb", "mmemb"), (ROOT / "components", "mmemb/components")):
        for file in base.rglob("*"):
            inside = file.relative_to(base)
            if not file.is_file() or "__pycache__" in inside.parts:
                continue
            bundled = inside.parts[:2] == ("data", "bundled") and inside.suffix in BUNDLED_SUFFIXES
            if inside.suffix == ".py" or inside.name == "py.typed" or bundled or "tiny" in inside.parts[:-1]:
                found.add(f"{prefix}/{inside.as_posix()}")
    return found


def copy_of_the_tree(target: Path) -> Path:
    """Copies the project's own files without caches and runs, so that a build cannot reuse files of an older one."""
    skip = shutil.ignore_patterns(
        ".git",
        ".venv",
        "build",
        "dist",
        "runs",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        "lightning_logs",
        ".coverage*",
    )
    return Path(shutil.copytree(ROOT, target, ignore=skip))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist); the wheel is built from the sdist, so that a file that the sdist lacks is missing in both."""
    base = tmp_path_factory.mktemp("dist")
    tree = copy_of_the_tree(base / "tree")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(base / "out"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next((base / "out").glob("*.whl")), next((base / "out").glob("*.tar.gz"))


def test_the_packages_list_equals_the_folders() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders_with_code()


def test_every_requirement_is_pinned() -> None:
    def name(requirement: str) -> str:
        head = requirement.split(";")[0]
        for mark in "[<>=!~ ":
            head = head.split(mark)[0]
        return head.strip().lower()

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if line and not line.startswith("#")}
    extras = PROJECT["project"]["optional-dependencies"]
    groups = [PROJECT["project"]["dependencies"], *(extras[extra] for extra in ("dev", "tools", "openai"))]
    wanted = {name(line) for group in groups for line in group} - {PROJECT["project"]["name"]}
    assert wanted - pinned == {"triton"}, "torch's own build decides which triton fits it"


def test_wheel_holds_every_module_and_data_file(distributions: tuple[Path, Path]) -> None:
    inside = set(zipfile.ZipFile(distributions[0]).namelist())
    assert expected_files() <= inside
    licences = {name.rsplit("/", 1)[1] for name in inside if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_sdist_has_the_sources_and_all_files_for_development(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[1]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        name.replace("mmemb/components/", "components/", 1) if name.startswith("mmemb/components/") else f"src/{name}"
        for name in expected_files()
    }
    assert sources <= inside
    for name in (
        "LICENSE",
        "NOTICE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "tests/conftest.py",
        "tools/typecheck.py",
    ):
        assert name in inside, name


def test_installed_wheel_imports_and_lists_the_components(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(target), str(distributions[0])], check=True, capture_output=True)
    script = (
        "import mmemb, mmemb.components.selectors, mmemb.registry as r;"
        "print(mmemb.__file__, mmemb.components.__file__, len(r.listings()))"
    )
    # PYTHONPATH comes before the editable install.
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, components, count = done.stdout.split()
    assert Path(package).is_relative_to(target)
    assert Path(components).is_relative_to(target)
    assert int(count) == len(registry.listings())


def test_type_check_sees_the_components(tmp_path: Path) -> None:
    """Adds an error to `components/` and one to `src/`; mypy must report both with their real paths."""
    for name in ("src", "components", "tools"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "tiny", "*.egg-info")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    seeded = "from mmemb.types import Selection\n\nWRONG: int = Selection(index='x').{}\n"
    (tmp_path / "components" / "selectors" / "seeded.py").write_text(seeded.format("nope"))
    (tmp_path / "src" / "mmemb" / "seeded.py").write_text(
        "from mmemb.components.selectors.seeded import WRONG\n\nTEXT: str = WRONG\n"
    )
    # Libraries are skipped, since these errors do not need them and torch takes a minute.
    command = [sys.executable, "tools/typecheck.py", "--follow-imports=skip", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'components/selectors/seeded.py:3: error: "Selection" has no attribute "nope"' in done.stdout
    assert 'components/selectors/seeded.py:3: error: Argument "index" to "Selection"' in done.stdout
    assert "src/mmemb/seeded.py:3: error: Incompatible types in assignment" in done.stdout
