"""The depth-wise read: one pure function for each kind of combination, and the one place where an intervention acts.

Legend of shapes: B batch, T sequence, H hidden, n sources of a read, R reads of the model.

At a read with source values `v_n`, pseudo-query `w`, key gain `g` and recency bias `b` (arXiv:2603.15031):

    logit_n         = w . (g * v_n) / rms(v_n)      (+ b for current only)
    routing_weights = softmax over n                in float32
    hidden_states   = sum_n routing_weights_n v_n   (values un-normalised)

With delta_block sources the running stream is no source, and the sum is added to it (Delta Attention Residuals):

    hidden_states   = stream + sum_n routing_weights_n v_n

A completed source never changes, so one matrix product gives its logits for *all* later reads as soon as it is
completed. The gain is folded into the query (`w * g`). Sources are summed one by one, never stacked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnres.sites import ReadSite


class Read(NamedTuple):
    """What an intervention sees and returns: a read between its softmax and its sum."""

    site: ReadSite
    routing_weights: Tensor  # (B, T, n), float32
    sources: tuple[Tensor, ...]  # n times (B, T, H)
    logits: Tensor | None = None  # (B, T, n), before the softmax; what an intervention returns here is not used
    stream: Tensor | None = None  # (B, T, H), what an additive read adds to; what an intervention returns is not used

    @property
    def hidden_states(self) -> Tensor:
        """(B, T, H), what the read hands to its sublayer."""
        if self.stream is None:
            return mix(self.routing_weights, self.sources)
        return add(self.stream, self.routing_weights, self.sources)


Intervention = Callable[[Read], Read]
"""Maps a read to the read that happens instead. The identity changes no bit of the model's output."""


class DepthState(NamedTuple):
    """Everything that flows from one layer to the next. It is immutable, so a recomputation sees the same values."""

    completed: tuple[Tensor, ...]  # each (B, T, H): embedding, then completed blocks
    completed_logits: tuple[tuple[Tensor, ...], ...]  # per completed source, (B, T) for each read after it
    current: Tensor | None  # (B, T, H) running stream; None where block_sum has just closed a block
    read_index: int  # index of the next read

    @property
    def stream(self) -> Tensor:
        """`current`, or the newest completed block where there is no `current`."""
        return self.completed[-1] if self.current is None else self.current


@dataclass(frozen=True)
class Router:
    """The routing parameters of all reads of one forward call.

    Attributes:
        queries: (R, H) pseudo-queries with the key gain folded in, in routing precision.
        biases: recency bias of each read, a scalar tensor, or `None` where it has none.
        eps: epsilon of the key norm.
        source: what a completed block is, one of `attnres.configuration_attnres.SOURCES`.
        full: whether every sublayer closes a block of its own.
        sites: the reads.
    """

    queries: Tensor
    biases: tuple[Tensor | None, ...]
    eps: float
    source: str
    full: bool
    sites: tuple[ReadSite, ...]


def routing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of logits, softmax and sum: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def _full_precision(value: Tensor):
    device_type = value.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def source_logits(value: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Logits of one source `value` (B, T, H) for each of `queries` (r, H): r tensors (B, T)."""
    with _full_precision(value):
        value = value.to(queries.dtype)
        inv_rms = torch.rsqrt(value.pow(2).mean(-1) + eps)  # (B, T)
        logits = torch.matmul(queries, value.transpose(-1, -2))  # (B, r, T)
        return (logits * inv_rms.unsqueeze(-2)).unbind(-2)


def start(router: Router, embedding: Tensor) -> DepthState:
    """The state before the first read: the embedding is the one completed source."""
    return close_block(router, DepthState((), (), embedding, 0), embedding)


def close_block(router: Router, state: DepthState, output: Tensor) -> DepthState:
    """Complete a source, and compute its logits for every read still to come. `output` (B, T, H) was written last."""
    source = _completed(router, state, output)
    logits = source_logits(source, router.queries[state.read_index :], router.eps)
    return DepthState(
        (*state.completed, source),
        (*state.completed_logits, logits),
        None if router.source == "block_sum" else state.current,
        state.read_index,
    )


def _completed(router: Router, state: DepthState, output: Tensor) -> Tensor:
    """What a block leaves as a source, (B, T, H)."""
    assert state.current is not None
    if router.source != "delta_block" or not state.completed:  # the embedding is one with every kind
        return state.current
    return output if router.full else state.current - state.completed[-1]


def read(
    router: Router, state: DepthState, intervention: Intervention | None = None
) -> tuple[Tensor, Tensor, DepthState]:
    """Route over the sources of the next read.

    Returns:
        hidden_states (B, T, H) in the sources' dtype, routing_weights (B, T, n) in routing precision, and the state
        that is ready for the following read.
    """
    site = router.sites[state.read_index]
    num_left = len(router.sites) - site.index  # logits are kept for the reads after a source: index from the end
    logits = [source[-num_left] for source in state.completed_logits[: site.num_completed]]
    sources = state.completed[: site.num_completed]
    if site.has_current:
        assert state.current is not None
        if site.current_is_alias:  # `current` is the newest completed source, whose logit is known
            logit = logits[-1]
        else:
            (logit,) = source_logits(state.current, router.queries[site.index : site.index + 1], router.eps)
        bias = router.biases[site.index]
        logits.append(logit if bias is None else logit + bias.to(logit.dtype))
        sources = (*sources, state.current)
    stream = state.current if site.is_additive else None
    with _full_precision(state.stream):
        # (B, T, n); n is 0 at the first read of an additive model
        stacked = torch.stack(logits, dim=-1) if logits else state.stream[..., :0].to(router.queries.dtype)
        done = Read(site, torch.softmax(stacked, dim=-1), sources, stacked, stream)
        if intervention is not None:
            done = Read(site, *intervention(done)[1:3], stacked, stream)
        hidden_states = done.hidden_states
    return hidden_states, done.routing_weights, state._replace(read_index=site.index + 1)


def mix(routing_weights: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
    """`sum_n routing_weights_n v_n`, accumulated in routing precision: (B, T, H) in the sources' dtype."""
    weights = routing_weights.unsqueeze(-2).unbind(-1)  # n times (B, T, 1)
    mixed = weights[0] * sources[0]
    for weight, source in zip(weights[1:], sources[1:], strict=True):
        mixed = torch.addcmul(mixed, weight, source)
    return mixed.to(sources[0].dtype)


def add(stream: Tensor, routing_weights: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
    """`stream + sum_n routing_weights_n v_n`, accumulated in routing precision: (B, T, H) in the stream's dtype.

    Without a source it is `stream` itself.
    """
    added = stream if not sources else stream.to(routing_weights.dtype)
    for weight, source in zip(routing_weights.unsqueeze(-2).unbind(-1), sources, strict=True):
        added = torch.addcmul(added, weight, source)
    return added.to(stream.dtype)


def map_state(num_reads: int, state: DepthState, function: Callable[[Tensor], Tensor]) -> DepthState:
    """Apply `function` to every tensor of a state, to repeat its sequences or to keep some positions.

    Args:
        num_reads: reads of the model, R. Logits of past reads are dropped.
        state: the state.
        function: must treat (B, T) and (B, T, H) tensors alike.
    """
    num_left = num_reads - state.read_index
    return DepthState(
        tuple(function(value) for value in state.completed),
        tuple(tuple(function(x) for x in logits[len(logits) - num_left :]) for logits in state.completed_logits),
        None if state.current is None else function(state.current),
        state.read_index,
    )


def write(state: DepthState, output: Tensor) -> DepthState:
    """Add a sublayer's output to the running stream."""
    return state._replace(current=output if state.current is None else state.current + output)
