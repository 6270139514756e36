"""The attention of one layer at the position that asks: its weights, and its output with other keys and values.

Legend of shapes: N rows of a run, T keys, D size of a head, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb, repeat_kv

from probe.trace.stack import Run, Stack


@dataclass(frozen=True)
class Asking:
    """What the heads of one layer have at one position of each row.

    Attributes:
        queries: (N, heads, 1, D), rotated.
        keys, values: (N, heads, T, D), those that several heads share repeated.
        seen: (N, T) bool: which keys it may look at.
    """

    attention: Any
    queries: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor

    @classmethod
    def of(cls, stack: Stack, run: Run, layer: int, rows: Tensor, position: Tensor) -> Asking:
        """Of these `rows` (N,) of a run, each at its `position` (N,)."""
        owner, attention = stack.layers[layer], stack.layers[layer].self_attn
        hidden = owner.input_layernorm(run.inputs[2 * layer][rows, position])  # (N, H)
        queries = attention.q_norm(attention.q_proj(hidden).view(len(rows), -1, 1, attention.head_dim))
        cos, sin = stack.model.model.rotary_emb(hidden.unsqueeze(1), position.unsqueeze(1))
        queries, _ = apply_rotary_pos_emb(queries, queries, cos, sin)
        keys, values = (repeat_kv(held[layer][rows], attention.num_key_value_groups) for held in (run.keys, run.values))
        back = position[:, None] - torch.arange(keys.shape[2], device=keys.device)
        seen = back >= 0
        if attention.sliding_window is not None:
            seen &= back < attention.sliding_window
        return cls(attention, queries, keys, values, seen)

    def patched(self, other: Asking, where: Tensor) -> Asking:
        """With keys and values of another run `where` (N, heads, T) says so."""
        where = where.unsqueeze(-1)
        keys, values = torch.where(where, other.keys, self.keys), torch.where(where, other.values, self.values)
        return replace(self, keys=keys, values=values)

    def weights(self) -> Tensor:
        """(N, heads, T) attention weights, in float32 at least."""
        scores = (self.queries @ self.keys.transpose(2, 3)).squeeze(2) * self.attention.scaling
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.masked_fill(~self.seen.unsqueeze(1), -torch.inf).softmax(-1)

    def output(self) -> Tensor:
        """(N, H) what attention writes."""
        weights = self.weights().to(self.values.dtype)
        return self.attention.o_proj((weights.unsqueeze(2) @ self.values).flatten(1))
