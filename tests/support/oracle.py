"""Depth-wise reads and writes as naively as they can be written: lists of sources, stack, softmax, einsum.

Of the model under test only the weights and transformers' own modules (attention, MLP, norms, rotary embedding) are
used. Which sources a read has is spelled out six times, once for each source and mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnres import AttnResForCausalLM

Replace = Mapping[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]
"""Read index -> a function from the routing weights (B, T, n) and values (n, B, T, H) of that read to those to use."""


@dataclass
class _Reader:
    """Reads one after the other; keeps the routing weights of each."""

    model: Any  # AttnResForCausalLM
    replace: Replace
    routing_weights: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def __call__(self, name: str, completed: list[Tensor], current: Tensor | None) -> Tensor:
        owner_name, _, prefix = name.rpartition(".")  # "layers.3.attn" -> module "layers.3", parameters "attn_res_…"
        owner = self.model.model.get_submodule(owner_name)
        w = getattr(owner, f"{prefix}_res_proj").weight[0]
        g = getattr(owner, f"{prefix}_res_norm").weight
        v = torch.stack(completed if current is None else [*completed, current])  # (n, B, T, H)
        precision = torch.promote_types(v.dtype, torch.float32)
        v, w, g = v.to(precision), w.to(precision), g.to(precision)
        rms = (v.square().mean(-1, keepdim=True) + self.model.config.rms_norm_eps).sqrt()
        logits = torch.einsum("h,nbth->nbt", w, g * v / rms)
        if current is not None:
            b = getattr(owner, f"{prefix}_res_bias").to(precision)
            logits = torch.cat([logits[:-1], logits[-1:] + b])
        weights = logits.softmax(0).permute(1, 2, 0)  # (B, T, n)
        self.values.append(v)
        weights, v = self.replace.get(len(self.routing_weights), lambda *same: same)(weights, v)
        self.routing_weights.append(weights)
        return torch.einsum("btn,nbth->bth", weights, v).to(completed[0].dtype)

    def added(self, name: str, stream: Tensor, sources: list[Tensor]) -> Tensor:
        """A read that is added to the stream: the stream itself where it has no sources."""
        if sources:
            return stream + self(name, sources, None)
        self.routing_weights.append(stream[..., :0])
        self.values.append(stream.new_empty(0, *stream.shape))
        return stream


def forward(
    model: AttnResForCausalLM, input_ids: Tensor, replace: Replace | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits (B, T, vocabulary) and the routing weights (B, T, n) of every read, in order."""
    logits, weights, _ = run(model, input_ids, replace)
    return logits, weights


def run(
    model: AttnResForCausalLM, input_ids: Tensor, replace: Replace | None = None
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As `forward`, and the values (n, B, T, H) of every read."""
    config: Any = model.config
    body: Any = model.model
    embedding = body.embed_tokens(input_ids)
    seq = input_ids.shape[1]
    rotary = body.rotary_emb(embedding, torch.arange(seq)[None])
    mask = torch.full((seq, seq), -torch.inf, dtype=embedding.dtype).triu(1)[None, None]
    read = _Reader(model, replace or {})

    def attend(layer, x: Tensor) -> Tensor:
        x = layer.input_layernorm(x)
        return layer.self_attn(hidden_states=x, position_embeddings=rotary, attention_mask=mask)[0]

    def feed(layer, x: Tensor) -> Tensor:
        return layer.mlp(layer.post_attention_layernorm(x))

    size = math.ceil(config.num_hidden_layers / config.attnres_num_blocks)
    blocks = [
        range(first, min(first + size, config.num_hidden_layers)) for first in range(0, config.num_hidden_layers, size)
    ]
    completed = [embedding]
    match config.attnres_source, config.attnres_mode:
        case "cumulative", "block":
            current = embedding
            for block in blocks:
                for i in block:
                    layer = body.layers[i]
                    current = current + attend(layer, read(f"layers.{i}.attn", completed, current))
                    current = current + feed(layer, read(f"layers.{i}.mlp", completed, current))
                completed.append(current)
            output = current
        case "cumulative", "full":
            current = embedding
            for i, layer in enumerate(body.layers):
                current = current + attend(layer, read(f"layers.{i}.attn", completed, current))
                completed.append(current)
                current = current + feed(layer, read(f"layers.{i}.mlp", completed, current))
                completed.append(current)
            output = current
        case "block_sum", "block":
            for block in blocks:
                current = None
                for i in block:
                    layer = body.layers[i]
                    written = attend(layer, read(f"layers.{i}.attn", completed, current))
                    current = written if current is None else current + written
                    current = current + feed(layer, read(f"layers.{i}.mlp", completed, current))
                completed.append(current)
            output = read("final", completed, None)
        case "block_sum", "full":
            for i, layer in enumerate(body.layers):
                completed.append(attend(layer, read(f"layers.{i}.attn", completed, None)))
                completed.append(feed(layer, read(f"layers.{i}.mlp", completed, None)))
            output = read("final", completed, None)
        case "delta_block", "block":
            stream, completed = embedding, []
            for block in blocks:
                for i in block:
                    layer = body.layers[i]
                    hidden = read.added(f"layers.{i}.attn", stream, completed)
                    if i == block[0]:  # after the block's first read, of the stream that this read has found
                        completed = [*completed, stream - completed[-1] if completed else stream]
                    stream = stream + attend(layer, hidden)
                    stream = stream + feed(layer, read.added(f"layers.{i}.mlp", stream, completed))
            output = stream
        case "delta_block", "full":
            stream, completed = embedding, []
            for i, layer in enumerate(body.layers):
                attended = attend(layer, read.added(f"layers.{i}.attn", stream, completed))
                stream, completed = stream + attended, [*(completed or [embedding]), attended]
                fed = feed(layer, read.added(f"layers.{i}.mlp", stream, completed))
                stream, completed = stream + fed, [*completed, fed]
            output = stream
        case other:
            raise NotImplementedError(other)
    return model.lm_head(body.norm(output)), tuple(read.routing_weights), tuple(read.values)
