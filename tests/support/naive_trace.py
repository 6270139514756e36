"""A causal trace as naively as it can be written: hooks, and one full forward for every patch.

Of `probe/`, only the names of sites are used. What the running stream is, is spelled out here once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3

from attnres import AttnResForCausalLM
from attnres.routing import Read


class NaiveTrace:
    """A model on pairs of sequences: `logits(...)` of one run with one site as in the other run."""

    def __init__(self, model: Any, clean_ids: Tensor, corrupted_ids: Tensor) -> None:
        self.model = model
        self.ids = {"clean": clean_ids, "corrupted": corrupted_ids}
        self.num_sublayers = 2 * model.config.num_hidden_layers
        self.kept = {name: self._keep(ids) for name, ids in self.ids.items()}

    # The modules of a sublayer, in a vanilla model and in one with depth routing alike.

    def sublayer(self, index: int) -> Any:
        layer = self.model.model.layers[index // 2]
        return layer.mlp if index % 2 else layer.self_attn

    def norm(self, index: int) -> Any:
        """What takes the hidden states that the read before sublayer `index` makes, and nothing else does."""
        if index == self.num_sublayers:
            return self.model.model.norm
        layer = self.model.model.layers[index // 2]
        return layer.post_attention_layernorm if index % 2 else layer.input_layernorm

    @torch.no_grad()
    def _forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
        return self.model(ids, use_cache=False, **kwargs).logits

    def _keep(self, ids: Tensor) -> dict[str, Any]:
        """Everything of a run that can be patched into another."""
        kept: dict[str, Any] = {"inputs": {}, "outputs": {}, "reads": {}}
        handles = []
        for index in range(self.num_sublayers + 1):
            handles.append(self.norm(index).register_forward_pre_hook(_keep_input(kept["inputs"], index)))
            if index < self.num_sublayers:
                handles.append(self.sublayer(index).register_forward_hook(_keep_output(kept["outputs"], index)))

        def keep_read(read: Read) -> Read:
            kept["reads"][read.site.index] = read
            return read

        routed = {"intervention": keep_read} if isinstance(self.model, AttnResForCausalLM) else {}
        kept["logits"] = self._forward(ids, **routed)
        for handle in handles:
            handle.remove()
        streams = [self.model.model.embed_tokens(ids).detach()]
        for index, output in sorted(kept["outputs"].items()):
            streams.append(output if self._begins_a_sum(index) else streams[-1] + output)
        return kept | {"streams": streams}

    def _begins_a_sum(self, index: int) -> bool:
        config = self.model.config
        if not isinstance(self.model, AttnResForCausalLM) or config.attnres_source != "block_sum":
            return False
        if config.attnres_mode == "full":
            return True
        layers_per_block = -(-config.num_hidden_layers // config.attnres_num_blocks)
        return index % (2 * layers_per_block) == 0

    def logits(
        self, base: str, kind: str, read: int, mask: Tensor, source: int | None = None, twins: tuple[int, ...] = ()
    ) -> Tensor:
        """(B, T, vocabulary) of the run `base` with a site as in the other run at the positions `mask` (B, T)."""
        ours, other = self.kept[base], self.kept["corrupted" if base == "clean" else "clean"]
        where = mask.unsqueeze(-1)

        def mixed(name: str) -> Tensor:
            return torch.where(where, other[name][read], ours[name][read])

        ids, kwargs = self.ids[base], {}
        if kind == "source":

            def intervene(found: Read) -> Read:
                if found.site.index != read:
                    return found
                theirs = other["reads"][read]
                logits, sources = found.logits.clone(), list(found.sources)
                for s in twins or (source,):
                    logits[..., s] = torch.where(mask, theirs.logits[..., s], logits[..., s])
                    sources[s] = torch.where(where, theirs.sources[s], sources[s])
                return Read(found.site, logits.softmax(-1), tuple(sources))

            return self._forward(ids, intervention=intervene)
        if kind == "output":
            patched = _hooked_output(self.sublayer(read), lambda _: mixed("outputs"))
        elif kind == "input":
            patched = _hooked_input(self.norm(read), mixed("inputs"))
        elif read == 0:
            patched = _hooked_output(self.model.model.embed_tokens, lambda _: mixed("streams"))
        else:  # the sublayer before writes what is missing, so that the stream is what it is to be
            missing = mixed("streams") - ours["streams"][read]
            patched = _hooked_output(self.sublayer(read - 1), lambda output: output + missing)
        with patched:
            return self._forward(ids, **kwargs)

    def edge_logits(self, base: str, layer: int, head: int | None, mask: Tensor, position: Tensor) -> Tensor:
        """(B, T, vocabulary) of the run `base` whose `position` (B,) alone sees, in one head of a layer or in all, keys
        and values as in the other run at the positions `mask` (B, T)."""
        other: dict[str, Tensor] = {}

        def keep(keys: Tensor, values: Tensor, attend: Any) -> Any:
            other["keys"], other["values"] = keys, values
            return attend(keys, values)

        def put(keys: Tensor, values: Tensor, attend: Any) -> Any:
            output, weights = attend(keys, values)  # (B, T, heads, size of a head)
            where = mask[:, None, :, None]
            patched = [torch.where(where, other[name], ours) for name, ours in (("keys", keys), ("values", values))]
            changed, output = attend(*patched)[0], output.clone()
            for row, at in enumerate(position.tolist()):
                for each in range(output.shape[2]) if head is None else [head]:
                    output[row, at, each] = changed[row, at, each]
            return output, weights

        with _attention(layer, keep):
            self._forward(self.ids["corrupted" if base == "clean" else "clean"])
        with _attention(layer, put):
            return self._forward(self.ids[base])


def _keep_input(kept: dict, index: int):
    def hook(module, args):
        kept[index] = args[0]

    return hook


def _keep_output(kept: dict, index: int):
    def hook(module, args, output):
        kept[index] = output[0] if isinstance(output, tuple) else output

    return hook


@contextmanager
def _hooked_output(module: Any, change) -> Iterator[None]:
    def hook(module, args, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hooked_input(module: Any, value: Tensor) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda module, args: (value,))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _attention(layer: int, change: Any) -> Iterator[None]:
    """Eager attention of a layer is `change(keys, values, attend)`, where `attend` is it as it was."""
    eager = modeling_qwen3.eager_attention_forward

    def changed(module, query, key, value, *args, **kwargs):
        if module.layer_idx != layer:
            return eager(module, query, key, value, *args, **kwargs)
        return change(key, value, lambda keys, values: eager(module, query, keys, values, *args, **kwargs))

    with patch.object(modeling_qwen3, "eager_attention_forward", changed):
        yield
