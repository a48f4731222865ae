"""Tests rules for the whole tree: forbidden names in texts, unsafe loading, sizes, documentation and the README."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from mmemb import registry

ROOT = Path(__file__).resolve().parents[2]
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".cfg", ".in", ".sh", ".jinja", ""}
LONGEST_FUNCTION = 60
"""Maximum lines of a function's body, without its docstring, in the package and its components."""
LONGEST = 400
"""Maximum lines of a source file. Split a longer file by what a newcomer would look for."""


def tracked() -> list[Path]:
    """The project's files that git tracks, or every file of an unpacked sdist."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        files = [ROOT / line for line in done.stdout.splitlines()]
    else:
        files = [file for file in ROOT.rglob("*") if not {".venv", "build", "runs"} & set(file.relative_to(ROOT).parts)]
    return [file for file in files if file.is_file()]


def texts(*suffixes: str) -> list[tuple[str, str]]:
    """(path, content) of every text file, or of those with one of the suffixes."""
    wanted = set(suffixes) or TEXT
    return [
        (str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")) for file in tracked() if file.suffix in wanted
    ]


def offenders(pattern: str, *suffixes: str) -> list[str]:
    """``path:line`` of every line that matches."""
    found = re.compile(pattern)
    return [
        f"{path}:{number}"
        for path, text in texts(*suffixes)
        for number, line in enumerate(text.splitlines(), 1)
        if found.search(line)
    ]


def test_the_pattern_search_finds_a_known_line() -> None:
    assert any(place.startswith("README.md:") for place in offenders("mmemb", ".md"))


def test_text_names_no_package_registry_host() -> None:
    # Put together from pieces, so that this file passes its own test.
    hosts = [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("registry", "yarnpkg"),
        ("download.pytorch", "org"),
        ("jsdel" + "ivr",),
        ("un" + "pkg",),
    ]
    pattern = "(?i)" + "|".join(re.escape(".".join(pieces)) for pieces in hosts)
    assert re.search(pattern, "https://" + ".".join(hosts[0]))
    assert offenders(pattern) == []


def test_text_names_no_private_path() -> None:
    assert offenders(r"(?<![\w.])/(work|tmp|home|root|opt|Users)/\w") == []


def unsafe_calls(text: str) -> list[int]:
    """Lines of calls that can run code from what they load."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
        called = ast.unparse(node.func)
        unpickles = re.fullmatch(
            r"(c?pickle|dill|joblib)\.(loads?|Unpickler)|yaml\.(unsafe_|full_)?load(_all)?", called
        )
        if given.get("trust_remote_code") is True or given.get("weights_only") is False or unpickles:
            lines.append(node.lineno)
    return lines


def test_no_file_is_loaded_in_a_way_that_can_run_code() -> None:
    sample = "import torch\ntorch.load(f, weights_only=False)\nload(m, trust_remote_code=True)\npickle.load(f)\n"
    assert unsafe_calls(sample) == [2, 3, 4]
    # Tests are left out, since they pickle their own objects to test that workers can receive them.
    code = [(path, text) for path, text in texts(".py") if not path.startswith("tests/")]
    assert [f"{path}:{line}" for path, text in code for line in unsafe_calls(text)] == []
    assert offenders(r"trust_remote_code:\s*true", ".yaml", ".yml") == []


def test_no_file_is_too_long() -> None:
    lengths = {path: text.count("\n") for path, text in texts(".py")}
    assert [path for path, count in lengths.items() if count > LONGEST] == []


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_the_lines_of_a_body_do_not_count_its_docstring() -> None:
    long = 'def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    y = (\n        x\n    )\n    return y\n'
    silent = 'def g():\n    """Nothing else."""\n'
    functions = [node for node in ast.parse(long + silent).body if isinstance(node, ast.FunctionDef)]
    assert [body_lines(function) for function in functions] == [4, 0]


@pytest.mark.parametrize("path", sorted(path for path, _ in texts(".py") if path.startswith(("src/", "components/"))))
def test_no_function_is_too_long(path: str) -> None:
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    lengths = {f"{node.name}:{node.lineno}": body_lines(node) for node in ast.walk(tree) if isinstance(node, functions)}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_undefined_and_unused_names_are_never_ignored() -> None:
    assert offenders(r"[n]oqa:.*\b(F821|F841)\b") == []


@pytest.mark.parametrize("path", sorted(path for path, _ in texts(".py") if path.startswith(("src/", "components/"))))
def test_every_module_and_public_name_has_a_docstring(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    definitions = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, definitions) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize("listing", registry.listings(), ids=lambda item: f"{item.kind}.{item.name}")
def test_every_component_and_parameter_is_documented(listing: registry.Listing) -> None:
    assert 10 <= len(listing.summary) <= 120
    assert listing.summary.endswith(".")
    cls = registry.resolve(listing.kind, listing.name)
    parameters = [name for name in inspect.signature(cls.__init__).parameters if name not in {"self", "args", "kwargs"}]
    documentation = (inspect.getdoc(cls) or "") + (inspect.getdoc(cls.__init__) or "")
    assert [name for name in parameters if not re.search(rf"(?m)^\s*{name}\s*(\(.*\))?:", documentation)] == []
    hints = inspect.get_annotations(cls.__init__)
    assert [name for name in parameters if name not in hints] == []


def test_readme_has_exactly_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^make (.+)$", readme) == ["run", "test"]


ONE_MEANING = ("pool", "path", "engine", "reference", "shard", "continuation")
"""Words that once had several meanings: a name made of one of them alone may be defined once in the package."""


def defined_names(root: Path) -> list[str]:
    """Names of classes, functions and type aliases at the top of every module, in lower case, without a plural s.

    Constants are left out.
    """
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.append(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.append(node.target.id)
    return [name.lower().strip("_").removesuffix("s") for name in found if not name.isupper()]


def test_a_word_of_the_reviews_list_names_one_thing() -> None:
    names = defined_names(ROOT / "src" / "mmemb") + defined_names(ROOT / "components")
    assert "engine" in names
    assert {word: names.count(word) for word in ONE_MEANING if names.count(word) > 1} == {}


def test_source_files_are_short() -> None:
    lengths = [text.count("\n") for path, text in texts(".py") if path.startswith(("src/", "components/"))]
    assert sorted(lengths)[len(lengths) // 2] <= 200
