"""Tests that the check of the pages' English finds phrases at their lines, and that the pages pass it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose

ROOT = Path(__file__).resolve().parents[2]
LONG = " ".join(["word"] * (prose.LONGEST + 1))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("The pool was made anew.", "'anew'"),
        ("It lies beside the checkpoint.", "'beside'"),
        ("A bad width is told at once.", "'is told'"),
        ("The run goes\non with the next shard.", "'goes on'"),
        ("The value stands in the summary.", "'stands in'"),
        ("`never`: nobody thinks.", "'nobody thinks'"),
        ("It takes seven tokens\na query.", "'tokens a query'"),
        ("| `budget` | most rationale tokens of a row |", "'most rationale tokens'"),
        ("The gain [D] is net.", "'[D]'"),
    ],
)
def test_phrases_that_we_do_not_use_are_found(text: str, word: str) -> None:
    (finding,) = prose.check_page(f"# Title\n\n{text}\n")
    assert finding.line == 3
    assert finding.reason.startswith(f"{word}: ")


@pytest.mark.parametrize(
    "text", ["besides", "stands in for", "tokens per query", "most tokens", "goes on top", "[D](x)"]
)
def test_similar_phrases_are_not_found(text: str) -> None:
    assert prose.check_page(f"It {text}.\n") == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"Short. {LONG}.", 1),
        (f"Short.\n{LONG}.", 2),
        (f"- short\n- {LONG}", 2),
        (f"| short |\n| --- |\n| {LONG} |", 3),
        (f"## {LONG}", 1),
    ],
)
def test_long_sentences_are_found(text: str, line: int) -> None:
    (finding,) = prose.check_page(text + "\n")
    assert finding.line == line
    assert finding.reason.startswith(f"a sentence of {prose.LONGEST + 1} words")


@pytest.mark.parametrize(
    "text",
    [
        " ".join(["word"] * prose.LONGEST) + ". Another sentence.",
        f"```text\nbeside {LONG}\n```",
        f"<!-- table: x -->\n| beside | {LONG} |\n<!-- end of table -->",
        f"<!-- beside {LONG} -->",
        f"Code: `beside {LONG}`.",
        f"Code:\n\n    beside {LONG}",
        f"A [link](beside-{LONG.replace(' ', '-')}).",
    ],
)
def test_code_comments_and_tables_of_results_are_not_checked(text: str) -> None:
    assert prose.check_page(text + "\n") == []


def test_code_is_checked_for_phrases_in_docstrings_comments_and_messages() -> None:
    source = (
        '"""Made anew."""\n\n'
        "beside = 1  # a name is no prose\n"
        "# The run goes\n# on.\n"
        'raise ValueError("two tokens " f"a query, {beside}")\n'
    )
    assert [(finding.line, finding.reason.split(":")[0]) for finding in prose.check_code(source)] == [
        (1, "'anew'"),
        (4, "'goes on'"),
        (6, "'tokens a query'"),
    ]


def test_command_names_file_and_line_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).write_text("Plain.\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "lab_notes.md").write_text("A log made anew.\n")
    (tmp_path / "part.py").write_text('"""Made anew."""\n')
    root = ["--root", str(tmp_path)]
    assert prose.main(root) == 0
    assert prose.main([*root, "--code", "part.py"]) == 1
    assert capsys.readouterr().out.startswith("part.py:1: 'anew'")
    (tmp_path / "docs" / "page.md").write_text("\nAll beside it.\n")
    assert prose.main(root) == 1
    assert capsys.readouterr().out.startswith("docs/page.md:2: 'beside'")


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in prose.LOGS], ids=lambda page: page.name)
def test_pages_pass(page: Path) -> None:
    assert prose.check_page(page.read_text(encoding="utf-8")) == []
