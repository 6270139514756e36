"""Ablation of attention heads, one at a time and in pairs.

For each batch of sequences the engine

1. runs the clean model once, and keeps what every read and sublayer took and gave (`probe.trace.stack`), what every
   layer hands to `o_proj`, and where heads look (`attention`);
2. makes what stands in for the heads: zeros, means over the data, another sequence's (`ablations.References`);
3. runs ablations whose first head is in one layer together: that layer's `o_proj` takes the changed heads, and the run
   goes on from the read after it. After the last attention only the positions of answers are carried on.

Nothing before the first ablated head is computed again. Which pairs are tested is chosen on one half of the sequences,
and they are tested on the other (`measure_heads`): heads are chosen because their harm came out large, and what is
subtracted in a pair's interaction would come out too large with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from attnres import AttnResForCausalLM
from attnres.inputs import LARGEST_INTEGER, check_number, first_repeated
from probe.ablation.metrics import CleanRun, sum_by_sequence
from probe.examples.examples import Examples
from probe.heads.ablations import (
    KINDS,
    MEAN,
    PAIRS_AMONG,
    RESAMPLE,
    Head,
    HeadAblation,
    Pair,
    References,
    all_heads,
    all_pairs,
    before_o_proj,
    check_pairs,
    kept_heads,
    most_harmful,
)
from probe.heads.attention import attention_to_value
from probe.heads.result import HeadsResult
from probe.trace.stack import Stack, as_stack
from probe.vocabulary import MARGIN, MARGINS, check_names

FEWEST_TO_CHOOSE = 4
"""Clusters: two to choose pairs on, two to test them on."""


@dataclass(frozen=True)
class Plan:
    """What a measurement will cost, known before it is run.

    Attributes:
        forward_passes: of the whole model over all sequences; a part of a forward counts as that part. Where pairs are
            chosen by harm it is the most that they can cost: that of pairs of the first layers.
        naive: what one forward for each ablation, and what is needed beside them, would take.
        pairs: of heads, of each kind.
    """

    forward_passes: float
    naive: float
    pairs: int


@torch.no_grad()
def measure_heads(
    model: Any,
    examples: Examples,
    kinds: Sequence[str] = KINDS,
    pairs: int | Sequence[tuple[Any, Any]] = PAIRS_AMONG,
    batch_size: int = 32,
    tokens_per_pass: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeadsResult:
    """Ablate every head of a model, and pairs of heads, and measure how far the margin falls.

    Args:
        model: with or without depth routing, in eval mode; it is neither changed nor moved.
        examples: sequences with answers and their distractors. Sequences of one cluster are one in all statistics.
        kinds: of what stands in for a head: "zero", "mean", "resample" (`ablations`).
        pairs: which pairs are ablated, too: pairs of (layer, head); or a number n, for all pairs among the n heads that
            harm most, of each kind. 0: none. As many as there are heads, or more: every pair. Fewer are chosen by their
            harm on a random half of the clusters, and tested on the other half, so that interactions are not biased
            by the choice. Heads that cover for each other wholly do no harm alone, and are not among them.
        batch_size: sequences whose runs are kept at a time.
        tokens_per_pass: most positions of one pass, which bounds memory. `None`: 4,096 on a CPU, 65,536 elsewhere.
        seed: of partners, and of the half that pairs are chosen on.
        on_progress: called with (done, total) ablations of a batch.

    Raises:
        ValueError: names, numbers or pairs that do not fit the model or the sequences, a sequence without a partner
            that "resample" needs, contexts of one value, too few clusters to choose pairs, or a model whose logits are
            not finite.
    """
    started = time.perf_counter()
    task = _Task.of(model, examples, kinds, pairs, batch_size, tokens_per_pass, seed)
    return _Measurement(task, on_progress or (lambda done, total: None)).run(started)


def plan(
    model: Any,
    examples: Examples,
    kinds: Sequence[str] = KINDS,
    pairs: int | Sequence[tuple[Any, Any]] = PAIRS_AMONG,
    batch_size: int = 32,
    tokens_per_pass: int | None = None,
    seed: int = 0,
) -> Plan:
    """What `measure_heads` with the same arguments will cost. The model is not run: it can be on the "meta" device.

    Raises:
        ValueError: as `measure_heads`, but for logits.
    """
    task = _Task.of(model, examples, kinds, pairs, batch_size, tokens_per_pass, seed)
    layers, extra = model.config.num_hidden_layers, len({MEAN, RESAMPLE} & set(kinds))
    spent = whole = naive = 0.0
    for chosen, with_pairs in task.batches:
        queries = task.examples.take(chosen).queries
        ablations = task.singles + (task.dearest_pairs if with_pairs else ())
        sublayers = [2 * (layers - 1 - each.first) for each in ablations]  # before the last MLP
        one = 2 * layers * queries.numel()
        spent += (1 + extra) * one + sum(sublayers) * queries.numel() + len(ablations) * int(queries.sum())
        whole, naive = whole + one, naive + (1 + extra + len(ablations)) * len(chosen)
    return Plan(spent / whole, naive / len(examples), task.num_pairs)


@dataclass(frozen=True)
class _Task:
    """The arguments of a measurement, checked.

    Attributes:
        pairs: those that were given; or the number of heads that they are chosen among.
        chooses: (sequences,) bool: whether a sequence serves to choose pairs, not to test them.
    """

    model: Any
    examples: Examples
    heads: tuple[Head, ...]
    kinds: tuple[str, ...]
    pairs: int | tuple[Pair, ...]
    chooses: np.ndarray
    batch_size: int
    tokens_per_pass: int
    seed: int

    @classmethod
    def of(
        cls,
        model: Any,
        examples: Examples,
        kinds: Sequence[str],
        pairs: int | Sequence[tuple[Any, Any]],
        batch_size: int,
        tokens_per_pass: int | None,
        seed: int,
    ) -> _Task:
        if not isinstance(model, AttnResForCausalLM | Qwen3ForCausalLM):
            raise ValueError(f"heads are those of an AttnRes model or a Qwen3ForCausalLM, got {type(model).__name__}")
        check_names("kind", kinds, KINDS)
        if not kinds or first_repeated(kinds):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, each once")
        if tokens_per_pass is None:
            tokens_per_pass = 2**12 if model.device.type == "cpu" else 2**16
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("tokens_per_pass", tokens_per_pass, 1),
            ("seed", seed, 0),
        ):
            check_number(name, value, least, LARGEST_INTEGER)
        if examples.num_values < 2:
            raise ValueError("contexts need two values at least: with one there is no distractor, and no margin")
        examples.check_fits(model.config)
        if RESAMPLE in kinds:
            examples.partners(seed)
        heads = all_heads(model.config)
        checked = check_pairs(pairs, heads)
        if isinstance(checked, int) and checked == len(heads):
            checked = all_pairs(heads)
        chooses = _half(examples.clusters.cpu().numpy(), seed) if isinstance(checked, int) and checked else None
        chooses = np.zeros(len(examples), bool) if chooses is None else chooses
        return cls(model, examples, heads, tuple(kinds), checked, chooses, batch_size, tokens_per_pass, seed)

    @property
    def num_pairs(self) -> int:
        """Of each kind."""
        return self.pairs * (self.pairs - 1) // 2 if isinstance(self.pairs, int) else len(self.pairs)

    @property
    def batches(self) -> list[tuple[np.ndarray, bool]]:
        """Numbers of sequences, and whether pairs are tested on them: first those on which they are chosen."""
        found = []
        for is_tested, part in ((False, self.chooses.nonzero()[0]), (True, (~self.chooses).nonzero()[0])):
            found += [(part[i : i + self.batch_size], is_tested) for i in range(0, len(part), self.batch_size)]
        return found

    @property
    def singles(self) -> tuple[HeadAblation, ...]:
        return tuple(HeadAblation(kind, (head,)) for kind in self.kinds for head in self.heads)

    @property
    def dearest_pairs(self) -> tuple[HeadAblation, ...]:
        """Those that are tested, or, where they are still to be chosen, such as cost the most."""
        pairs = all_pairs(self.heads[: self.pairs]) if isinstance(self.pairs, int) else self.pairs
        return tuple(HeadAblation(kind, pair) for kind in self.kinds for pair in pairs)

    def chosen_pairs(self, harm: np.ndarray) -> tuple[HeadAblation, ...]:
        """The pairs that are tested. `harm` (kinds x heads,) is that of the singles, on what they are chosen on."""
        if not isinstance(self.pairs, int):
            return self.dearest_pairs
        of_kinds = zip(self.kinds, harm.reshape(len(self.kinds), -1), strict=True)
        chosen = {kind: most_harmful(values, self.heads, self.pairs) for kind, values in of_kinds}
        return tuple(HeadAblation(kind, pair) for kind, pairs in chosen.items() for pair in pairs)


def _half(clusters: np.ndarray, seed: int) -> np.ndarray:
    """(sequences,) bool: those of a random half of the clusters."""
    count = int(clusters.max()) + 1
    if count < FEWEST_TO_CHOOSE:
        raise ValueError(
            f"pairs are chosen on one half of the sequences and tested on the other: {FEWEST_TO_CHOOSE} clusters are "
            f"needed, there are {count}; take more (num_sequences), no pairs (pairs_among 0) or name them in Python"
        )
    half = np.random.default_rng(seed).permutation(count)[: count // 2]
    return np.isin(clusters, half)


class _Measurement:
    """A measurement as it goes on: effects on the margins, summed over each sequence's answers.

    Attributes:
        singles, pairs: [metric] -> (ablations, sequences); of pairs NaN where they are not tested.
    """

    def __init__(self, task: _Task, on_progress: Callable[[int, int], None]) -> None:
        self.task, self.on_progress, self.done = task, on_progress, 0
        self.stack = as_stack(task.model)
        self.examples = task.examples.to(task.model.device)
        self.count = len(self.examples)
        self.singles = {metric: np.full((len(task.singles), self.count), np.nan) for metric in MARGINS}
        num_pairs = task.num_pairs * len(task.kinds)
        self.pairs = {metric: np.full((num_pairs, self.count), np.nan) for metric in MARGINS}
        self.clean = {metric: np.zeros(self.count) for metric in MARGINS}
        self.logit_sizes = np.zeros(self.count)
        heads = (task.model.config.num_hidden_layers, task.model.config.num_attention_heads)
        self.attention = np.full((*heads, self.count), np.nan)
        self.total = sum(len(task.singles) + with_pairs * num_pairs for _, with_pairs in task.batches)

    def run(self, started: float) -> HeadsResult:
        task, stack = self.task, self.stack
        every = [chosen for chosen, _ in task.batches]
        references = References(stack, self.examples, task.kinds, every, task.seed)
        pairs: tuple[HeadAblation, ...] | None = None
        for chosen, with_pairs in task.batches:
            batch = _Batch(stack, self.examples.take(chosen), references, chosen)
            starts = batch.examples.starts
            for metric in MARGINS:
                self.clean[metric][chosen] = sum_by_sequence(batch.clean_metrics[metric], starts)
            self.logit_sizes[chosen] = sum_by_sequence(batch.clean.logit_sizes, starts)
            self.attention[:, :, chosen] = attention_to_value(stack, batch.run, batch.attention, batch.examples)
            self._ablate(batch, chosen, task.singles, self.singles)
            if with_pairs:
                if pairs is None:  # all that they are chosen on comes first
                    pairs = task.chosen_pairs(-self.singles[MARGIN][:, task.chooses].sum(1))
                self._ablate(batch, chosen, pairs, self.pairs)
        self._check_finite()
        assert pairs is not None
        return self._result(pairs, time.perf_counter() - started)

    def _ablate(
        self, batch: _Batch, chosen: np.ndarray, ablations: Sequence[HeadAblation], found: dict[str, np.ndarray]
    ) -> None:
        for indices in _passes(ablations, self.task.tokens_per_pass // batch.examples.input_ids.numel()):
            ablated = batch.ablated([ablations[i] for i in indices])
            for metric in MARGINS:
                moved = ablated[metric] - batch.clean_metrics[metric]
                for index, values in zip(indices, moved, strict=True):
                    found[metric][index, chosen] = sum_by_sequence(values, batch.examples.starts)
            self.done += len(indices)
            self.on_progress(self.done, self.total)

    def _check_finite(self) -> None:
        tested = {metric: values[:, ~self.task.chooses] for metric, values in self.pairs.items()}
        if not all(np.isfinite(v).all() for part in (self.clean, self.singles, tested) for v in part.values()):
            dtype = str(self.task.model.dtype).removeprefix("torch.")
            raise ValueError(f"the model's logits are not finite: it overflows in {dtype}; try another dtype")

    def _result(self, pairs: tuple[HeadAblation, ...], seconds: float) -> HeadsResult:
        task, examples = self.task, self.examples
        whole = sum(examples.take(chosen).input_ids.numel() for chosen, _ in task.batches)
        return HeadsResult(
            kinds=task.kinds,
            heads=task.heads,
            singles={m: v.reshape(len(task.kinds), len(task.heads), -1) for m, v in self.singles.items()},
            pair_ablations=pairs,
            pairs=self.pairs,
            tested=~task.chooses,
            clean=self.clean,
            counts=examples.starts.sum(1).cpu().numpy(),
            logit_sizes=self.logit_sizes,
            clusters=examples.clusters.cpu().numpy(),
            attention_to_value=self.attention.reshape(len(task.heads), -1),
            precision=task.model.dtype,
            forward_passes=self.stack.spent / (self.stack.num_sublayers * whole),
            seconds=seconds,
        )


def _passes(ablations: Sequence[HeadAblation], together: int) -> Iterator[list[int]]:
    """Indices of those that run as one batch: they begin in one layer, and are at most `together`, or one."""
    order = sorted(range(len(ablations)), key=lambda i: ablations[i].first)
    for _, group in groupby(order, key=lambda i: ablations[i].first):
        indices, step = list(group), max(1, together)
        yield from (indices[first : first + step] for first in range(0, len(indices), step))


class _Batch:
    """The clean run of a batch of sequences, and runs of it with heads ablated.

    Attributes:
        run: the clean run.
        heads: of each layer, what it hands to `o_proj`, (B, T, width).
        clean: the clean run at the queries, to compare others with.
        attention: arguments of attention sublayers.
    """

    def __init__(self, stack: Stack, examples: Examples, references: References, chosen: np.ndarray) -> None:
        self.stack, self.examples, self.queries = stack, examples, examples.queries
        with kept_heads(stack.layers) as self.heads:
            self.run = stack.run(examples.input_ids, self.queries)
        answers = examples.labels[self.queries]
        self.clean = CleanRun.from_logits(self.run.logits, answers, examples.rivals, examples.answer_rows)
        self.clean_metrics = self.clean.metrics()
        self.attention = stack.attention_arguments(examples.input_ids.shape[1])
        self.references = references.of(chosen, self.heads)

    def ablated(self, ablations: Sequence[HeadAblation]) -> dict[str, Tensor]:
        """Metrics, (ablations, answers) each, of the run under each ablation. All begin in one layer."""
        stack, count, first = self.stack, len(ablations), ablations[0].first

        def take(value: Tensor) -> Tensor:
            return value.repeat(count, *[1] * (value.dim() - 1))

        def replaced(layer: int, heads: Tensor) -> Tensor:
            return self._replaced(layer, heads, ablations)

        stream = stack.layers[first].self_attn.o_proj(replaced(first, take(self.heads[first])))
        if stack.adds_to_stream(2 * first):
            stream = take(self.run.streams[2 * first]) + stream
        state, last = stack.resume(self.run, 2 * first + 1, take, stream), stack.num_sublayers - 1
        later = {head.layer for each in ablations for head in each.heads} - {first}
        with before_o_proj(stack.layers, later, replaced):
            for index in range(2 * first + 1, last):
                hidden, state = stack.read(state)
                state = stack.write(state, stack.sublayer(index, hidden, self.attention))
        # From the last MLP on nothing looks at other positions.
        state = stack.map(state, lambda value: value.unflatten(0, (count, -1))[:, self.queries])
        hidden, state = stack.read(state)
        state = stack.write(state, stack.sublayer(last, hidden))
        return self.clean.of_hidden(stack.read(state)[0], stack.head)

    def _replaced(self, layer: int, heads: Tensor, ablations: Sequence[HeadAblation]) -> Tensor:
        """`heads` (ablations x B, T, width) of a layer, each ablation's with what stands in for the ablated."""
        size = self.stack.layers[layer].self_attn.head_dim
        found = heads.clone().unflatten(0, (len(ablations), -1))
        for number, each in enumerate(ablations):
            for head in each.heads:
                if head.layer == layer:
                    where = slice(head.head * size, (head.head + 1) * size)
                    found[number, :, :, where] = self.references[each.kind][layer][:, :, where]
        return found.flatten(0, 1)
