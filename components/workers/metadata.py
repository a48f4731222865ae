"""The worker that makes rationales from a row's own fields, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from mmemb.common.digests import describe, digest
from mmemb.interfaces import Worker
from mmemb.types import Item, Rationale

DEFAULT_TEMPLATES = {"rationale": "{rationale}"}


class MetadataWorker(Worker, name="metadata"):
    """Fills templates with a row's fields. By default the rationale is the unchanged field ``rationale``.

    Args:
        templates: templates by label, as in ``{"hop": "the flag of {country} -> {currency}"}``. Each gives one
            candidate, in order. ``{name}`` is replaced by the item's field of that name, ``{{`` by a brace.
    """

    def __init__(self, templates: dict[str, str] | None = None) -> None:
        self.templates = dict(templates or DEFAULT_TEMPLATES)
        self._fields = {label: _field_names(label, template) for label, template in self.templates.items()}

    def propose(self, items: Sequence[Item], k: int, *, seed: int) -> list[list[Rationale]]:
        """See `Worker.propose`. Nothing is random here. A template whose filled text is empty gives no candidate.

        Raises:
            ValueError: an item lacks a field that a template names.
        """
        return [self._fill(item)[:k] for item in items]

    @property
    def settings(self) -> dict[str, Any]:
        """The templates."""
        return {"worker": self.name, "templates": self.templates}

    def _fill(self, item: Item) -> list[Rationale]:
        texts: dict[str, str] = {}
        for label, template in self.templates.items():
            for field in self._fields[label]:
                if field not in item.fields:
                    raise ValueError(
                        f"metadata worker: the item {describe(item)!r} has no field {field!r}, which the template "
                        f"{label!r} names; its fields: {_names(item.fields)}. Add it to the row or change the template"
                    )
            texts.setdefault(template.format_map(item.fields).strip(), digest(template))
        return [
            Rationale(text=text, worker=self.name, finish_reason="template", prompt_hash=template)
            for text, template in texts.items()
            if text
        ]


def _field_names(label: str, template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"metadata worker: the template {label!r} is not well formed: {error}") from None
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"metadata worker: the template {label!r} has {{{name}}}; put a field name in the braces")
    return names


def _names(fields: Mapping[str, str]) -> str:
    return ", ".join(sorted(fields)) or "none"
