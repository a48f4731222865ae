"""Config files as the shell names them, checked before a parser sees them so that an error can name file and line."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import yaml


def config_paths(args: Sequence[str]) -> list[Path]:
    """Files given by ``--config``, ``-c`` or ``--config=``, in order."""
    paths = []
    for position, word in enumerate(args):
        if word in ("-c", "--config") and position + 1 < len(args):
            paths.append(Path(args[position + 1]))
        elif word.startswith("--config="):
            paths.append(Path(word.removeprefix("--config=")))
    return paths


def check_yaml(path: Path) -> None:
    """Makes sure that a config is a readable YAML mapping.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML (with the line), or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"there is no config file {path} (looked from {Path.cwd()})")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a config is a mapping (`model: ...`), not {type(content).__name__}")
