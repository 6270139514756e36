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
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attnres_num_blocks",
)


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
        ValueError: an `attnres_` key or value that is not one of the above, more blocks than layers, a size that is
            not a positive integer, or heads that do not divide. Wrong types of inherited fields raise
            transformers' own `StrictDataclassError`.
    """

    model_type = "qwen3_attnres"

    attnres_num_blocks: int = 8
    attnres_recency_bias_init: float | int = 0.0
    attnres_mode: str = "block"
    attnres_source: str = "cumulative"
    attnres_routing: str = "learned"
    attnres_gate_type: str = "bias"

    def __post_init__(self, **kwargs: Any) -> None:
        known = [key for key in AttnResConfig.__annotations__ if key.startswith("attnres_")]
        for key in kwargs:  # transformers keeps unknown keys; a misspelt one of ours would silently do nothing
            if key.startswith("attnres_"):
                raise ValueError(f"{key} is not a field of AttnResConfig; choose from {', '.join(known)}")
        self._check_sizes()
        self._check_attnres()
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for key in SIZES:
            value = getattr(self, key)
            if value is None and key == "num_key_value_heads":  # then there are as many as query heads
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} must be a positive integer, got {value!r}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )

    def _check_attnres(self) -> None:
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
        bias = self.attnres_recency_bias_init
        if not isinstance(bias, (int, float)) or not math.isfinite(bias):
            raise ValueError(f"attnres_recency_bias_init must be a finite number, got {bias!r}")

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
