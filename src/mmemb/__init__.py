"""mmemb: multimodal embedding models that think when it pays.

The public names below are loaded when they are first used, so that ``import mmemb`` stays fast and imports no torch::

    import mmemb

    run = mmemb.fit("recipes/r1.yaml", trainer={"max_steps": 50})
    embedder = mmemb.Embedder.from_checkpoint(run.folder)
    embedder.similarity(embedder.encode(["currency of chile"]), embedder.encode(["chilean peso"], side="target"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmemb.commands.fit import fit
    from mmemb.inference.embedder import Embedder
    from mmemb.kernels import infonce
    from mmemb.losses.gradcache import cached_step
    from mmemb.losses.infonce import InfoNCE
    from mmemb.registry import available, create
    from mmemb.types import Item, Pair

__version__ = "0.1.0"
__all__ = ["Embedder", "InfoNCE", "Item", "Pair", "available", "cached_step", "create", "fit", "infonce"]

_MODULES = {
    "Embedder": "mmemb.inference.embedder",
    "InfoNCE": "mmemb.losses.infonce",
    "Item": "mmemb.types",
    "Pair": "mmemb.types",
    "available": "mmemb.registry",
    "cached_step": "mmemb.losses.gradcache",
    "create": "mmemb.registry",
    "fit": "mmemb.commands.fit",
    "infonce": "mmemb.kernels",
}
"""Public name -> the module that has it."""

if not TYPE_CHECKING:  # a type checker would take every unknown name of the package for `Any`

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
