"""The sweep: a clean run that is measured, then every ablation of a grid, each from where it starts to differ.

For each batch of sequences the engine

1. makes what kinds need beside the read: other examples, means over the data, random draws (`references`);
2. runs the clean model once, measures its routing on the way (`observer`), and keeps the state before every read;
3. estimates the cells that are to be estimated, from gradients along a path for each family (`integrated`);
4. puts cells that come to the same masks together, sorts what is left by the first read at which it acts, and runs
   ablations that begin at one read as one batch, from the clean state there (`replay`);
5. sums ablated - clean over the queries of each sequence, for every metric (`metrics`).

`ProbeResult.join` puts batches together; no number depends on how the data was split. The engine needs a model and
examples, nothing else: statistics are made of what it returns (`probe.analysis`).
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from attnres import AttnResForCausalLM, ReadSite
from probe.ablation.grid import Cell
from probe.ablation.integrated import FORWARDS, Integrated, paths
from probe.ablation.interventions import Ablation, Context
from probe.ablation.metrics import sum_by_sequence
from probe.ablation.observer import Observer, Routing
from probe.ablation.references import References
from probe.ablation.replay import CleanBatch, replay_cost
from probe.examples.examples import Examples
from probe.failures import is_out_of_memory
from probe.vocabulary import LABELS, POSITIONS

logger = logging.getLogger(__name__)

SummedEffects = dict[str, np.ndarray]
"""[metric] -> (sequences,) summed ablated - clean."""


@dataclass
class ProbeResult:
    """Per-sequence results of a sweep, before any statistics.

    Attributes:
        cells: the grid.
        sites: the model's reads.
        counts: (sequences,) queries of each.
        clean: [metric] -> (sequences,) summed clean value.
        logit_sizes: (sequences,) summed largest absolute clean logit, to which rounding is relative.
        effects: [cell index, positions] -> effects; absent where the cell is not applicable.
        routing: masses, applicability, doses and geometry of the clean run.
        spent, replaced: full forwards times sequences: that were run (a part of a forward counts as that part), and
            that one forward for every applicable exact ablation would have taken.
        seconds: wall-clock time.
    """

    cells: tuple[Cell, ...]
    sites: tuple[ReadSite, ...]
    counts: np.ndarray
    clean: dict[str, np.ndarray]
    logit_sizes: np.ndarray
    effects: dict[tuple[int, str], SummedEffects]
    routing: Routing
    spent: float = 0.0
    replaced: float = 0.0
    seconds: float = 0.0

    @classmethod
    def join(cls, parts: Sequence[ProbeResult]) -> ProbeResult:
        """The result on all parts' sequences, in their order; cells whose ablation could act nowhere are left out."""
        result = cls.concatenate(parts)
        result.effects = {key: effects for key, effects in result.effects.items() if result.applicable(*key).any()}
        exact = [key for key in result.effects if not result.cells[key[0]].kind.integrated]
        result.replaced = float(len(exact) * len(result.counts))
        return result

    @classmethod
    def concatenate(cls, parts: Sequence[ProbeResult]) -> ProbeResult:
        """All parts' sequences as one part, with all cells."""
        first = parts[0]
        return cls(
            cells=first.cells,
            sites=first.sites,
            counts=np.concatenate([part.counts for part in parts]),
            clean={m: np.concatenate([part.clean[m] for part in parts]) for m in first.clean},
            logit_sizes=np.concatenate([part.logit_sizes for part in parts]),
            effects={
                key: {m: np.concatenate([part.effects[key][m] for part in parts]) for m in effects}
                for key, effects in first.effects.items()
            },
            routing=Routing.join([part.routing for part in parts]),
            spent=sum(part.spent for part in parts),
            seconds=sum(part.seconds for part in parts),
        )

    def clustered(self, clusters: np.ndarray) -> ProbeResult:
        """The result with clusters in the place of sequences, so that they are the unit of all statistics.

        What sequences sum is summed over a cluster's; masses, shares and geometry, which are means, are averaged.

        Args:
            clusters: (sequences,) the cluster of each, numbered from 0 without a gap.
        """
        sizes = np.bincount(clusters)
        if len(sizes) == len(clusters):
            return self

        def summed(values: np.ndarray) -> np.ndarray:
            sums = np.zeros((len(sizes), *values.shape[1:]), values.dtype)
            np.add.at(sums, clusters, values)
            return sums

        def each(values: Mapping[Any, np.ndarray]) -> dict[Any, np.ndarray]:
            return {key: summed(value) for key, value in values.items()}

        def averaged(values: np.ndarray) -> np.ndarray:
            return summed(values) / sizes.reshape(-1, *[1] * (values.ndim - 1))

        share = len(sizes) / len(clusters)  # one pass over the data costs what it did
        return replace(
            self,
            counts=summed(self.counts),
            logit_sizes=summed(self.logit_sizes),
            clean=each(self.clean),
            effects={key: each(effects) for key, effects in self.effects.items()},
            routing=replace(
                self.routing,
                mass={key: averaged(value) for key, value in self.routing.mass.items()},
                applicable={key: averaged(value) for key, value in self.routing.applicable.items()},
                geometry=averaged(self.routing.geometry),
            ),
            spent=self.spent * share,
            replaced=self.replaced * share,
        )

    def applicable(self, index: int, positions: str) -> np.ndarray:
        """(sequences, reads of the cell) share of positions at which the cell's intervention can act."""
        cell = self.cells[index]
        if cell.intervention.is_game:  # defined for every set of families
            return np.ones((len(self.counts), len(cell.reads)))
        shares = self.routing.applicable[positions, cell.intervention.kind, cell.with_aliases]
        return shares[:, cell.reads, cell.intervention.labels.index(cell.route.family)]

    @property
    def forward_passes(self) -> float:
        """Forward passes of the whole model over all sequences that the sweep cost."""
        return self.spent / len(self.counts)

    @property
    def forward_passes_saved(self) -> float:
        """How many fewer that is than one for every exact ablation."""
        return (self.replaced - self.spent) / len(self.counts)


class Store(Protocol):
    """Where finished batches of a sweep are kept, so that a killed one goes on (`probe.files.parts`)."""

    def load(self, number: int) -> ProbeResult | None: ...

    def save(self, number: int, part: ProbeResult) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What a sweep will cost, known before it is run.

    Attributes:
        forward_passes: as `ProbeResult.forward_passes`.
        readouts: runs of the output head at all queries.
    """

    forward_passes: float
    readouts: int


@dataclass(frozen=True)
class _AblatedRun:
    """One distinct ablation, the first read at which it acts, and the indices of the cells that come to it."""

    start: int
    ablation: Ablation
    cells: tuple[int, ...]


class Engine:
    """Runs a grid of ablations on one model.

    Args:
        model: an AttnRes model; it is neither changed nor moved, and is expected in eval mode.
        cells: the grid, see `probe.ablation.grid.build_grid`.
        positions: where to act: "all" positions, "query" positions, or both in turn.
        batch_size: sequences per clean run, whose states are kept while its ablations run.
        tokens_per_pass: most tokens of one ablated forward, which bounds memory; one ablation is the least. `None`:
            4,096 on a CPU, whose caches are small, and 65,536 elsewhere.
        seed: of partners and random draws.
        on_progress: called with (done, total) ablated forwards, several ablations in each.

    Raises:
        ValueError: a kind that means nothing on this model.
    """

    def __init__(
        self,
        model: AttnResForCausalLM,
        cells: Sequence[Cell],
        positions: Sequence[str] = POSITIONS,
        batch_size: int = 64,
        tokens_per_pass: int | None = None,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.sites = model.model.sites
        self.cells = tuple(cells)
        self.positions = tuple(positions)
        self.batch_size = batch_size
        self.tokens_per_pass = tokens_per_pass or (2**12 if model.device.type == "cpu" else 2**16)
        self.seed = seed
        self.on_progress = on_progress or (lambda done, total: None)
        self.needs = {cell.intervention.needs for cell in cells}
        for kind in {cell.intervention for cell in cells}:
            kind.check(model.config.attnres_source)

    def run(self, inputs: Examples, store: Store | None = None) -> ProbeResult:
        """Sweep the grid over `inputs`. Batches that `store` holds already are taken from it."""
        return ProbeResult.join(self.run_batches(inputs, range(self.num_batches(inputs)), store))

    def plan(self, inputs: Examples) -> Plan:
        """The cost of `run` on `inputs`. The model is not run: it can be on the "meta" device."""
        runs = self._ablated_runs()
        along_paths = FORWARDS * len(paths(self.cells, self.sites)) * len(self.positions)
        spent = float((1 + along_paths + len(self.needs & {"partner", "mean"})) * len(inputs))
        for number in range(self.num_batches(inputs)):
            chosen = np.arange(len(inputs))[number * self.batch_size :][: self.batch_size]
            queries = inputs.take(chosen).queries
            for positions in self.positions:
                carried = queries[:, int(queries.any(0).nonzero()[0]) :] if positions == "query" else queries
                shape = (len(self.sites) // 2, queries.shape[1], carried.numel(), int(queries.sum()))
                spent += sum(replay_cost(run.start, *shape) for run in runs)
        return Plan(spent / len(inputs), 1 + along_paths + len(runs) * len(self.positions))

    def num_batches(self, inputs: Examples) -> int:
        return -(-len(inputs) // self.batch_size)

    def run_batches(self, inputs: Examples, numbers: Sequence[int], store: Store | None = None) -> list[ProbeResult]:
        """As `run`, for some of the batches (a process's share)."""
        found = {number: store.load(number) if store is not None else None for number in numbers}
        missing = [number for number, part in found.items() if part is None]
        if missing:
            inputs = inputs.to(self.model.device)
            started = time.perf_counter()
            with torch.no_grad():
                references = References(self.model, inputs, self.needs, self.batch_size, self.seed)
            runs = self._ablated_runs()
            self._done, self._total = 0, len(missing) * len(runs) * len(self.positions)
            for number in missing:
                chosen = np.arange(len(inputs))[number * self.batch_size :][: self.batch_size]
                part = self._run_fitting(inputs, chosen, references, runs)
                part.spent, references.spent = part.spent + references.spent, 0
                now = time.perf_counter()
                part.seconds, started = now - started, now
                found[number] = part
                if store is not None:
                    store.save(number, part)
        return [part for part in found.values() if part is not None]

    def _ablated_runs(self) -> tuple[_AblatedRun, ...]:
        """The exact cells' distinct ablations: equal masks at equal reads are one and the same run."""
        cells: dict[tuple, list[int]] = {}
        ablations: dict[tuple, Ablation] = {}
        for index, cell in enumerate(self.cells):
            if cell.kind.integrated:
                continue
            ablation = cell.ablation()
            acting = [i for i in cell.acts_on if ablation.acts_at(self.sites[i])]
            masks = [(i, ablation.chosen(self.sites[i])) for i in acting]
            key = (cell.intervention, *masks)
            if any(ablation.exists_at(self.sites[i]) for i in cell.reads):
                cells.setdefault(key, []).append(index)
                ablations.setdefault(key, replace(ablation, reads=frozenset(acting)))
        runs = [_AblatedRun(min(a.reads), a, tuple(cells[key])) for key, a in ablations.items()]
        return tuple(sorted(runs, key=lambda run: run.start))

    def _passes(self, runs: Sequence[_AblatedRun], tokens: int) -> Iterator[tuple[_AblatedRun, ...]]:
        """Those that run as one batch: they start at one read, and are as many as `tokens_per_pass` allows."""
        together = max(1, self.tokens_per_pass // tokens)
        for _, starting in groupby(runs, key=lambda run: run.start):
            while batch := tuple(islice(starting, together)):
                yield batch

    def _run_fitting(
        self, inputs: Examples, chosen: np.ndarray, references: References, runs: Sequence[_AblatedRun]
    ) -> ProbeResult:
        """Run a batch, in halves if memory does not suffice for it: no number depends on how the data is split."""
        done = self._done
        try:
            return self._run_batch(inputs.take(chosen), chosen, references, runs)
        except Exception as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
        # Out of the handler, whose frames hold tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tokens_per_pass = max(1, self.tokens_per_pass // 2)
        self._done, self._total = done, self._total + len(runs) * len(self.positions)
        logger.warning(
            "memory does not suffice for %d sequences and their ablations at once: they are probed in halves, "
            "%d tokens at a time",
            len(chosen),
            self.tokens_per_pass,
        )
        halves = np.array_split(chosen, 2)
        return ProbeResult.concatenate([self._run_fitting(inputs, half, references, runs) for half in halves])

    @torch.no_grad()
    def _run_batch(
        self, batch: Examples, chosen: np.ndarray, references: References, runs: Sequence[_AblatedRun]
    ) -> ProbeResult:
        queries, starts = batch.queries, batch.starts
        context = references.context(chosen)
        contexts = {"all": context, "query": replace(context, positions=queries)}
        where = {"all": batch.real, "query": queries}
        observer = Observer({p: where[p] for p in self.positions}, batch.real, queries, self._observed(context))
        clean_batch = CleanBatch(self.model, batch, observer, keep_cache="query" in self.positions)
        clean_run = clean_batch.run
        effects = self._ablate(clean_batch, clean_run.metrics(), contexts, runs)
        estimates = Integrated(self.model, batch, clean_run)
        effects |= estimates.effects(self.cells, contexts, self.positions)
        clean = {m: sum_by_sequence(values, starts) for m, values in clean_run.metrics().items()}
        self._check_finite(clean, effects)
        return ProbeResult(
            cells=self.cells,
            sites=self.sites,
            counts=starts.sum(1).cpu().numpy(),
            clean=clean,
            logit_sizes=sum_by_sequence(clean_run.logit_sizes, starts),
            effects=effects,
            routing=observer.routing(),
            spent=clean_batch.spent + estimates.spent,
        )

    def _ablate(
        self,
        clean_batch: CleanBatch,
        clean: Mapping[str, Tensor],
        contexts: Mapping[str, Context],
        runs: Sequence[_AblatedRun],
    ) -> dict[tuple[int, str], SummedEffects]:
        """The exact effects of all ablated runs on a batch."""
        effects: dict[tuple[int, str], SummedEffects] = {}
        for positions in self.positions:
            at_queries = positions == "query"
            for together in self._passes(runs, clean_batch.num_tokens(at_queries)):
                ablations = [replace(run.ablation, context=contexts[positions]) for run in together]
                results = clean_batch.ablated(together[0].start, ablations, at_queries)
                for run, ablated in zip(together, results, strict=True):
                    sums = {m: sum_by_sequence(ablated[m] - clean[m], clean_batch.inputs.starts) for m in clean}
                    effects |= {(index, positions): sums for index in run.cells}
                self._done += len(together)
                self.on_progress(self._done, self._total)
        return effects

    def _check_finite(self, clean: SummedEffects, effects: Mapping[tuple[int, str], SummedEffects]) -> None:
        """Raise a ValueError that names what has no number: such a sweep can say nothing."""
        hint = f"the model overflows in {str(self.model.dtype).removeprefix('torch.')}; try another dtype"
        if not all(np.isfinite(values).all() for values in clean.values()):
            raise ValueError(f"the clean model's outputs are not finite: {hint}")
        for (index, positions), sums in effects.items():
            if not all(np.isfinite(values).all() for values in sums.values()):
                cell = self.cells[index]
                what = f"kind '{cell.kind.name}' ({cell.intervention.__qualname__}) on {cell.route}"
                raise ValueError(f"{what} at {positions} positions makes outputs that are not finite: {hint}")

    def _observed(self, context: Context) -> dict[tuple[str, bool], list[Ablation]]:
        """By (kind, aliases), an ablation for each label of the kind."""
        everywhere = frozenset(range(len(self.sites)))
        pairs = {(cell.intervention, cell.with_aliases): None for cell in self.cells if not cell.intervention.is_game}
        return {
            (kind.kind, aliases): [kind(LABELS[name], everywhere, aliases, context) for name in kind.labels]
            for kind, aliases in pairs
        }
