"""InfoNCE as a module with its own temperature, on one rank and across ranks.

N queries   M candidates   D width, all of this rank
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from mmemb.kernels import InfoNCEBatch, InfoNCEResult, LossOptions, infonce, infonce_with_grads
from mmemb.kernels.checks import check_choices, is_integer
from mmemb.kernels.options import Engine
from mmemb.kernels.problem import work_dtype
from mmemb.losses.collectives import world_size
from mmemb.losses.distributed import distributed_infonce_with_grads
from mmemb.registry import Component


class InfoNCE(nn.Module, Component, kind="loss", name="infonce"):
    """Contrastive loss with a learnable or fixed temperature, stored as its logarithm; float32 in a 16-bit model too.

    Args:
        temperature: initial value.
        learnable: train the temperature; otherwise it is a buffer.
        minimum: lower clamp; at least 1e-3.
        maximum: upper clamp.
        symmetric: also rank the queries for every positive; the loss is the mean of both directions.
        margin: leave out negatives whose similarity exceeds the positive's by more than this, as false negatives; null
            keeps all (Qwen3-Embedding, arXiv 2506.05176, uses 0.1).
        query_negatives: the other queries are negatives too (GTE, arXiv 2308.03281).
        candidate_negatives: the other candidates are negatives of each query's positive too (GTE).
        hardness: weight each negative by exp(hardness * similarity); 0 weights all equally (LLaVE, arXiv 2503.04812).
        dims: ascending widths; the loss is the sum over these prefixes of the embeddings, each normalised (Matryoshka
            representations, arXiv 2205.13147). Null: the full width alone.
        gather_dtype: send embeddings between ranks in bfloat16; null sends them as they are.
        workspace_mib: maximum memory of the similarity blocks, in MiB; null leaves it to the engine.
        engine: ``tiled`` (any device) or ``triton``; null chooses by device.

    Attributes:
        options: the checked options, which every call shares.

    Raises:
        ValueError: not 1e-3 <= minimum <= temperature <= maximum; or an option is not allowed, whatever the embeddings
            are.
    """

    log_temperature: Tensor

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        learnable: bool = True,
        minimum: float = 0.01,
        maximum: float = 1.0,
        symmetric: bool = False,
        margin: float | None = None,
        query_negatives: bool = False,
        candidate_negatives: bool = False,
        hardness: float = 0.0,
        dims: list[int] | None = None,
        gather_dtype: Literal["bfloat16"] | None = None,
        workspace_mib: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__()
        if not 1e-3 <= minimum <= temperature <= maximum < math.inf:
            raise ValueError(
                f"temperature {temperature} with minimum {minimum} and maximum {maximum}; "
                "allowed is 0.001 <= minimum <= temperature <= maximum"
            )
        if gather_dtype not in (None, "bfloat16"):
            raise ValueError(f"gather_dtype is {gather_dtype!r}; allowed are 'bfloat16' and null")
        if workspace_mib is not None and not (is_integer(workspace_mib) and workspace_mib >= 1):
            raise ValueError(f"workspace_mib is {workspace_mib}; allowed are integers of at least 1, and null")
        check_choices(learnable=learnable)
        self.minimum, self.maximum = minimum, maximum
        self.gather_dtype = None if gather_dtype is None else torch.bfloat16
        self.options = LossOptions(
            margin=margin,
            query_negatives=query_negatives,
            candidate_negatives=candidate_negatives,
            hardness=hardness,
            dims=dims,
            symmetric=symmetric,
            engine=engine,
            workspace_bytes=None if workspace_mib is None else workspace_mib * 2**20,
        )
        value = torch.tensor(math.log(temperature), dtype=torch.float32)
        if learnable:
            self.log_temperature = nn.Parameter(value)
        else:
            self.register_buffer("log_temperature", value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InfoNCE:
        """Converts as any module does, but keeps at least float32: in 16 bits an optimiser's steps would round to 0."""

        def moved(value: Tensor) -> Tensor:
            found = fn(value)
            return found if found.dtype.itemsize >= 4 else value.to(found.device, torch.float32)

        return super()._apply(moved, recurse)

    @property
    def temperature(self) -> Tensor:
        """The temperature, 0-d, with a graph to the parameter."""
        # Clamps the parameter itself: a clamp in the graph has no gradient outside the range, so the parameter could
        # not come back.
        with torch.no_grad():
            self.log_temperature.clamp_(math.log(self.minimum), math.log(self.maximum))
        return self.log_temperature.exp()

    def forward(
        self,
        query: Tensor,
        candidate: Tensor,
        *,
        positive: Tensor | None = None,
        query_id: Tensor | None = None,
        candidate_id: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Returns the mean loss of this rank's rows alone, differentiable. Arguments are as in `InfoNCEBatch`."""
        return infonce(
            query,
            candidate,
            temperature=self.temperature,
            positive=positive,
            query_id=query_id,
            candidate_id=candidate_id,
            weight=weight,
            options=self.options,
        )

    def with_grads(
        self,
        query: Tensor,
        candidate: Tensor,
        *,
        positive: Tensor | None = None,
        query_id: Tensor | None = None,
        candidate_id: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> InfoNCEResult:
        """Returns the mean loss over every rank's rows and its gradients, for `mmemb.losses.gradcache.cached_step`.

        The gradients are made for averaging over ranks, as DDP does. They are float32 (float64) whatever the embeddings
        are, since a gradient scaler still multiplies them. The temperature's gradient must reach the parameter too:
        pass `temperature_term` of the result as the cached loss's ``term``. Arguments are as in `InfoNCEBatch`.
        """
        temperature, grad_dtype = self.temperature.detach(), self.grad_dtype(query)
        batch = InfoNCEBatch(query, candidate, temperature, positive, query_id, candidate_id, weight)
        if world_size() == 1:
            return infonce_with_grads(batch, self.options, grad_dtype=grad_dtype)
        return distributed_infonce_with_grads(
            batch, self.options, gather_dtype=self.gather_dtype, grad_dtype=grad_dtype
        )

    @staticmethod
    def grad_dtype(embeddings: Tensor) -> torch.dtype:
        """Returns the dtype of the gradients that `with_grads` makes for such embeddings."""
        return work_dtype(embeddings.dtype)

    def temperature_term(self, result: InfoNCEResult) -> Tensor | None:
        """Returns a scalar that carries the temperature's gradient to the parameter; None for a fixed temperature."""
        if not isinstance(self.log_temperature, nn.Parameter):
            return None
        return self.temperature * result.temperature_grad.to(self.log_temperature)
