"""The causal trace: one site at a time as in the other of two runs, and how far the answer follows.

For each batch of pairs of sequences the engine

1. runs the clean and the corrupted sequences once and keeps what every read and sublayer took and gave (`stack`);
2. lists the patches that can change anything, and puts those together that begin at one read (`passes`);
3. for each pass: puts the other run's activation in, which makes another running stream before some read; resumes
   there, from the first position that is patched, with the kept run's keys and values before it; and reads the answer's
   two logits.

Nothing before the patched site is computed again. Denoising patches a site of the clean run into the corrupted one, and
asks what is sufficient; noising the reverse, and asks what is necessary: where two routes can each carry the answer,
denoising finds both and noising neither (Heimersheim and Nanda, arXiv:2404.15255; Meng et al., arXiv:2202.05262).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnres import AttnResForCausalLM
from attnres.inputs import LARGEST_INTEGER, check_number
from probe.trace.flips import Flips, Positions, masks_of
from probe.trace.passes import Rows, Work, cost, plan_work
from probe.trace.result import TraceResult
from probe.trace.sites import DIRECTIONS, NOISE, OUTPUT, SOURCE, STREAM, Site, trace_sites
from probe.trace.stack import KeysBefore, Run, Stack, as_stack
from probe.vocabulary import check_names


@dataclass(frozen=True)
class Plan:
    """What a trace will cost, known before it is run.

    Attributes:
        forward_passes: of the whole model over all clean sequences, up to the last position that asks; a part of a
            forward counts as that part. The two runs that are kept are among them.
        naive: what one forward for every patch, and the two runs, would take.
        passes: batches that are run.
    """

    forward_passes: float
    naive: int
    passes: int


@torch.no_grad()
def trace(
    model: Any,
    flips: Flips,
    sites: Sequence[str] | None = None,
    directions: Sequence[str] = DIRECTIONS,
    positions: Positions = None,
    with_aliases: bool = False,
    batch_size: int = 16,
    tokens_per_pass: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TraceResult:
    """Patch every site of a model, one at a time, and measure how far the answer follows.

    Args:
        model: with or without depth routing, in eval mode; it is neither changed nor moved.
        flips: pairs of sequences, clean and corrupted.
        sites: kinds of sites (`SITE_KINDS`); `None`: all that the model has.
        directions: "denoise" (the corrupted run with one site of the clean one), "noise" (the reverse).
        positions: where in the sequence, see `Positions`; `None`: every position by itself.
        with_aliases: patch a source together with the one that is the same tensor, at reads that have one.
        batch_size: pairs of sequences whose runs are kept at a time.
        tokens_per_pass: most positions of one pass, which bounds memory. `None`: 4,096 on a CPU, 65,536 elsewhere.
        on_progress: called with (done, total) passes.

    Raises:
        ValueError: names, numbers or positions that do not fit the model or the sequences; a flip that changes
            nothing; or a model whose logits are not finite.
    """
    started = time.perf_counter()
    task = _Task.of(model, flips, sites, directions, positions, with_aliases, batch_size, tokens_per_pass)
    done, total = 0, 0 if on_progress is None else sum(len(task.work(rows).passes) for rows in task.batches)
    stack, found = as_stack(model), []
    for rows in task.batches:
        work = task.work(rows)
        batch = _Batch(stack, task, rows, work)
        for each in work.passes:
            batch.patch(each)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        found.append((batch.logits, _on_cpu(batch.runs.logits)))
    unit = stack.num_sublayers * task.flips.clean_ids.numel()
    return task.result(found, stack.spent / unit, time.perf_counter() - started)


def plan(
    model: Any,
    flips: Flips,
    sites: Sequence[str] | None = None,
    directions: Sequence[str] = DIRECTIONS,
    positions: Positions = None,
    with_aliases: bool = False,
    batch_size: int = 16,
    tokens_per_pass: int | None = None,
) -> Plan:
    """What `trace` with the same arguments will cost. The model is not run: it can be on the "meta" device, with the
    `tokens_per_pass` of the device that is meant.

    Raises:
        ValueError: as `trace`.
    """
    task = _Task.of(model, flips, sites, directions, positions, with_aliases, batch_size, tokens_per_pass)
    num_layers = model.config.num_hidden_layers
    costs = [cost(each, num_layers) for rows in task.batches for each in task.work(rows).passes]
    unit = 2 * num_layers * task.flips.clean_ids.numel()
    patches = len(task.sites) * len(task.masks) * len(task.directions)
    return Plan((2 * unit + sum(costs)) / unit, 2 + patches, len(costs))


@dataclass(frozen=True)
class _Task:
    """The arguments of a trace, checked."""

    model: Any
    flips: Flips
    sites: tuple[Site, ...]
    directions: tuple[str, ...]
    masks: dict[str | int, Tensor]
    with_aliases: bool
    batch_size: int
    tokens_per_pass: int

    @classmethod
    def of(
        cls,
        model: Any,
        flips: Flips,
        kinds: Sequence[str] | None,
        directions: Sequence[str],
        positions: Positions,
        with_aliases: bool,
        batch_size: int,
        tokens_per_pass: int | None,
    ) -> _Task:
        sites = trace_sites(model, kinds)
        check_names("direction", directions, DIRECTIONS)
        if not directions or len(set(directions)) < len(directions):
            raise ValueError(f"directions must be one or both of {', '.join(DIRECTIONS)}, each once")
        if tokens_per_pass is None:
            tokens_per_pass = 2**12 if model.device.type == "cpu" else 2**16
        check_number("batch_size", batch_size, 1, LARGEST_INTEGER)
        check_number("tokens_per_pass", tokens_per_pass, 1, LARGEST_INTEGER)
        flips = flips.cut()
        flips.check_fits(model.config)
        masks = masks_of(positions, flips)
        return cls(model, flips, sites, tuple(directions), masks, with_aliases, batch_size, tokens_per_pass)

    @property
    def batches(self) -> list[slice]:
        return [slice(first, first + self.batch_size) for first in range(0, len(self.flips), self.batch_size)]

    def work(self, rows: slice) -> Work:
        """What is to be done on some of the sequences."""
        about = {"num_layers": self.model.config.num_hidden_layers}
        about |= {"routed": isinstance(self.model, AttnResForCausalLM)}
        about |= {"final_read": about["routed"] and self.model.sites[-1].sublayer == "final"}
        masks = {name: mask[rows] for name, mask in self.masks.items()}
        directions = [DIRECTIONS.index(name) for name in self.directions]
        return plan_work(self.sites, masks, self.flips.take(rows), directions, self.tokens_per_pass, about)

    def result(self, parts: Sequence[tuple[Tensor, Tensor]], forward_passes: float, seconds: float) -> TraceResult:
        """The result of all batches: patched logits, and those of the kept runs, first the clean."""
        flips, chosen = self.flips, [DIRECTIONS.index(name) for name in self.directions]
        clean, corrupted = (torch.cat([part.chunk(2)[i] for _, part in parts]) for i in (0, 1))
        patched = torch.cat([part for part, _ in parts], dim=3)[chosen]
        if not all(bool(logits.isfinite().all()) for logits in (clean, corrupted, patched)):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ValueError(f"the model's logits are not finite: it overflows in {dtype}; try another dtype")
        pair = torch.stack((flips.answer, flips.flipped_answer), dim=1)
        assert flips.clusters is not None
        return TraceResult(
            sites=self.sites,
            directions=self.directions,
            positions=tuple(self.masks),
            with_aliases=self.with_aliases,
            logits=patched.numpy(),
            clean_logits=clean.gather(1, pair).numpy(),
            corrupted_logits=corrupted.gather(1, pair).numpy(),
            clusters=flips.clusters.numpy(),
            logit_sizes=torch.maximum(clean.abs().amax(1), corrupted.abs().amax(1)).double().numpy(),
            precision=self.model.dtype,
            forward_passes=forward_passes,
            seconds=seconds,
        )


class _Batch:
    """Both runs of a batch of sequences, and the logits of those that are patched.

    Attributes:
        runs: the clean run of each sequence, then the corrupted ones.
        logits: (directions, sites, positions, sequences, 2) of the answer and the flipped answer.
    """

    def __init__(self, stack: Stack, task: _Task, rows: slice, work: Work) -> None:
        self.stack, self.sites, self.with_aliases = stack, task.sites, task.with_aliases
        flips, device = task.flips.take(rows), task.model.device
        self.size, position = len(flips), flips.position.to(device)
        both = (flips.clean_ids.to(device), flips.corrupted_ids.to(device))
        asked = torch.arange(self.size, device=device), position
        self.runs = Run.join(*(stack.run(ids, asked) for ids in both))
        self.answers = torch.stack((flips.answer, flips.flipped_answer), dim=1)
        clean, corrupted = (_on_cpu(logits).gather(1, self.answers) for logits in self.runs.logits.chunk(2))
        base = torch.stack((corrupted, clean)).view(len(DIRECTIONS), 1, 1, self.size, 2)
        whole = work.whole[None, :, :, :, None]
        self.logits = torch.where(whole, base.flip(0), base.expand(-1, *work.whole.shape, 2))

    def patch(self, rows: Rows) -> None:
        """Run one pass."""
        patched = _Pass(self, rows.to(self.stack.model.device))
        logits = _on_cpu(self.stack.head(patched.last_hidden()))
        answers = logits.gather(1, self.answers[rows.sequence])
        self.logits[rows.direction, rows.site, rows.place, rows.sequence] = answers


class _Pass:
    """One pass: N rows, of each W positions, or only the one that asks (`at_answer`)."""

    def __init__(self, batch: _Batch, rows: Rows) -> None:
        self.stack, self.runs, self.rows = batch.stack, batch.runs, rows
        self.sites, self.with_aliases = batch.sites, batch.with_aliases
        is_noise = rows.direction == DIRECTIONS.index(NOISE)
        clean, corrupted = rows.sequence, rows.sequence + batch.size
        self.ours, self.other = torch.where(is_noise, clean, corrupted), torch.where(is_noise, corrupted, clean)
        self.begin, self.end = rows.span
        if rows.at_answer:
            self.mask = torch.ones((len(rows), 1), dtype=torch.bool, device=rows.mask.device)
        else:
            self.mask = rows.mask[:, self.begin : self.end]
        row, column = self.mask.nonzero().unbind(1)
        self.row, self.at = row, rows.position[row] if rows.at_answer else column + self.begin
        self.attention = None if rows.at_answer else self.stack.attention_arguments(self.end - self.begin, self.begin)
        self.cache = KeysBefore(self.runs, self.ours, self.begin) if self.begin else None

    def take(self, value: Tensor) -> Tensor:
        """Of a kept run's (B, T, …): the run that is patched, (N, W, …)."""
        if self.rows.at_answer:
            return value[self.ours, self.rows.position].unsqueeze(1)
        return value[:, self.begin : self.end][self.ours]

    def put(self, base: Tensor, new: Tensor) -> Tensor:
        """`base` (N, W, H), which is changed, with `new` (patched positions, H)."""
        base[self.mask] = new
        return base

    def last_hidden(self) -> Tensor:
        """What the final norm takes where the answer is asked for, (N, H)."""
        stack, kind, read, runs = self.stack, self.rows.kind, self.rows.read, self.runs
        if kind == STREAM:
            other = runs.streams[read][self.other[self.row], self.at]
            return self._resumed(read, self.put(self.take(runs.streams[read]), other), alone=True)
        if kind == OUTPUT:
            return self._after(read, runs.outputs[read][self.other[self.row], self.at])
        mixed = self._inputs(read)
        if read == stack.num_sublayers:
            return mixed
        if read % 2:  # an MLP looks at no other position
            return self._after(read, stack.sublayer(read, mixed.unsqueeze(0))[0])
        hidden = self.put(self.take(runs.inputs[read]), mixed)
        output = stack.sublayer(read, hidden, self.attention, self.cache)
        stream = self.take(runs.streams[read]) + output if stack.adds_to_stream(read) else output
        return self._resumed(read + 1, stream, alone=False)

    def _after(self, sublayer: int, output: Tensor) -> Tensor:
        """`last_hidden` where a sublayer writes `output` (patched positions, H)."""
        if self.stack.adds_to_stream(sublayer):
            output = self.runs.streams[sublayer][self.ours[self.row], self.at] + output
        stream = self.put(self.take(self.runs.streams[sublayer + 1]), output)
        return self._resumed(sublayer + 1, stream, alone=True)

    def _inputs(self, read: int) -> Tensor:
        """What a read hands on at patched positions, (patched positions, H): the other run's, or with its sources."""
        found = self.runs.inputs[read][self.other[self.row], self.at]
        sites = self.rows.site.to(self.row.device)[self.row]
        for index in sites.unique().tolist():
            site = self.sites[index]
            if site.kind != SOURCE:
                continue
            (chosen,) = (sites == index).nonzero(as_tuple=True)
            ours, other = ((run[self.row[chosen]], self.at[chosen]) for run in (self.ours, self.other))
            mixed = self.stack.read_mixed(
                read,
                self.runs,
                self._sources(site),
                lambda value, where=ours: value[where].unsqueeze(0),
                lambda value, where=other: value[where].unsqueeze(0),
            )
            found[chosen] = mixed[0]
        return found

    def _sources(self, site: Site) -> frozenset[int]:
        """The sources that are patched at a site."""
        assert site.source is not None
        if not (site.aliased and self.with_aliases):
            return frozenset({site.source})
        return frozenset(each.source for each in self.sites if _twins(each, site) and each.source is not None)

    def _resumed(self, read: int, stream: Tensor, alone: bool) -> Tensor:
        """`last_hidden` of the run with another stream before a read, at patched positions `alone` or everywhere."""
        stack, last = self.stack, self.stack.num_sublayers - 1
        state, at_answer = stack.resume(self.runs, read, self.take, stream), self.rows.at_answer
        for index in range(read, last + 1):
            if index == last and not at_answer:  # nothing looks at other positions any more
                state, at_answer = stack.map(state, self._at_answer), True
            if index % 2 and alone and index < last:
                state = self._mlp_alone(state, index)
                continue
            alone = False
            hidden, state = stack.read(state)
            state = stack.write(state, stack.sublayer(index, hidden, self.attention, self.cache))
        if not at_answer:
            state = stack.map(state, self._at_answer)
        return stack.read(state)[0][:, 0]

    def _mlp_alone(self, state: Any, index: int) -> Any:
        """The state after an MLP that differs from the kept run's at patched positions only."""
        hidden, _ = self.stack.read(self.stack.map(state, lambda value: value[self.mask].unsqueeze(0)))
        output = self.put(self.take(self.runs.outputs[index]), self.stack.sublayer(index, hidden)[0])
        return self.stack.write(state._replace(read_index=index + 1), output)

    def _at_answer(self, value: Tensor) -> Tensor:
        return value[torch.arange(len(value), device=value.device), self.rows.position - self.begin].unsqueeze(1)


def _twins(each: Site, site: Site) -> bool:
    """Whether two sources of one read are the same tensor, or one."""
    return each.kind == SOURCE and each.read == site.read and each.aliased == site.aliased


def _on_cpu(logits: Tensor) -> Tensor:
    """In float32, or float64 for a float64 model."""
    return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))
