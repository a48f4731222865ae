"""InfoNCE with a temperature of its own, over `mmemb.kernels.infonce` and across ranks.

N queries   M candidates   D width, all of this rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmemb.kernels import InfoNCEResult, infonce
from mmemb.kernels.checks import check_choices, check_form
from mmemb.kernels.engines import Engine, check_name
from mmemb.kernels.problem import work_dtype
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
        margin: a negative whose similarity exceeds the positive's by more is taken for a false negative and left out;
            null keeps all (Qwen3-Embedding, arXiv 2506.05176, uses 0.1).
        query_negatives: the other queries are negatives too (GTE, arXiv 2308.03281).
        candidate_negatives: the other candidates are negatives of each query's positive too (GTE).
        hardness: weigh each negative by exp(hardness * similarity); 0 weighs all alike (LLaVE, arXiv 2503.04812).
        dims: ascending widths; the loss is the sum over these prefixes of the embeddings, each normalised (Matryoshka
            representations, arXiv 2205.13147). Null: the full width alone.
        gather_dtype: send embeddings between ranks in bfloat16; null sends them as they are.
        workspace_mib: most memory of the similarity blocks, in MiB; null leaves it to the engine.
        engine: ``tiled`` (any device) or ``triton``; null chooses by device.

    Raises:
        ValueError: not 1e-3 <= minimum <= temperature <= maximum; or an option that `mmemb.kernels.infonce` refuses
            whatever the embeddings are.
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
        self.minimum, self.maximum = minimum, maximum
        self.gather_dtype = None if gather_dtype is None else torch.bfloat16
        self.options: dict[str, Any] = {
            "symmetric": symmetric,
            "margin": margin,
            "query_negatives": query_negatives,
            "candidate_negatives": candidate_negatives,
            "hardness": hardness,
            "dims": dims,
            "workspace_bytes": None if workspace_mib is None else workspace_mib * 2**20,
            "engine": engine,
        }
        if gather_dtype not in (None, "bfloat16"):
            raise ValueError(f"gather_dtype is {gather_dtype!r}; allowed are 'bfloat16' and null")
        is_whole = isinstance(workspace_mib, int) and not isinstance(workspace_mib, bool)
        if workspace_mib is not None and not (is_whole and workspace_mib >= 1):
            raise ValueError(f"workspace_mib is {workspace_mib}; allowed are integers of at least 1, and null")
        # What the op would refuse at the first step is refused when settings are read.
        check_name(engine)
        check_choices(
            learnable=learnable,
            symmetric=symmetric,
            query_negatives=query_negatives,
            candidate_negatives=candidate_negatives,
        )
        widths = [dim for dim in dims if isinstance(dim, int)] if isinstance(dims, Sequence) else []
        rows = torch.ones(1, 1).expand(1, max([1, *widths]))
        nothing = (None, None, None, None)
        check_form(rows, rows, torch.ones(()), *nothing, "mean", margin=margin, hardness=hardness, dims=dims)
        value = torch.tensor(math.log(temperature), dtype=torch.float32)
        if learnable:
            self.log_temperature = nn.Parameter(value)
        else:
            self.register_buffer("log_temperature", value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InfoNCE:
        """Moves as any module, but not below float32: in 16 bits an optimiser's steps would round to nothing."""

        def moved(value: Tensor) -> Tensor:
            found = fn(value)
            return found if found.dtype.itemsize >= 4 else value.to(found.device, torch.float32)

        return super()._apply(moved, recurse)

    @property
    def temperature(self) -> Tensor:
        """The temperature, 0-d, with a graph to the parameter."""
        # The parameter itself is clamped: a clamp in the graph would cut its gradient outside the range and leave it
        # there.
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
        """The mean loss of this rank's rows alone, differentiable; arguments as in `mmemb.kernels.infonce`."""
        return infonce(
            query,
            candidate,
            temperature=self.temperature,
            positive=positive,
            query_id=query_id,
            candidate_id=candidate_id,
            weight=weight,
            **self.options,
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
        """The mean loss over every rank's rows and its gradients, for `mmemb.losses.gradcache.cached_step`.

        The gradients are made for averaging over ranks, as DDP does, and are float32 (float64) whatever the embeddings:
        a gradient scaler multiplies them yet. The temperature's must reach the parameter too: pass `temperature_term`
        of the result as the cached loss's ``term``.
        """
        return distributed_infonce_with_grads(
            query,
            candidate,
            temperature=self.temperature.detach(),
            positive=positive,
            query_id=query_id,
            candidate_id=candidate_id,
            weight=weight,
            gather_dtype=self.gather_dtype,
            grad_dtype=self.grad_dtype(query),
            **self.options,
        )

    @staticmethod
    def grad_dtype(embeddings: Tensor) -> torch.dtype:
        """The dtype of `with_grads`' gradients of such embeddings."""
        return work_dtype(embeddings.dtype)

    def temperature_term(self, result: InfoNCEResult) -> Tensor | None:
        """A scalar that carries the temperature's gradient to the parameter; None if the temperature is fixed."""
        if not isinstance(self.log_temperature, nn.Parameter):
            return None
        return self.temperature * result.temperature_grad.to(self.log_temperature)
