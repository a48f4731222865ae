"""Defines the result of `Embedder.encode`: unit vectors, and the rationales written for them.

Shape legend: B items, M other items, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mmemb.common.checks import check_numbers
from mmemb.types import Encoded


@dataclass
class Embeddings(Encoded):
    """Embeddings of B items in the order given.

    ``embedding`` is the torch tensor [B, D], and `numpy` gives the array. NumPy also accepts the object itself as an
    array. ``rationale`` has texts only if rationales were requested.
    """

    def __len__(self) -> int:
        """The number of items, B."""
        return len(self.embedding)

    def numpy(self) -> NDArray[np.float32]:
        """Returns the embeddings [B, D] float32. The array shares memory with ``embedding``."""
        return self.embedding.numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Implements NumPy's array protocol."""
        array = self.numpy() if dtype is None else self.numpy().astype(dtype, copy=False)
        return array.copy() if copy else array

    def truncated_to(self, dim: int | None) -> Embeddings:
        """Keeps the first ``dim`` entries, normalised again (Matryoshka, arXiv 2205.13147). None keeps all entries.

        Raises:
            ValueError: ``dim`` is not between 1 and D.
        """
        if dim is None:
            return self
        check_numbers("truncated_to", at_least=1, at_most=self.embedding.shape[1], dim=dim)
        return replace(self, embedding=F.normalize(self.embedding[:, :dim], dim=-1))


def direct(embedding: Tensor) -> Encoded:
    """Wraps the embeddings [B, D] of items that took the direct path."""
    none = torch.zeros(len(embedding))
    return Encoded(embedding, none.bool(), none, [""] * len(embedding), none.long(), none.bool())


def similarity(queries: Encoded | Tensor | NDArray[Any], targets: Encoded | Tensor | NDArray[Any]) -> Tensor:
    """Computes the cosines [B, M] float32 of embeddings [B, D] and [M, D], which need not be normalised.

    Raises:
        ValueError: the widths of the embeddings differ.
    """
    left, right = (_rows(each) for each in (queries, targets))
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"similarity: the embeddings have {left.shape[1]} and {right.shape[1]} dimensions; embed both with the "
            "same model and the same dim"
        )
    return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T


def _rows(embeddings: Encoded | Tensor | NDArray[Any]) -> Tensor:
    values = embeddings.embedding if isinstance(embeddings, Encoded) else torch.as_tensor(embeddings)
    return torch.atleast_2d(values).float().cpu()
