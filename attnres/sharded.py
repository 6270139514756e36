"""Whole copies of models whose parameters are divided over devices (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attnres.modeling_attnres import AttnResForCausalLM


def whole(value: Tensor) -> Tensor:
    """The whole tensor of which `value` holds this device's part. All devices must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict. All devices must call this."""
    return {name: whole(value.detach()) for name, value in model.state_dict().items()}


def is_divided(model: nn.Module) -> bool:
    """Whether any parameter is divided over devices."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_model(model: AttnResForCausalLM) -> AttnResForCausalLM:
    """A whole copy of a divided model, on the same device, or else `model` itself. All devices must call this.

    Every device needs memory for the whole model. Making the copy draws random numbers.
    """
    if not is_divided(model):
        return model
    state = whole_state(model)
    with torch.device(model.device):
        copy: Any = AttnResForCausalLM._from_config(model.config, dtype=model.dtype)
    copy.load_state_dict(state)
    return copy.train(model.training)


__all__ = ["is_divided", "whole", "whole_model", "whole_state"]
