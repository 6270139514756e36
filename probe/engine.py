"""The probe: a clean run that is measured, then one ablated run for each cell, each resumed where it starts to differ.

One engine serves the training callback and the command line. It needs a model and recall examples, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from attnres import FAMILIES, AttnResForCausalLM, DepthState, Read, ReadSite
from attnres.routing import mix
from attnres.tasks import IGNORE_INDEX, RecallBatch
from probe.families import POSITIONS, Cell, is_maskable, source_mask
from probe.interventions import MIN_REMAINING, MaskRenormalise, mask_family
from probe.metrics import METRICS, CleanRun


@dataclass
class Routing:
    """What the clean run's routing looked like, per sequence; `aliases` says whether families include their aliases.

    Attributes:
        mass: [positions] -> (sequences, reads, families) mean mass.
        applicable: [positions, aliases] -> (sequences, reads, families) share of positions where a mask can act.
        dose: [positions, aliases] -> per read, per family, the ||dh|| / ||h|| of the positions where it can act.
        weight_left: [positions, aliases] -> likewise, the weight that is left to renormalise.
    """

    mass: dict[str, np.ndarray]
    applicable: dict[tuple[str, bool], np.ndarray]
    dose: dict[tuple[str, bool], list[list[np.ndarray]]]
    weight_left: dict[tuple[str, bool], list[list[np.ndarray]]]


@dataclass
class ProbeResult:
    """Per-sequence results of a sweep, before any statistics.

    Attributes:
        cells: the grid.
        sites: the model's reads.
        counts: (sequences,) queries of each.
        clean: [metric] -> (sequences,) summed clean value.
        effects: [cell index, positions] -> [metric] -> (sequences,) summed ablated - clean; absent where the cell is
            not applicable.
        routing: masses, applicability and doses of the clean run.
        seconds: wall-clock time of the sweep.
        layer_passes: layers run, times sequences; `full_forwards` is that over layers and sequences.
    """

    cells: tuple[Cell, ...]
    sites: tuple[ReadSite, ...]
    counts: np.ndarray
    clean: dict[str, np.ndarray]
    effects: dict[tuple[int, str], dict[str, np.ndarray]]
    routing: Routing
    seconds: float = 0.0
    layer_passes: int = 0

    @property
    def forward_passes(self) -> float:
        """Forward passes of the whole model that the sweep cost, its prefix reuse counted."""
        return self.layer_passes / (self.sites[0].num_layers * len(self.counts))


@dataclass
class _Observer:
    """A no-op intervention that measures the clean run: masses, applicability and doses at every read."""

    positions: dict[str, Tensor]
    aliases: Sequence[bool]
    mass: dict[str, list[Tensor]] = field(default_factory=dict)
    applicable: dict[tuple[str, bool], list[Tensor]] = field(default_factory=dict)
    dose: dict[tuple[str, bool], list[list[np.ndarray]]] = field(default_factory=dict)
    weight_left: dict[tuple[str, bool], list[list[np.ndarray]]] = field(default_factory=dict)

    def __call__(self, read: Read) -> Read:
        weights = read.routing_weights
        hidden = mix(weights, read.sources)
        members = torch.tensor([source_mask(read.site, f) for f in FAMILIES], device=weights.device)
        mass = weights @ members.T.to(weights.dtype)  # (B, T, families)
        for name, where in self.positions.items():
            self.mass.setdefault(name, []).append(_mean_over(mass, where))
        for aliases in self.aliases:
            acts, doses, weight_left = self._ablate(read, hidden, aliases)
            for name, where in self.positions.items():
                self.applicable.setdefault((name, aliases), []).append(_mean_over(acts.to(weights.dtype), where))
                chosen = acts & where.unsqueeze(-1)
                for kept, values in ((self.dose, doses), (self.weight_left, weight_left)):
                    of_families = [values[..., i][chosen[..., i]].float().cpu().numpy() for i in range(len(FAMILIES))]
                    kept.setdefault((name, aliases), []).append(of_families)
        return read

    @staticmethod
    def _ablate(read: Read, hidden: Tensor, aliases: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Where a mask can act, its dose there and the weight it leaves: each (B, T, families)."""
        nowhere = torch.zeros(hidden.shape[:-1], dtype=hidden.dtype, device=hidden.device)
        acts, doses, left = [], [], []
        for family in FAMILIES:
            if not is_maskable(read.site, family, aliases):
                acts.append(nowhere > 0)
                doses.append(nowhere)
                left.append(nowhere)
                continue
            weights, remaining = mask_family(read, family, aliases)
            masked = mix(weights / remaining.clamp_min(MIN_REMAINING).unsqueeze(-1), read.sources)
            acts.append(remaining >= MIN_REMAINING)
            doses.append((masked - hidden).norm(dim=-1) / hidden.norm(dim=-1))
            left.append(remaining)
        return torch.stack(acts, -1), torch.stack(doses, -1), torch.stack(left, -1)


def _mean_over(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` (B, T, families) over the positions `where` (B, T) of each sequence: (B, families) float64."""
    values, where = values.cpu().double(), where.cpu().double()
    return torch.einsum("bt,btf->bf", where, values) / where.sum(1, keepdim=True)


class Engine:
    """Runs a grid of ablations on one model.

    Args:
        model: an AttnRes model; it is neither changed nor moved, and is expected in eval mode.
        cells: the grid, see `probe.families.build_grid`.
        positions: where to act: "all" positions, "query" positions, or both in turn.
        batch_size: sequences per forward pass.
        on_progress: called after every ablated forward with (done, total).
    """

    def __init__(
        self,
        model: AttnResForCausalLM,
        cells: Sequence[Cell],
        positions: Sequence[str] = POSITIONS,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.sites = model.model.sites
        self.cells = tuple(cells)
        self.positions = tuple(positions)
        self.batch_size = batch_size
        self.on_progress = on_progress or (lambda done, total: None)
        self.aliases = sorted({cell.with_aliases for cell in cells})

    @torch.no_grad()
    def run(self, examples: RecallBatch) -> ProbeResult:
        """Sweep the grid over `examples`, all on the model's device."""
        started = time.perf_counter()
        batches = list(_split(examples.to(self.model.device), self.batch_size))
        self._layer_passes = 0
        self._done, self._total = 0, len(batches) * len(self.positions) * sum(map(self._is_present, self.cells))
        parts = [self._run_batch(batch) for batch in batches]
        effects = {}
        for key in parts[0][2]:
            effects[key] = {m: np.concatenate([part[2][key][m] for part in parts]) for m in METRICS}
        result = ProbeResult(
            cells=self.cells,
            sites=self.sites,
            counts=np.concatenate([part[0] for part in parts]),
            clean={m: np.concatenate([part[1][m] for part in parts]) for m in METRICS},
            effects=effects,
            routing=_merge_routing([part[3] for part in parts]),
            layer_passes=self._layer_passes,
        )
        result.effects = {key: value for key, value in effects.items() if _acts_anywhere(result, *key)}
        result.seconds = time.perf_counter() - started
        return result

    def _is_present(self, cell: Cell) -> bool:
        return any(is_maskable(self.sites[i], cell.family, cell.with_aliases) for i in cell.reads)

    def _run_batch(self, batch: RecallBatch):
        labels = batch.labels
        queries = labels != IGNORE_INDEX
        where = {"all": torch.ones_like(queries), "query": queries}
        observer = _Observer({name: where[name] for name in self.positions}, self.aliases)
        outputs = self.model.model(batch.input_ids, use_cache=False, output_depth_states=True, intervention=observer)
        self._layer_passes += self.sites[0].num_layers * len(labels)
        answers = labels[queries]
        candidates = batch.values.repeat_interleave(queries.sum(1), dim=0)
        clean_run = CleanRun.from_logits(self.model.lm_head(outputs.last_hidden_state[queries]), answers, candidates)
        clean = clean_run.metrics()

        effects = {}
        for positions in self.positions:
            for index, cell in enumerate(self.cells):
                if not self._is_present(cell):
                    continue
                acts = None if positions == "all" else where[positions]
                ablation = MaskRenormalise(cell.family, frozenset(cell.reads), cell.with_aliases, acts)
                logits = self._ablated_logits(outputs.depth_states, cell, ablation, queries)
                ablated = clean_run.metrics(logits)
                effects[index, positions] = {m: _sum_by_sequence(ablated[m] - clean[m], queries) for m in METRICS}
                self._done += 1
                self.on_progress(self._done, self._total)
        counts = queries.sum(1).cpu().numpy()
        return counts, {m: _sum_by_sequence(clean[m], queries) for m in METRICS}, effects, observer

    def _ablated_logits(
        self, states: tuple[DepthState, ...], cell: Cell, ablation: MaskRenormalise, queries: Tensor
    ) -> Tensor:
        """Logits at the queries, with everything before the first ablated layer reused from the clean run."""
        first = self.sites[cell.reads[0]].layer_idx
        state = states[-1] if first is None else states[first]
        outputs = self.model.model(depth_state=state, use_cache=False, intervention=ablation)
        self._layer_passes += (0 if first is None else self.sites[0].num_layers - first) * len(queries)
        return self.model.lm_head(outputs.last_hidden_state[queries])


def _split(examples: RecallBatch, batch_size: int) -> Iterator[RecallBatch]:
    parts = (t.split(batch_size) for t in (examples.keys, examples.values, examples.query_order))
    for keys, values, query_order in zip(*parts, strict=True):
        yield RecallBatch(keys, values, query_order)


def _sum_by_sequence(values: Tensor, queries: Tensor) -> np.ndarray:
    """Sum per-query `values` (queries,) over each sequence of the mask `queries` (B, T): (B,) float64."""
    queries = queries.cpu()
    scattered = torch.zeros(queries.shape, dtype=torch.float64)  # on the CPU: not every device has float64
    scattered[queries] = values.cpu().double()
    return scattered.sum(1).numpy()


def _merge_routing(observers: Sequence[_Observer]) -> Routing:
    def stack(parts: Sequence[list[Tensor]]) -> np.ndarray:
        return torch.cat([torch.stack(part, dim=1) for part in parts]).numpy()

    def join(parts: Sequence[list[list[np.ndarray]]]) -> list[list[np.ndarray]]:
        """Per read and family, the values of all batches."""
        return [[np.concatenate(values) for values in zip(*reads, strict=True)] for reads in zip(*parts, strict=True)]

    first = observers[0]
    return Routing(
        mass={key: stack([o.mass[key] for o in observers]) for key in first.mass},
        applicable={key: stack([o.applicable[key] for o in observers]) for key in first.applicable},
        dose={key: join([o.dose[key] for o in observers]) for key in first.dose},
        weight_left={key: join([o.weight_left[key] for o in observers]) for key in first.weight_left},
    )


def _acts_anywhere(result: ProbeResult, index: int, positions: str) -> bool:
    cell = result.cells[index]
    shares = result.routing.applicable[positions, cell.with_aliases][:, cell.reads, FAMILIES.index(cell.family)]
    return bool(shares.any())
