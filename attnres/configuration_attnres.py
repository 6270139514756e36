# trf-ignore: TRF028: the licence is stated once, in LICENSE and pyproject.toml.
"""Configuration of a Block Attention Residuals (Block AttnRes) Qwen3 model."""

from __future__ import annotations

import json
import math
from os import PathLike
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config
from transformers.activations import ACT2FN

from attnres import formats

SOURCES = ("cumulative", "block_sum", "delta_block")
MODES = ("block", "full")
ROUTINGS = ("learned", "frozen")
GATE_TYPES = ("bias",)
SIZES = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attnres_num_blocks",
)
LEGACY = ("attnres_init_bias", "attnres_gate_init")  # early published configurations hold these unused initial values
FIELDS = frozenset(Qwen3Config.__annotations__) - {"model_type"}  # the inherited ones


# trf-ignore: TRF057: `auto_docstring` would overwrite our docstring.
@strict
class AttnResConfig(Qwen3Config):
    r"""
    A [`~transformers.Qwen3Config`] with the fields of Attention Residuals (arXiv:2603.15031).

    Args:
        attnres_num_blocks (`int`, *optional*, defaults to 8):
            `N`. A block is `ceil(num_hidden_layers / N)` layers; the last one may be shorter. There can be fewer than
            `N` blocks (28 layers, N = 8: 7 blocks of 4). `full` mode does not use it.
        attnres_recency_bias_init (`float`, *optional*, defaults to 0.0):
            Initial recency bias `b`, the logit added to the `current` source at every read. 0 with `"delta_block"`,
            where `current` is no source.
        attnres_mode (`str`, *optional*, defaults to `"block"`):
            `"block"`, or `"full"`: every sublayer closes a block of its own.
        attnres_source (`str`, *optional*, defaults to `"cumulative"`):
            What a completed block is: `"cumulative"`, a snapshot of the running stream (the published
            open-attention-residuals checkpoints); `"block_sum"`, the sum of the block's sublayer outputs
            (arXiv:2603.15031); or `"delta_block"`, the stream at the block's end less the source before, where what is
            routed is *added* to the stream (Delta Attention Residuals; in `full` mode its mode `delta`).
        attnres_routing (`str`, *optional*, defaults to `"learned"`):
            `"learned"`, or `"frozen"`: the routing parameters take no gradient.
        attnres_gate_type (`str`, *optional*, defaults to `"bias"`):
            The one supported gate is `"bias"`.

    Raises:
        ValueError: an `attnres_` key or value is not one of the above, there are more blocks than layers, a size is
            not a positive integer, heads do not divide, or a number is out of range. An inherited field of a wrong
            type raises transformers' own `StrictDataclassError`.
    """

    model_type = "qwen3_attnres"

    attnres_num_blocks: int = 8
    attnres_recency_bias_init: float | int = 0.0
    attnres_mode: str = "block"
    attnres_source: str = "cumulative"
    attnres_routing: str = "learned"
    attnres_gate_type: str = "bias"

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_format = formats.ATTNRES  # of the file that it was read from; it is not written
        for key in LEGACY:
            kwargs.pop(key, None)
        known = [key for key in AttnResConfig.__annotations__ if key.startswith("attnres_")]
        for key in kwargs:  # transformers keeps unknown keys; a misspelt one of ours would silently do nothing
            if key.startswith("attnres_"):
                raise ValueError(f"{key} is not a field of AttnResConfig; choose from {', '.join(known)}")
        self.check()
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but another model's configuration is an error, not a warning."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a '{model_type}' model, not '{cls.model_type}'; "
                "attnres.wrap_qwen3 makes an AttnRes model from a vanilla Qwen3"
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, of any format of `attnres.formats`.

        `kwargs` are in our own meaning, and checked too: transformers sets them after the checks.
        """
        known = FIELDS | cls.__annotations__.keys()
        fields = {key: kwargs.pop(key) for key in list(kwargs) if key in known or key.startswith("attnres_")}
        held, read_format = formats.read_fields(config_dict)
        made = super().from_dict({**held, **fields}, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config._read_format = read_format
        theirs = config_dict.get("attnres_mode", "block")
        for key in ("attnres_source", "attnres_mode"):
            if read_format == formats.DELTA and getattr(config, key) != held[key]:
                raise ValueError(
                    f"{key} '{getattr(config, key)}' is not what a checkpoint of Delta Attention Residuals with "
                    f"attnres_mode '{theirs}' was trained with, which is '{held[key]}'"
                )
        if read_format == formats.DELTA and config.attnres_recency_bias_init:
            raise ValueError(
                "attnres_recency_bias_init must be 0 for a checkpoint of Delta Attention Residuals, which has no "
                f"biases, got {config.attnres_recency_bias_init!r}"
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """As in transformers."""
        return {key: value for key, value in super().to_dict().items() if key != "_read_format"}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As in transformers, in the format that is being written (`attnres.formats.written_fields`)."""
        fields = formats.written_fields(json.loads(super().to_json_string(use_diff)))
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, after a `check`."""
        self.check()
        return super().save_pretrained(*args, **kwargs)

    def check(self) -> None:
        """Raise a ValueError if the fields describe no model. They may have changed since construction."""
        self._check_sizes()
        self._check_ranges()
        self._check_attnres()

    def _check_sizes(self) -> None:
        for key in SIZES:
            value = getattr(self, key)
            if value is None and key == "num_key_value_heads":  # None: as many as query heads
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key} must be a positive integer, got {value!r}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )

    def _check_ranges(self) -> None:
        for key, holds, right in (
            ("rms_norm_eps", self.rms_norm_eps > 0, "positive"),
            ("initializer_range", 0 <= self.initializer_range < math.inf, "zero or more"),
            ("attention_dropout", 0 <= self.attention_dropout < 1, "in [0, 1)"),
            ("sliding_window", self.sliding_window is None or self.sliding_window > 0, "positive or None"),
            ("hidden_act", self.hidden_act in ACT2FN, f"one of {', '.join(ACT2FN)}"),
        ):
            if not holds:
                raise ValueError(f"{key} must be {right}, got {getattr(self, key)!r}")

    def _check_attnres(self) -> None:
        for key, supported in (
            ("attnres_mode", MODES),
            ("attnres_source", SOURCES),
            ("attnres_routing", ROUTINGS),
            ("attnres_gate_type", GATE_TYPES),
        ):
            if getattr(self, key) not in supported:
                hint = formats.hint_at_mode(getattr(self, key)) if key == "attnres_mode" else ""
                raise ValueError(
                    f"{key} '{getattr(self, key)}' is not supported; choose from {', '.join(supported)}{hint}"
                )
        if self.attnres_mode == "block" and self.attnres_num_blocks > self.num_hidden_layers:
            raise ValueError(
                f"attnres_num_blocks ({self.attnres_num_blocks}) exceeds num_hidden_layers "
                f"({self.num_hidden_layers}); a block holds at least one layer"
            )
        bias = self.attnres_recency_bias_init
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not math.isfinite(bias):
            raise ValueError(f"attnres_recency_bias_init must be a finite number, got {bias!r}")
        if bias and self.is_additive:
            raise ValueError(
                f"attnres_recency_bias_init must be 0 with attnres_source '{self.attnres_source}', got {bias!r}: what "
                "is routed is added to the current stream, which is no source that a bias could favour"
            )

    @property
    def is_additive(self) -> bool:
        """Whether what is routed is added to the running stream, instead of taking its place."""
        return self.attnres_source == "delta_block"

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
