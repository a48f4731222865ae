"""Shortens an error message of jsonargparse (4.53) to one line: the place, what was expected, what was given, the fix.

If a value fits no type of a union, jsonargparse lists one error per type, nested as deep as the classes. The innermost
error that is not about ``None`` is the useful one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

from mmemb.commands.parsing.errors import one_line
from mmemb.commands.parsing.short_names import ShadowedNameError
from mmemb.commands.parsing.shorthand import PartError
from mmemb.registry import UnknownComponentError

Error = TypeVar("Error", bound=BaseException)

_KEY = re.compile(r'Parser key "([^"]+)"( element \d+)?:\s*')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*")
_GIVEN = re.compile(r"\.? ?Got value: (.*)")
_GIVEN_UNION = re.compile(r"^Given value: (.*?)(\. Got value: .*)?$")
_NESTED = re.compile(r"^NestedArg\(key='[^']*', val=(.*)\)$")
_TYPE = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>")
_NOISE = re.compile(
    r"^(Expected a path but .* either not accessible or invalid|Does not validate against any of the Union subtypes|"
    r"Subtypes: .*|Errors:|Given value type: .*|Given value: .*|Expected a <class 'NoneType'>|"
    r"Subclass types expect one of:|a class path \(str\)|a dict with.*)?$"
)
_SOURCES = re.compile(r"^data\.(train|control|validation|test|predict)$")
_NO_SOURCE = re.compile(
    r"^ *- (Expected a <class 'list'>|Expected a dot import path string|Unexpected import path|No module named|"
    r"Invalid content in sub-config|Not a valid subclass of Source)|codec can't decode|"
    r"^ *Given value: \['",
    re.MULTILINE,
)
"""Messages about a data file given instead of ``[{path: FILE}]``: jsonargparse reads the file as a config of a part."""
_NO_SUBCLASS = re.compile(r"Expected '([^']+)' to be (?:a subclass of|a function that returns) (?:<class ')?(\w+)")
_CALLABLE = re.compile(r"^Type typing\.Callable.* expects a function or a callable class:\s*")


def causes(error: BaseException | None, kind: type[Error]) -> Iterator[Error]:
    """The errors of one type in the chain of causes of an error, starting with the error itself."""
    while error is not None:
        if isinstance(error, kind):
            yield error
        error = error.__cause__ or error.__context__


def nearest(word: str, among: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest word, or an empty string."""
    close = difflib.get_close_matches(word, among, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def place(message: str) -> str:
    """The dotted key that a message is about. Empty if the message names no key."""
    return ".".join(key for key, _ in _KEY.findall(message))


def condense(message: str, error: BaseException | None, keys: Sequence[str]) -> str:
    """Shortens a parser's message to one line.

    Args:
        message: the message of jsonargparse.
        error: the exception that jsonargparse raised.
        keys: every key and option of the parser, to suggest the nearest one.
    """
    own: list[BaseException] = []
    for kind in (UnknownComponentError, ShadowedNameError, PartError):
        own += causes(error, kind)
    if own:
        where, text = place(message), _KEY.sub("", one_line(str(own[-1])))
        return f"{where}: {text}" if where else text
    found = re.search(r"does not accept option '([^']+)'", message)
    if found and "Parser key" not in message:
        return f"there is no setting {found[1]!r}{nearest(found[1], keys)}"
    found = re.match(r"unrecognized arguments: (\S+)", one_line(message))
    if found:
        option = found[1].split("=", 1)[0]
        return f"there is no option {option!r}{nearest(option, [f'--{key}' for key in keys])}"
    where = place(message)
    if _SOURCES.match(where) and _NO_SOURCE.search(message):  # the value is left out because it may be a row of data
        return f"{where}: expected a list of sources, such as [{{path: pairs.jsonl}}]"
    detail = _detail(message)
    return one_line(f"{where}: {detail}" if where else detail)


def _detail(message: str) -> str:
    """What is wrong with the value, without the key."""
    classes = _CLASS.findall(message)
    given = None
    lines = []
    for raw in message.split("\n"):
        line = _KEY.sub("", _CALLABLE.sub("", _CLASS.sub("", _KEY.sub("", raw).strip().removeprefix("- ")))).strip()
        value = _GIVEN_UNION.search(line) or _GIVEN.search(line)
        if value:
            given = given or _plain(value[1])
            line = _GIVEN.sub("", line)
        if not _NOISE.match(line):
            lines.append(line.rstrip("."))
    if not lines:
        return one_line(message)
    first = lines[0] if len(lines) < len(message.split("\n")) else one_line(message)
    return _reworded(first, given, classes[-1] if classes else None)


def _plain(value: str) -> str:
    nested = _NESTED.match(value.strip())
    return (nested[1] if nested else value.strip()).strip("'\"")


def _reworded(line: str, given: str | None, class_path: str | None) -> str:
    """Rewrites a message so that it says how to fix the error."""
    option = re.match(r"Option '([^']+)' is not accepted", line)
    if option and class_path:
        takes = _arguments(class_path)
        listing = f"it takes {', '.join(takes)}" if takes else "it takes no arguments"
        return f"{class_path} has no argument {option[1]!r}{nearest(option[1], takes)} ({listing})"
    if dotted := re.match(r"Expected a dot import path string: (.*)", line):
        return f"{dotted[1]!r} is not a known class; give a dotted path, such as torch.optim.AdamW"
    if other := _NO_SUBCLASS.match(line):
        example = ", such as torch.optim.AdamW" if other[2] == "Optimizer" else ""
        return f"{other[1]!r} is no {other[2]}; give the path of a subclass of {other[2]}{example}"
    if abstract := re.match(r"Expected an instantiatable class, but (\S+) is abstract", line):
        return f"{abstract[1]} is abstract; name a class that implements it (`mmemb components` lists them)"
    if contract := re.match(r"Not a valid subclass of (\w+)", line):
        line = f"expected the short name or class path of a {contract[1]}"
    if expected := re.match(r"Expected an? (.*)", _TYPE.sub(r"\1", line)):
        what = expected[1]
        line = f"expected {'one of ' + what[15:-1] if what.startswith('typing.Literal[') else what}"
    if class_path and ("No module named" in line or "has no attribute" in line):
        return f"{class_path!r} cannot be imported: {line}; is the file on PYTHONPATH?"
    return f"{line}, got {given!r}" if given is not None and line.startswith("expected") else line


def _arguments(class_path: str) -> list[str]:
    """The names of a class's arguments. The parser has already imported the class."""
    module, _, name = class_path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return [key for key in parameters if key not in ("self", "args", "kwargs")]
