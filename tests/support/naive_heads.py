"""Ablation of heads as naively as it can be written: a hook on `o_proj`, and one full forward for each ablation.

Independent of `probe/`, but for the definition of a partner, which is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class NaiveHeads:
    """A model on sequences, padded on the right.

    Args:
        lengths: tokens of each sequence without padding.
        partners: for each sequence, the number of the one whose heads stand in.
    """

    def __init__(self, model: Any, ids: Tensor, lengths: Sequence[int], partners: Sequence[int]) -> None:
        self.model, self.ids, self.lengths, self.partners = model, ids, list(lengths), list(partners)
        self.clean_heads: dict[int, Tensor] = {}
        handles = [self._module(layer).register_forward_pre_hook(self._keep(layer)) for layer in range(self._layers)]
        self.clean = self._forward()
        for handle in handles:
            handle.remove()

    @property
    def _layers(self) -> int:
        return self.model.config.num_hidden_layers

    def _module(self, layer: int) -> Any:
        return self.model.model.layers[layer].self_attn.o_proj

    def _keep(self, layer: int):
        def hook(module, args):
            self.clean_heads[layer] = args[0].clone()

        return hook

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self.model(self.ids, use_cache=False).logits

    def logits(self, kind: str, heads: Sequence[tuple[int, int]]) -> Tensor:
        """(B, T, vocabulary) with these (layer, head) ablated."""
        handles = []
        for layer, head in heads:
            handles.append(self._module(layer).register_forward_pre_hook(self._put(kind, layer, head)))
        try:
            return self._forward()
        finally:
            for handle in handles:
                handle.remove()

    def _put(self, kind: str, layer: int, head: int):
        size = self.model.config.head_dim

        def hook(module, args):
            value = args[0].clone()
            for b, t in torch.ones(self.ids.shape).nonzero().tolist():
                for i in range(head * size, (head + 1) * size):
                    value[b, t, i] = self._stand_in(kind, layer, b, t, i)
            return (value,)

        return hook

    def _stand_in(self, kind: str, layer: int, b: int, t: int, i: int) -> Tensor | float:
        clean = self.clean_heads[layer][:, t, i]
        if kind == "zero":
            return 0.0
        if kind == "resample":
            return clean[self.partners[b]]
        there = [clean[other] for other, length in enumerate(self.lengths) if t < length]
        return sum(there) / max(1, len(there))
