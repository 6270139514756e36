"""What layers and models return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from attnres.routing import DepthState


@dataclass
class AttnResModelOutputWithPast(BaseModelOutputWithPast):
    """As in transformers, with these additions.

    `routing_weights`: one (batch, seq, num_sources) float32 tensor per read. `depth_states`: the state before each read
    that happened, and the one after the last layer. `hidden_states`: the running stream (in block_sum: the layer's
    block) before the first layer and after each layer; the last one is `last_hidden_state`, as in transformers.
    """

    routing_weights: tuple[Tensor, ...] | None = None
    depth_states: tuple[DepthState, ...] | None = None


@dataclass
class AttnResCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As in transformers, with `routing_weights` and `depth_states` of `AttnResModelOutputWithPast`."""

    routing_weights: tuple[Tensor, ...] | None = None
    depth_states: tuple[DepthState, ...] | None = None


class LayerOutput(NamedTuple):
    """What a layer returns, and what a forward hook on it sees.

    Attributes:
        states: the state after each sublayer that ran.
        routing_weights: (B, T, n) of the read before each sublayer that ran.
        attentions: (B, heads, T, T) with eager attention, else None.
    """

    states: tuple[DepthState, ...]
    routing_weights: tuple[Tensor, ...]
    attentions: Tensor | None


class Recorder:
    """Keeps the outputs that the caller asked for, and no others, so that their memory is freed early."""

    def __init__(self, **wanted: bool | None) -> None:
        self.kept: dict[str, list | None] = {name: [] if keep else None for name, keep in wanted.items()}

    @classmethod
    def of_call(cls, config: PreTrainedConfig, **wanted: bool | None) -> Recorder:
        """The recorder of a call. The configuration decides where an argument is None, as in transformers.

        Raises:
            ValueError: the attention implementation cannot return the attention weights that are wanted.
        """
        wanted = {
            name: getattr(config, f"output_{name}", None) if keep is None else keep for name, keep in wanted.items()
        }
        if wanted["attentions"] and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation='eager', got '{config._attn_implementation}'; "
                "model.set_attn_implementation('eager') changes it"
            )
        return cls(**wanted)

    def add(self, name: str, *values: Any) -> None:
        kept = self.kept[name]
        if kept is not None:
            kept.extend(value for value in values if value is not None)

    def outputs(self) -> dict[str, tuple | None]:
        return {name: None if kept is None else tuple(kept) for name, kept in self.kept.items()}


__all__ = ["AttnResCausalLMOutputWithPast", "AttnResModelOutputWithPast", "LayerOutput", "Recorder"]
