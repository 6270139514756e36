"""Effects estimated by integrated gradients: one path for each family, shared by all cells that ablate it.

1. The path leads from the clean run to the run in which the family is ablated at every read of the grid. On its way,
   every such read is `(1 - s) h + s h'`, with `h` the read and `h'` the ablated one, both of the run at `s`.
2. At the midpoints of `POINTS` equal parts of the path, one forward and a backward pass for each metric give every
   read's part in the change of the metric, `<dm/dh, h' - h>`; their mean is its part along the whole path.
3. A cell's estimate is the sum of its reads' parts.

The parts of all reads add up to the exact effect of the whole path, up to the width of its steps (completeness:
Sundararajan et al., arXiv:1703.01365; on activations: Hanna et al., arXiv:2403.17806). A single cell's estimate is an
approximation, since on the path the other reads are ablated, too: the tables' `kind` says so, and its agreement with
the exact sweep is reported. The gradient of the clean run alone ranks cells poorly (docs/probes.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attnres import AttnResForCausalLM, Read, ReadSite
from probe.ablation.grid import Cell
from probe.ablation.interventions import Ablation, Context
from probe.ablation.metrics import CleanRun
from probe.examples.examples import Examples
from probe.vocabulary import FINAL, MARGINS

METRICS = MARGINS
"""Those that do not saturate: the gradient of another can vanish along the way."""
POINTS = 2
"""More of them rank cells no better (benchmarks/results/integrated.json)."""
FORWARDS = POINTS * (1 + len(METRICS))
"""Forwards' worth of work for a path: a backward pass through activations counts as one."""


def paths(cells: Iterable[Cell], sites: Sequence[ReadSite]) -> list[list[tuple[int, Cell]]]:
    """The estimated cells that act somewhere, with their indices in the grid, those of one path together.

    The final read has paths of its own.
    """
    found: dict[tuple, list[tuple[int, Cell]]] = {}
    for index, cell in enumerate(cells):
        if not cell.kind.integrated or not any(map(cell.ablation().acts_at, sites)):
            continue
        key = (cell.intervention, cell.route.family, cell.with_aliases, cell.route.sublayer == FINAL)
        found.setdefault(key, []).append((index, cell))
    return list(found.values())


class Integrated:
    """The estimates of a batch.

    Args:
        clean: its clean run.

    Attributes:
        spent: forwards' worth of work so far, times sequences.
    """

    def __init__(self, model: AttnResForCausalLM, batch: Examples, clean: CleanRun) -> None:
        self.model, self.batch, self.clean = model, batch, clean
        # With detached parameters no gradient is taken, nor anything kept, for them; the model's stay as they are.
        self.frozen = {name: value.detach() for name, value in model.model.named_parameters()}
        self.spent = 0.0

    def effects(
        self, cells: Sequence[Cell], contexts: Mapping[str, Context], positions: Sequence[str]
    ) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        """[index, positions] -> [metric] -> (sequences,) summed effect, of those of the grid that are estimated."""
        effects: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        for name in positions:
            for path in paths(cells, self.model.model.sites):
                reads = frozenset(i for _, cell in path for i in cell.acts_on)
                parts = self._parts(replace(path[0][1].ablation(contexts[name]), reads=reads, scope_reads=None))
                for index, cell in path:
                    acting = [parts[i] for i in cell.acts_on if i in parts]
                    effects[index, name] = {m: np.sum([part[m] for part in acting], axis=0) for m in METRICS}
        return effects

    def _parts(self, ablation: Ablation) -> dict[int, dict[str, np.ndarray]]:
        """[read] -> [metric] -> (sequences,) its part in the change of the metric along the path to `ablation`."""
        points = [self.point(ablation, (point + 0.5) / POINTS) for point in range(POINTS)]
        return {
            index: {m: np.mean([point[index][m] for point in points], axis=0) for m in METRICS} for index in points[0]
        }

    @torch.enable_grad()
    def point(self, ablation: Ablation, share: float) -> dict[int, dict[str, np.ndarray]]:
        """[read] -> [metric] -> (sequences,) `<dm/dh, h' - h>`, at one point of the path."""
        moves: dict[int, Tensor] = {}
        probes: dict[int, Tensor] = {}

        def move(read: Read) -> Read:
            """Two sources more: the move, of weight `share`, and zero, whose gradient is that of the read's output."""
            index = read.site.index
            if not ablation.acts_at(read.site):
                return read
            moves[index] = ablation(read).hidden_states - read.hidden_states
            probes[index] = torch.zeros_like(read.sources[0], requires_grad=True)
            weights = torch.cat([read.routing_weights, _constant(read, share), _constant(read, 1.0)], -1)
            return Read(read.site, weights, (*read.sources, moves[index], probes[index]))

        inputs = {"use_cache": False, "intervention": move}
        outputs = torch.func.functional_call(self.model.model, self.frozen, (self.batch.input_ids,), inputs)
        hidden = outputs.last_hidden_state[self.batch.queries]
        metrics = self.clean.metrics(torch.nn.functional.linear(hidden, self.model.lm_head.weight.detach()))
        self.spent += len(self.batch) * FORWARDS / POINTS
        found: dict[int, dict[str, np.ndarray]] = {index: {} for index in probes}
        for metric in METRICS:
            is_last = metric == METRICS[-1]
            gradients = torch.autograd.grad(metrics[metric].sum(), list(probes.values()), retain_graph=not is_last)
            for index, gradient in zip(probes, gradients, strict=True):
                part = (gradient * moves[index].detach()).sum(-1, dtype=torch.float32)
                found[index][metric] = part.cpu().double().sum(-1).numpy()
        return found


def _constant(read: Read, value: float) -> Tensor:
    return torch.full_like(read.routing_weights[..., :1], value)
