"""What is done to a head, and to which: one ablation is a kind and the heads that it acts on.

What a head hands to `o_proj`, its slice of the concatenated heads, becomes at all positions

zero      zero
mean      its mean in the clean run over the sequences that are measured, at each position (padding left out)
resample  what it is in the clean run of another sequence, at the same position (`Examples.partners`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnres.inputs import check_number
from attnres.routing import routing_dtype
from probe.examples.examples import Examples
from probe.trace.stack import Stack

ZERO, MEAN, RESAMPLE = KINDS = ("zero", "mean", "resample")
PAIRS_AMONG = 8
"""Heads whose pairs are tested, by default."""


class Head(NamedTuple):
    """An attention head: the index of its layer, and its index there."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"layer {self.layer} head {self.head}"


Pair = tuple[Head, Head]


@dataclass(frozen=True)
class HeadAblation:
    """A kind, and the heads that it acts on at once."""

    kind: str
    heads: tuple[Head, ...]

    @property
    def first(self) -> int:
        """The first layer where it acts."""
        return min(head.layer for head in self.heads)


def all_heads(config: Any) -> tuple[Head, ...]:
    """The heads of a model of this configuration, from the first layer on."""
    shape = (config.num_hidden_layers, config.num_attention_heads)
    return tuple(Head(*map(int, index)) for index in np.ndindex(shape))


def check_pairs(pairs: int | Iterable[Sequence[Sequence[int]]], heads: Sequence[Head]) -> int | tuple[Pair, ...]:
    """`pairs` as heads, each the shallower first; or the number among which they are chosen, at most all.

    Raises:
        ValueError: a head is none of `heads`, a pair is of one head or there twice, or the number makes no pair.
    """
    if isinstance(pairs, int):
        check_number("pairs_among", pairs, 0, 2**31)
        if pairs == 1:
            raise ValueError("pairs_among must be 0, for no pairs, or at least 2, got 1")
        return min(pairs, len(heads))
    found: list[Pair] = []
    for a, b in pairs:
        pair = tuple(sorted((Head(*a), Head(*b))))
        for head in pair:
            if head not in heads:
                last = heads[-1]
                raise ValueError(f"{head} does not exist: layers are 0 to {last.layer}, heads 0 to {last.head}")
        if pair[0] == pair[1] or pair in found:
            raise ValueError(f"a pair is of two heads and is named once, got {a} with {b}")
        found.append((pair[0], pair[1]))
    return tuple(found)


def most_harmful(harm: np.ndarray, heads: Sequence[Head], number: int) -> tuple[Pair, ...]:
    """All pairs among the `number` heads with the most `harm` (heads,)."""
    return all_pairs(sorted(heads[i] for i in np.argsort(-harm, kind="stable")[:number]))


def all_pairs(heads: Iterable[Head]) -> tuple[Pair, ...]:
    return tuple(combinations(heads, 2))


class References:
    """What stands in for the heads of sequences; nothing in it depends on how they are split into batches.

    Args:
        examples: all sequences, on the model's device.
        batches: the numbers of those that are run at once, for the pass over the data that "mean" takes.
        seed: of partners.

    Raises:
        ValueError: a sequence has no partner, and a kind needs one.
    """

    def __init__(
        self, stack: Stack, examples: Examples, kinds: Sequence[str], batches: Sequence[np.ndarray], seed: int
    ) -> None:
        self.stack, self.examples, self.kinds = stack, examples, kinds
        self._partners = examples.partners(seed) if RESAMPLE in kinds else None
        self._means = self._mean_heads(batches) if MEAN in kinds else None

    def of(self, chosen: np.ndarray, heads: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """By kind, for each layer, what stands in for `heads`, those of the sequences `chosen`: (B or 1, T, width)."""
        found = {ZERO: [torch.zeros_like(value[:1]) for value in heads]}
        if self._means is not None:
            found[MEAN] = [mean[: heads[0].shape[1]].to(heads[0].dtype).unsqueeze(0) for mean in self._means]
        if self._partners is not None:
            found[RESAMPLE] = self._record(self.examples.take(self._partners[chosen]))
        return found

    def _record(self, batch: Examples) -> list[Tensor]:
        """The heads of the clean run, of each layer."""
        model = self.stack.model
        with kept_heads(self.stack.layers) as heads:
            model.model(batch.input_ids, use_cache=False)
        self.stack.spent += self.stack.num_sublayers * batch.input_ids.numel()
        return heads

    def _mean_heads(self, batches: Sequence[np.ndarray]) -> list[Tensor]:
        """Of each layer, the mean over sequences at each position, (T, width)."""
        seq, counts = self.examples.input_ids.shape[1], self.examples.real.sum(0).clamp_min(1)
        means: list[Tensor] = []
        for chosen in batches:
            batch = self.examples.take(chosen)
            for layer, value in enumerate(self._record(batch)):
                value = value.to(routing_dtype(value.dtype))
                if len(means) == layer:
                    means.append(value.new_zeros(seq, value.shape[-1]))
                sums = value.masked_fill(~batch.real.unsqueeze(-1), 0.0).sum(0)
                means[layer][: len(sums)] += sums / counts[: len(sums), None]
        return means


@contextmanager
def kept_heads(layers: Sequence[Any]) -> Iterator[list[Tensor]]:
    """A list to which a run inside adds what each layer hands to `o_proj`, (B, T, heads x head size)."""
    kept: list[Tensor] = []

    def keep(_: int, heads: Tensor) -> Tensor:
        kept.append(heads)
        return heads

    with before_o_proj(layers, range(len(layers)), keep):
        yield kept


@contextmanager
def before_o_proj(
    layers: Sequence[Any], chosen: Iterable[int], function: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Inside, `o_proj` of the `chosen` layers takes `function(layer, heads)` in the place of its heads."""

    def hook(layer: int) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
        return lambda _, args: (function(layer, args[0]),)

    with ExitStack() as hooks:
        for layer in chosen:
            handle = layers[layer].self_attn.o_proj.register_forward_pre_hook(hook(layer))
            hooks.callback(handle.remove)
        yield
