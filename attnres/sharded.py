"""Models whose parameters are divided over devices (FSDP2), put together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attnres.modeling_attnres import AttnResForCausalLM


def whole(value: Tensor) -> Tensor:
    """The tensor that `value` is this device's part of, or `value` where it is not divided. All devices must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of all devices together. All must ask."""
    return {name: whole(value.detach()) for name, value in model.state_dict().items()}


def is_divided(model: nn.Module) -> bool:
    """Whether any of its parameters are divided over devices."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_model(model: AttnResForCausalLM) -> AttnResForCausalLM:
    """`model` itself, or a copy in one piece of one that is divided, on the same device. All devices must ask.

    Every device has the memory of the whole model to find. The copy draws random numbers for values it then overwrites.
    """
    if not is_divided(model):
        return model
    state = whole_state(model)
    with torch.device(model.device):
        copy: Any = AttnResForCausalLM._from_config(model.config, dtype=model.dtype)
    copy.load_state_dict(state)
    return copy.train(model.training)


__all__ = ["is_divided", "whole", "whole_model", "whole_state"]
