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
    """As in transformers, and:

    `routing_weights`: one (batch, seq, num_sources) float32 tensor per read. `depth_states`: one before each read that
    was run, and one after the last. `hidden_states`: the running stream (in block_sum: of the layer's block) before the
    first layer and after each layer, and in the last place `last_hidden_state`, as everywhere in transformers.
    """

    routing_weights: tuple[Tensor, ...] | None = None
    depth_states: tuple[DepthState, ...] | None = None


@dataclass
class AttnResCausalLMOutputWithPast(CausalLMOutputWithPast):
    """As in transformers, with `routing_weights` and `depth_states` of `AttnResModelOutputWithPast`."""

    routing_weights: tuple[Tensor, ...] | None = None
    depth_states: tuple[DepthState, ...] | None = None


class LayerOutput(NamedTuple):
    """What a layer returns, and a forward hook on it sees: of the sublayers that were run.

    Attributes:
        states: the state after each of them.
        routing_weights: (B, T, n) of the read before each of them.
        attentions: (B, heads, T, T), with eager attention; else None.
    """

    states: tuple[DepthState, ...]
    routing_weights: tuple[Tensor, ...]
    attentions: Tensor | None


class Recorder:
    """Keeps what the caller asked for; the rest is free to go as soon as the next layer has run."""

    def __init__(self, **wanted: bool | None) -> None:
        self.kept: dict[str, list | None] = {name: [] if keep else None for name, keep in wanted.items()}

    @classmethod
    def of_call(cls, config: PreTrainedConfig, **wanted: bool | None) -> Recorder:
        """What a call leaves open (`None`), the configuration says, as in transformers.

        Raises:
            ValueError: attention weights are wanted of an implementation that has none, and would silently lack.
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
