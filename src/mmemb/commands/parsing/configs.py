"""Finds the config files on the command line and checks them before they are parsed.

The early check lets an error name the file and the line.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import yaml


def config_paths(args: Sequence[str]) -> list[Path]:
    """The files given by ``--config``, ``-c`` or ``--config=``, in order."""
    paths = []
    for position, word in enumerate(args):
        if word in ("-c", "--config") and position + 1 < len(args):
            paths.append(Path(args[position + 1]))
        elif word.startswith("--config="):
            paths.append(Path(word.removeprefix("--config=")))
    return paths


def check_yaml(path: Path) -> None:
    """Checks that a config file is a readable YAML mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid YAML (the message names the line), or it is not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"there is no config file {path} (current folder: {Path.cwd()})")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a config is a mapping (`model: ...`), not {type(content).__name__}")
