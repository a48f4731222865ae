"""What the loss takes: `LossOptions`, which stay the same for a whole run, and `InfoNCEBatch`, the tensors of one call.

    N queries   M candidates   D width

Options are checked when they are built. A batch is checked once, by the function that computes its loss. These checks
read shapes, dtypes, devices and plain numbers only. Checks that need tensor values are in `mmemb.kernels.prepare`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from mmemb.kernels.checks import check_choices, check_plain, is_integer, is_number

Engine: TypeAlias = Literal["triton", "tiled"]

ENGINES: tuple[str, ...] = get_args(Engine)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """Which negatives count, how they are weighted, and how the loss is computed.

    Attributes:
        margin: negatives whose dot product exceeds the positive's by more than this are left out as false negatives
            (Qwen3-Embedding, arXiv 2506.05176, uses 0.1). Copies of the positive are kept, at margin 0 too. The other
            direction of the symmetric loss measures from the dot product of the candidate's own pair. None keeps every
            negative.
        query_negatives: the other queries are negatives of each query too (GTE, arXiv 2308.03281; Qwen3-Embedding).
            They belong to the pair, so they are in the denominators of both directions.
        candidate_negatives: the other candidates are negatives of each query's positive too (the same papers).
        hardness: at least 0. exp(hardness * dot product) multiplies a negative's exponential. The gradient treats it as
            a constant (LLaVE, arXiv 2503.04812).
        dims: ascending widths of at least 1. The loss is the sum of the losses on the first ``dim`` columns, each row
            normalised (Matryoshka representations, arXiv 2205.13147). The embeddings need not be normalised then. None
            takes the full width alone, as it is.
        symmetric: mean of this direction and of ranking all queries for each positive. Positives must be distinct.
        engine: ``tiled`` or ``triton``; None chooses by device, see `mmemb.kernels.engines`.
        workspace_bytes: maximum size of the engine's N x M buffers, in bytes; None leaves it to the engine.

    Raises:
        ValueError: a value is not allowed. The message names the value and what is allowed.
    """

    margin: float | None = None
    query_negatives: bool = False
    candidate_negatives: bool = False
    hardness: float = 0.0
    dims: Sequence[int] | None = None
    symmetric: bool = False
    engine: Engine | None = None
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        check_choices(
            query_negatives=self.query_negatives,
            candidate_negatives=self.candidate_negatives,
            symmetric=self.symmetric,
        )
        if self.margin is not None and not (is_number(self.margin) and math.isfinite(self.margin)):
            raise ValueError(f"margin is {self.margin}; allowed are finite numbers, and None to keep every negative")
        if not (is_number(self.hardness) and 0 <= self.hardness < math.inf):
            raise ValueError(f"hardness is {self.hardness}; allowed are finite numbers of at least 0")
        if self.dims is not None and not _are_widths(self.dims):
            raise ValueError(f"dims is {self.dims!r}; allowed are ascending integers from 1 to the embeddings' width")
        if self.workspace_bytes is not None and not (is_integer(self.workspace_bytes) and self.workspace_bytes >= 1):
            raise ValueError(f"workspace_bytes is {self.workspace_bytes}; allowed are integers of at least 1, and None")
        if self.engine not in (None, *ENGINES):
            raise ValueError(
                f"engine is {self.engine!r}; allowed are {', '.join(map(repr, ENGINES))} and None, by device"
            )
        # Plain numbers and a tuple: a numpy number is not an operator's argument, and a list could change later.
        object.__setattr__(self, "margin", None if self.margin is None else float(self.margin))
        object.__setattr__(self, "hardness", float(self.hardness))
        object.__setattr__(self, "dims", None if self.dims is None else tuple(self.dims))


@dataclass(frozen=True, slots=True, eq=False)
class InfoNCEBatch:
    """The tensors of one call of the loss. Building it checks nothing; `check` does, once a call.

    Attributes:
        query: [N, D] float32, bfloat16, float16 or float64.
        candidate: [M, D] of the same dtype and device. Rows that are no query's positive are hard negatives of all
            queries.
        temperature: positive number or one-element tensor; logits are divided by it.
        positive: [N] int64, row of ``candidate`` with each query's positive; default the diagonal (then M >= N).
        query_id: [N] int64 identities of the positives. Negatives with the id of a query are left out of its
            denominator. Needs ``candidate_id``.
        candidate_id: [M] int64.
        weight: [N], at least 0 with a positive sum. It is a constant and gets no gradient.
    """

    query: Tensor
    candidate: Tensor
    temperature: Tensor | float
    positive: Tensor | None = None
    query_id: Tensor | None = None
    candidate_id: Tensor | None = None
    weight: Tensor | None = None

    def temperature_tensor(self) -> Tensor:
        """The temperature as a tensor: as it was given, or 0-d float64 on the CPU, since not every device has float64.

        Raises:
            ValueError: it is neither a number nor a tensor.
        """
        if isinstance(self.temperature, Tensor):
            return self.temperature
        if not is_number(self.temperature):
            kind = type(self.temperature).__name__
            raise ValueError(f"temperature is a {kind}; allowed is a number or a tensor of one")
        return torch.tensor(float(self.temperature), dtype=torch.float64, device="cpu")

    def check(self, options: LossOptions, *, may_be_empty: Collection[str] = ()) -> None:
        """Checks all that shapes, dtypes and devices show.

        Args:
            options: what the loss is computed with.
            may_be_empty: which of ``query`` and ``candidate`` may have no rows.

        Raises:
            ValueError: a tensor is not what the class allows. The message names what was given and what is allowed.
        """
        self._check_embeddings(may_be_empty)
        self._check_temperature()
        self._check_rows()
        if options.dims is not None and options.dims[-1] > (width := self.query.shape[1]):
            dims = list(options.dims)
            raise ValueError(f"dims is {dims}; allowed are ascending integers from 1 to the width {width}")

    def _check_embeddings(self, may_be_empty: Collection[str]) -> None:
        query, candidate = self.query, self.candidate
        for name, tensor in {"query": query, "candidate": candidate}.items():
            check_plain(name, tensor)
            if tensor.ndim != 2 or tensor.shape[1] == 0 or (len(tensor) == 0 and name not in may_be_empty):
                shape = tuple(tensor.shape)
                raise ValueError(f"{name} has shape {shape}; allowed is [rows, width] with at least one of each")
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name} is {tensor.dtype}; allowed are {', '.join(map(str, DTYPES))}")
        n, m = len(query), len(candidate)
        if query.shape[1] != candidate.shape[1]:
            raise ValueError(
                f"query is {query.shape[1]} wide and candidate {candidate.shape[1]}; the widths must be equal"
            )
        if query.dtype != candidate.dtype:
            raise ValueError(f"query is {query.dtype} and candidate {candidate.dtype}; the dtypes must be equal")
        if self.positive is None and m < n:
            raise ValueError(
                f"{m} candidates for {n} queries; without positive= every query needs the candidate of its own row"
            )

    def _check_temperature(self) -> None:
        temperature = self.temperature_tensor()
        check_plain("temperature", temperature)
        if temperature.numel() != 1 or temperature.is_complex():
            raise ValueError(
                f"temperature is {temperature.dtype} of shape {tuple(temperature.shape)}; allowed is one real number"
            )
        if temperature.is_meta and not self.query.is_meta:
            raise ValueError(
                f"temperature is on {temperature.device}, where it has no value; query is on {self.query.device}"
            )

    def _check_rows(self) -> None:
        """Checks the tensors with one value per row, and that all tensors are on one device."""
        if (self.query_id is None) != (self.candidate_id is None):
            given, missing = ("query_id", "candidate_id") if self.candidate_id is None else ("candidate_id", "query_id")
            raise ValueError(f"{given} is given without {missing}; give both or neither")
        n, m = len(self.query), len(self.candidate)
        integers = {
            "positive": (self.positive, n),
            "query_id": (self.query_id, n),
            "candidate_id": (self.candidate_id, m),
        }
        for name, (tensor, size) in integers.items():
            if tensor is None:
                continue
            check_plain(name, tensor)
            if tensor.shape != (size,) or tensor.dtype != torch.int64:
                raise ValueError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"allowed is torch.int64 of shape ({size},)"
                )
        if self.weight is not None:
            check_plain("weight", self.weight)
            if self.weight.shape != (n,) or not self.weight.is_floating_point():
                raise ValueError(
                    f"weight is {self.weight.dtype} of shape {tuple(self.weight.shape)}; "
                    f"allowed is floating point of shape ({n},)"
                )
        rest = {"candidate": self.candidate, "weight": self.weight} | {
            name: each for name, (each, _) in integers.items()
        }
        for name, other in rest.items():
            if other is not None and other.device != self.query.device:
                raise ValueError(
                    f"{name} is on {other.device} and query on {self.query.device}; all must be on one device"
                )


def _are_widths(dims: object) -> bool:
    """Whether this is a sequence of ascending integers of at least 1."""
    if not (isinstance(dims, Sequence) and len(dims) > 0 and all(is_integer(dim) for dim in dims)):
        return False
    return dims[0] >= 1 and all(a < b for a, b in zip(dims, dims[1:], strict=False))
