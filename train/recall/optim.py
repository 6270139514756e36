"""Parameter groups of the optimiser: with and without weight decay, and the three kinds of routing parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnres.sharded import whole

KINDS = {"queries": "_res_proj", "gains": "_res_norm", "biases": "_res_bias"}
"""What the names of each kind of routing parameters contain."""


@dataclass(frozen=True)
class RoutingLearningRates:
    """Peak learning rates of routing parameters; null for model.learning_rate.

    Args:
        queries: of pseudo-queries.
        gains: of key gains.
        biases: of recency biases.

    Raises:
        ValueError: a rate is negative. (Zero keeps a kind at its initial values.)
    """

    queries: float | None = None
    gains: float | None = None
    biases: float | None = None

    def __post_init__(self) -> None:
        for kind, rate in asdict(self).items():
            if rate is not None and not rate >= 0:
                raise ValueError(f"routing_learning_rates.{kind} must not be negative, got {rate}")


def kind_of(name: str) -> str | None:
    """The kind of the routing parameter `name`; `None` for other parameters."""
    return next((kind for kind, part in KINDS.items() if part in name), None)


def parameter_groups(model: nn.Module, weight_decay: float, rates: RoutingLearningRates) -> list[dict[str, Any]]:
    """Groups for an optimiser: decayed, not decayed (gains, biases, routing), scalars, and kinds with their own rate.

    Scalars (recency biases) have their own group: FSDP2 does not divide them, and a group must not mix the two.
    """
    own = {kind: rate for kind, rate in asdict(rates).items() if rate is not None}
    members: dict[str, list[nn.Parameter]] = {"decayed": [], "kept": [], "scalars": [], **{kind: [] for kind in own}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = kind_of(name)
            plain = "scalars" if parameter.ndim == 0 else "kept" if parameter.ndim < 2 or kind else "decayed"
            members[kind if kind in own else plain].append(parameter)
    groups = [{"params": members["decayed"], "weight_decay": weight_decay}]
    groups += [{"params": members[name], "weight_decay": 0.0} for name in ("kept", "scalars")]
    groups += [{"params": members[kind], "weight_decay": 0.0, "lr": rate} for kind, rate in own.items()]
    return [group for group in groups if group["params"]]


def routing_gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The Euclidean norm of the gradient of each kind of routing parameters that has one."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        kind = kind_of(name)
        if kind and parameter.grad is not None:
            gradients.setdefault(kind, []).append(whole(parameter.grad).flatten())
    return {kind: torch.linalg.vector_norm(torch.cat(parts)) for kind, parts in gradients.items()}
