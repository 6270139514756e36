"""A model as a stack of reads, sublayers and writes that can be entered anywhere, with or without depth routing.

Legend of shapes: B sequences of a kept run, N rows of a pass, W columns (positions) of it, T sequence, H hidden.
A state is a `DepthState`; a vanilla model's has a running stream alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from attnres import AttnResForCausalLM, routing
from attnres.routing import DepthState, map_state

LOGITS_AT_ONCE = 2**26
"""256 MiB in float32."""


@dataclass
class Run:
    """A run of a batch of sequences with all that a patch may begin from, each (B, T, …).

    Attributes:
        streams: the running stream before each read, and the last one; not yet closed as a block.
        inputs: what each read hands to its sublayer, the final read's included.
        outputs: what each sublayer writes.
        completed: every source that is ever completed, and its logits for the reads after it, (B, T, reads).
        keys, values: of each layer, (B, heads, T, head size).
        logits: (positions, vocabulary) where answers are asked for.
    """

    streams: list[Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    completed: list[Tensor]
    completed_logits: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor

    @classmethod
    def join(cls, first: Run, second: Run) -> Run:
        """The sequences of both."""

        def both(name: str) -> Any:
            a, b = getattr(first, name), getattr(second, name)
            return torch.cat((a, b)) if name == "logits" else [torch.cat(pair) for pair in zip(a, b, strict=True)]

        return cls(**{name: both(name) for name in cls.__dataclass_fields__})


class KeysBefore:
    """Keys and values of the positions before a pass, which its attention sees: taken from a run, layer by layer."""

    def __init__(self, run: Run, rows: Tensor, length: int) -> None:
        self.run, self.rows, self.length = run, rows, length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """As a cache of transformers does, but it keeps nothing."""
        before = (held[layer_idx][:, :, : self.length][self.rows] for held in (self.run.keys, self.run.values))
        return tuple(torch.cat(pair, dim=2) for pair in zip(before, (keys, values), strict=True))  # type: ignore


class Stack:
    """A vanilla Qwen3.

    Attributes:
        spent: positions that sublayers have been run for.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = model.model.layers
        self.num_sublayers = 2 * len(self.layers)
        self.spent = 0

    # What depth routing changes.

    def start(self, embedding: Tensor) -> DepthState:
        """The state before the first read."""
        return DepthState((), (), embedding, 0)

    def read(self, state: DepthState) -> tuple[Tensor, DepthState]:
        """What the next read hands to its sublayer, and the state for the one after it."""
        return state.stream, state._replace(read_index=state.read_index + 1)

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        """The state after the sublayer whose read came last has written."""
        return routing.write(state, output)

    def resume(self, run: Run, read: int, take: Callable[[Tensor], Tensor], stream: Tensor | None = None) -> DepthState:
        """The state before a read, of the rows and positions that `take` takes of a run.

        Args:
            stream: (N, W, H) another running stream than the run's, which becomes whatever source it would.
        """
        return DepthState((), (), take(run.streams[read]) if stream is None else stream, read)

    def adds_to_stream(self, sublayer: int) -> bool:
        """Whether a sublayer's output is added to a stream, not the first of its block."""
        return True

    def read_mixed(self, read: int, ours: Run, sources: frozenset[int], take: Any, take_other: Any) -> Tensor:
        """What a read hands on, (N, W, H), with these `sources` from where `take_other` takes them."""
        raise NotImplementedError("a vanilla model has no sources of depth")

    def masses(self, run: Run, read: int) -> Tensor:
        """(B, T, sources) the routing weights of a read of a run."""
        raise NotImplementedError("a vanilla model has no sources of depth")

    # What it leaves as it is.

    def map(self, state: DepthState, function: Callable[[Tensor], Tensor]) -> DepthState:
        return map_state(state.read_index, state, function)

    def attention_arguments(self, length: int, before: int = 0) -> dict[str, Any]:
        """Rotary phases and masks by layer type of `length` positions that come after others."""
        weight = self.model.model.norm.weight
        like = torch.empty((1, length, 1), dtype=weight.dtype, device=weight.device)
        position_ids = torch.arange(before, before + length, device=weight.device).unsqueeze(0)
        past = DynamicCache() if before else None  # it only says how many positions are past
        if past is not None:
            for layer_idx in range(len(self.layers)):
                past.update(like.new_zeros(1, 1, before, 1), like.new_zeros(1, 1, before, 1), layer_idx)
        arguments = {"config": self.model.config, "inputs_embeds": like, "attention_mask": None}
        arguments |= {"past_key_values": past, "position_ids": position_ids}
        masks = {"full_attention": create_causal_mask(**arguments)}
        if "sliding_attention" in self.model.config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(**arguments)
        return {"masks": masks, "position_embeddings": self.model.model.rotary_emb(like, position_ids)}

    def sublayer(
        self, index: int, hidden: Tensor, attention: dict[str, Any] | None = None, cache: Any = None
    ) -> Tensor:
        """The output of a sublayer on what its read hands to it, (N, W, H)."""
        self.spent += hidden.shape[0] * hidden.shape[1]
        layer = self.layers[index // 2]
        if index % 2:
            return layer.mlp(layer.post_attention_layernorm(hidden))
        assert attention is not None
        return layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=attention["position_embeddings"],
            attention_mask=attention["masks"][self.model.config.layer_types[index // 2]],
            past_key_values=cache,
        )[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(N, vocabulary) logits of what the final norm takes, (N, H)."""
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        parts = self.model.model.norm(hidden).split(at_once)
        return torch.cat([self.model.lm_head(part) for part in parts])

    def run(self, input_ids: Tensor, asked: Any) -> Run:
        """A full run, kept; `asked`, an index of (B, T), is where logits are asked for."""
        cache = DynamicCache()  # without a config: sliding layers keep all keys, too
        attention = self.attention_arguments(input_ids.shape[1])
        states = [self.start(self.model.model.embed_tokens(input_ids))]
        inputs, outputs = [], []
        for index in range(self.num_sublayers):
            hidden, state = self.read(states[-1])
            output = self.sublayer(index, hidden, attention, cache)
            states.append(self.write(state, output))
            inputs.append(hidden)
            outputs.append(output)
        final, _ = self.read(states[-1])
        if self.has_final_read:
            inputs.append(final)
        held: list[Any] = list(cache.layers)
        logits = self.head(final[asked])
        return Run(
            streams=[state.stream for state in states],
            inputs=inputs,
            outputs=outputs,
            completed=list(states[-1].completed),
            completed_logits=[torch.stack(x, -1) if x else final[..., :0] for x in states[-1].completed_logits],
            keys=[layer.keys for layer in held],
            values=[layer.values for layer in held],
            logits=logits,
        )

    @property
    def has_final_read(self) -> bool:
        """Whether there is a read before the final norm."""
        return False


class RoutedStack(Stack):
    """A Qwen3 with Block Attention Residuals."""

    def __init__(self, model: AttnResForCausalLM) -> None:
        super().__init__(model)
        self.sites = model.sites
        self.router = model.model.router()
        # A read of which one of two sources that are the same tensor is patched has two logits, not one.
        apart = tuple(replace(site, current_is_alias=False) for site in self.sites)
        self.router_apart = replace(self.router, sites=apart)

    @property
    def has_final_read(self) -> bool:
        return self.sites[-1].sublayer == "final"

    def start(self, embedding: Tensor) -> DepthState:
        return routing.start(self.router, embedding)

    def read(self, state: DepthState) -> tuple[Tensor, DepthState]:
        if state.read_index == len(self.sites):  # cumulative: the final norm takes the stream
            return state.stream, state
        hidden, _, state = routing.read(self.router, state)
        return hidden, state

    def write(self, state: DepthState, output: Tensor) -> DepthState:
        return self._closed(routing.write(state, output), output)

    def _closed(self, state: DepthState, output: Tensor) -> DepthState:
        """The state with its block closed, if the sublayer before the next read, which wrote `output`, closes one."""
        return routing.close_block(self.router, state, output) if self._opens_block(state.read_index) else state

    def _opens_block(self, read: int) -> bool:
        layer, odd = divmod(read - 1, 2)
        return read == 0 or self.layers[layer].closes_block[odd]

    def adds_to_stream(self, sublayer: int) -> bool:
        return self.sites[sublayer].has_current or self.sites[sublayer].is_additive

    def _sources(self, run: Run, read: int, take: Callable[[Tensor], Tensor], count: int) -> tuple[tuple, tuple]:
        values = tuple(take(value) for value in run.completed[:count])
        return values, tuple(take(logits).unbind(-1) for logits in run.completed_logits[:count])

    def _num_completed(self, read: int) -> int:
        """Completed sources before a read, the embedding included, whether it sees them or not."""
        return sum(map(self._opens_block, range(read + 1)))

    def resume(self, run: Run, read: int, take: Callable[[Tensor], Tensor], stream: Tensor | None = None) -> DepthState:
        count, opens = self._num_completed(read), self._opens_block(read)
        if stream is None:
            current = None if opens and self.router.source == "block_sum" else take(run.streams[read])
            return DepthState(*self._sources(run, read, take, count), current, read)
        # A block that has just been closed is the newest source, too.
        state = DepthState(*self._sources(run, read, take, count - opens), stream, read)
        written = stream - take(run.streams[read - 1]) if read and self.sites[0].is_additive else stream
        return self._closed(state, written)

    def read_mixed(self, read: int, ours: Run, sources: frozenset[int], take: Any, take_other: Any) -> Tensor:
        site = self.sites[read]

        def of(index: int) -> Callable[[Tensor], Tensor]:
            return take_other if index in sources else take

        completed = tuple(of(i)(value) for i, value in enumerate(ours.completed[: site.num_completed]))
        held = enumerate(ours.completed_logits[: site.num_completed])
        logits = tuple(of(i)(value).unbind(-1) for i, value in held)
        has_stream = site.has_current or site.is_additive
        current = of(site.num_completed)(ours.streams[read]) if has_stream else None
        return routing.read(self.router_apart, DepthState(completed, logits, current, read))[0]

    def masses(self, run: Run, read: int) -> Tensor:
        return routing.read(self.router, self.resume(run, read, lambda value: value))[1]

    def map(self, state: DepthState, function: Callable[[Tensor], Tensor]) -> DepthState:
        return map_state(len(self.sites), state, function)


def as_stack(model: Any) -> Stack:
    """The model as a stack. It is expected in eval mode, and is neither changed nor moved."""
    return RoutedStack(model) if isinstance(model, AttnResForCausalLM) else Stack(model)
