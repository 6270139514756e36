"""Configuration of a Block Attention Residuals (Block AttnRes) Qwen3 model."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

SOURCES = ("cumulative", "block_sum")
MODES = ("block", "full")
ROUTINGS = ("learned", "frozen")
GATE_TYPES = ("bias",)


@strict
class AttnResConfig(Qwen3Config):
    r"""
    A [`~transformers.Qwen3Config`] with the fields of Attention Residuals (arXiv:2603.15031).

    Args:
        attnres_num_blocks (`int`, *optional*, defaults to 8):
            `N`; a block is `ceil(num_hidden_layers / N)` layers, the last one may be shorter, so that there can be
            fewer than `N` blocks (28 layers, N = 8: 7 blocks of 4). Not used in `full` mode.
        attnres_recency_bias_init (`float`, *optional*, defaults to 0.0):
            Initial recency bias `b`, the logit added to the `current` source at every read.
        attnres_mode (`str`, *optional*, defaults to `"block"`):
            `"block"`, or `"full"`: every sublayer closes a block of its own.
        attnres_source (`str`, *optional*, defaults to `"cumulative"`):
            What a completed block is: `"cumulative"`, a snapshot of the running stream (the published
            open-attention-residuals checkpoints), or `"block_sum"`, the sum of the block's sublayer outputs
            (arXiv:2603.15031).
        attnres_routing (`str`, *optional*, defaults to `"learned"`):
            `"learned"`, or `"frozen"`: the routing parameters take no gradient.
        attnres_gate_type (`str`, *optional*, defaults to `"bias"`):
            The one supported gate is `"bias"`.

    Raises:
        ValueError: a field that is not one of the above, more blocks than layers, or a size that is not positive.
    """

    model_type = "qwen3_attnres"

    attnres_num_blocks: int = 8
    attnres_recency_bias_init: float | int = 0.0
    attnres_mode: str = "block"
    attnres_source: str = "cumulative"
    attnres_routing: str = "learned"
    attnres_gate_type: str = "bias"

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_attnres()
        super().__post_init__(**kwargs)

    def _check_attnres(self) -> None:
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "attnres_num_blocks"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be a positive integer, got {getattr(self, key)}")
        for key, supported in (
            ("attnres_mode", MODES),
            ("attnres_source", SOURCES),
            ("attnres_routing", ROUTINGS),
            ("attnres_gate_type", GATE_TYPES),
        ):
            if getattr(self, key) not in supported:
                raise ValueError(f"{key} '{getattr(self, key)}' is not supported; choose from {', '.join(supported)}")
        if self.attnres_num_blocks > self.num_hidden_layers:
            raise ValueError(
                f"attnres_num_blocks ({self.attnres_num_blocks}) exceeds num_hidden_layers "
                f"({self.num_hidden_layers}); a block holds at least one layer"
            )
        if not math.isfinite(self.attnres_recency_bias_init):
            raise ValueError(f"attnres_recency_bias_init must be finite, got {self.attnres_recency_bias_init}")

    @property
    def layers_per_block(self) -> int:
        """`ceil(num_hidden_layers / attnres_num_blocks)`."""
        return math.ceil(self.num_hidden_layers / self.attnres_num_blocks)

    def closes_block(self, layer_idx: int, sublayer: str) -> bool:
        """Whether the write of `sublayer` ("self_attn" or "mlp") of layer `layer_idx` completes a block."""
        if self.attnres_mode == "full":
            return True
        is_last_layer = layer_idx == self.num_hidden_layers - 1
        return sublayer == "mlp" and (is_last_layer or (layer_idx + 1) % self.layers_per_block == 0)


__all__ = ["AttnResConfig"]
