"""`mmemb components` and the dispatch around the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from mmemb import __version__
from mmemb.__main__ import COMMANDS
from mmemb.registry import listings

Cli = Callable[..., Any]


def test_the_table_has_every_part_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = cli("components")
    assert (code, err) == (0, "")
    lines = out.strip().split("\n")
    assert len(lines) == 1 + len(listings())
    for item, line in zip(listings(), lines[1:], strict=True):
        assert item.name in line.split()


def test_one_kind_and_json(cli: Cli) -> None:
    code, out, _ = cli("components", "--kind", "pooler", "--json")
    assert code == 0
    found = json.loads(out)
    assert {item["kind"] for item in found} == {"pooler"}
    assert {"embed_token", "mean"} <= {item["name"] for item in found}
    assert all(item["summary"] for item in found)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(cli: Cli, words: list[str]) -> None:
    code, out, _ = cli(*words)
    assert code == 0
    for command, (summary, _) in COMMANDS.items():
        assert command in out
        assert summary in out


def test_no_command_is_a_mistake_that_shows_the_help(cli: Cli) -> None:
    code, out, _ = cli()
    assert code == 2
    assert "commands:" in out


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"mmemb {__version__}\n", "")


@pytest.mark.parametrize(
    "command", [name for name, (_, module) in COMMANDS.items() if module != "mmemb.commands.train"]
)
def test_every_command_explains_itself_with_an_example(cli: Cli, command: str) -> None:
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: mmemb {command}")
    assert f"mmemb {command}" in out.split("\n", 1)[1] or command == "components"


@pytest.mark.parametrize(
    "command", [name for name, (_, module) in COMMANDS.items() if module == "mmemb.commands.train"]
)
def test_the_trainers_commands_explain_themselves_with_examples(cli: Cli, command: str) -> None:
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert "examples:" in out
    assert f"mmemb {command} --config recipes/r1.yaml" in out
    assert "--model.selector" in out


def test_the_real_command_reports_a_mistake_by_exit_code_and_one_line() -> None:
    command = [sys.executable, "-m", "mmemb", "fit", "--config", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("mmemb: error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
