"""InfoNCE with a temperature of its own, over `mmemb.kernels.infonce` and across ranks.

N queries   M candidates   D width, all of this rank
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmemb.kernels import InfoNCEResult, infonce
from mmemb.losses.distributed import distributed_infonce_with_grads


class InfoNCE(nn.Module):
    """Contrastive loss with a learnable or fixed temperature, stored as its logarithm.

    Args:
        temperature: initial value.
        learnable: train the temperature; otherwise it is a buffer.
        minimum: lower clamp; at least 1e-3.
        maximum: upper clamp.
        symmetric: also rank the queries for every positive; the loss is the mean of both directions.

    Raises:
        ValueError: not 1e-3 <= minimum <= temperature <= maximum.
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
    ) -> None:
        super().__init__()
        if not 1e-3 <= minimum <= temperature <= maximum < math.inf:
            raise ValueError(
                f"temperature {temperature} with minimum {minimum} and maximum {maximum}; "
                "allowed is 0.001 <= minimum <= temperature <= maximum"
            )
        self.minimum, self.maximum, self.symmetric = minimum, maximum, symmetric
        value = torch.tensor(math.log(temperature))
        if learnable:
            self.log_temperature = nn.Parameter(value)
        else:
            self.register_buffer("log_temperature", value)

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
            symmetric=self.symmetric,
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

        The gradients are made for averaging over ranks, as DDP does. The temperature's must reach the parameter too:
        pass `temperature_term` of the result as the cached loss's ``term``.
        """
        return distributed_infonce_with_grads(
            query,
            candidate,
            temperature=self.temperature.detach(),
            positive=positive,
            query_id=query_id,
            candidate_id=candidate_id,
            weight=weight,
            symmetric=self.symmetric,
        )

    def temperature_term(self, result: InfoNCEResult) -> Tensor | None:
        """A scalar that carries the temperature's gradient to the parameter; None if the temperature is fixed."""
        if not isinstance(self.log_temperature, nn.Parameter):
            return None
        return self.temperature * result.temperature_grad.to(self.log_temperature)
