"""First-order effects: the ablated read exactly, everything downstream of it linearised.

For a read with output `h`, metric `m` and ablated output `h'`, the effect is approximated by `<dm/dh, h' - h>`
(attribution patching: Nanda 2023; Syed et al., arXiv:2310.10348). Gradients of all reads come from one forward and one
backward pass, so a whole grid costs a few forwards. It is an approximation, and the tables' `kind` says so: where a
metric saturates or masks reroute much, it can be far off; its agreement with the exact sweep is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attnres import AttnResForCausalLM, Intervention, Read
from probe.ablation.grid import Cell
from probe.ablation.interventions import Ablation, Context
from probe.ablation.metrics import CleanRun
from probe.examples.examples import Examples
from probe.vocabulary import MARGINS

METRICS = (*MARGINS, "nll")
"""What a gradient can tell; KL has none at the clean run, accuracy none at all."""
FORWARDS = 1 + len(METRICS)
"""Forwards' worth of work for a batch: a backward pass through activations counts as one."""


class Linearised:
    """One clean forward of a batch, and the gradients of its metrics in the output of every read.

    Args:
        observer: measures the forward.

    Attributes:
        run: the clean run's logits at the queries.
        spent: forwards' worth of work (`FORWARDS`), times sequences.
    """

    def __init__(self, model: AttnResForCausalLM, batch: Examples, observer: Intervention) -> None:
        self.reads: dict[int, Read] = {}
        probes: list[Tensor] = []

        def add_probe(read: Read) -> Read:
            """One source more, zero, with weight one: its gradient is that of the read's output."""
            weights, sources = read.routing_weights.detach(), tuple(source.detach() for source in read.sources)
            logits = None if read.logits is None else read.logits.detach()
            self.reads[read.site.index] = clean = Read(read.site, weights, sources, logits)
            with torch.no_grad():
                observer(clean)
            zero = torch.zeros_like(sources[0], requires_grad=True)
            probes.append(zero)
            weights = torch.nn.functional.pad(read.routing_weights, (0, 1), value=1.0)
            return Read(read.site, weights, (*read.sources, zero))

        # With detached parameters no gradient is taken, nor anything kept, for them; the model's stay as they are.
        frozen = {name: value.detach() for name, value in model.model.named_parameters()}
        with torch.enable_grad():
            inputs = {"use_cache": False, "intervention": add_probe}
            outputs = torch.func.functional_call(model.model, frozen, (batch.input_ids,), inputs)
            hidden = outputs.last_hidden_state[batch.queries]
            logits = torch.nn.functional.linear(hidden, model.lm_head.weight.detach())
            answers = batch.labels[batch.queries]
            self.run = CleanRun.from_logits(logits.detach(), answers, batch.rivals, batch.answer_rows)
            sums = {m: values.sum() for m, values in self.run.metrics(logits).items() if m in METRICS}
            self.gradients = {
                m: torch.autograd.grad(value, probes, retain_graph=m != METRICS[-1]) for m, value in sums.items()
            }
        self.along = {i: {m: _along(read, self.gradients[m][i]) for m in METRICS} for i, read in self.reads.items()}
        self.spent = float(FORWARDS * len(batch))

    def effects(
        self, cells: Sequence[tuple[int, Cell]], contexts: Mapping[str, Context], positions: Sequence[str]
    ) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        """[index, positions] -> [metric] -> (sequences,) summed effect, for `cells` with their indices in the grid."""
        effects: dict[tuple[int, str], dict[str, np.ndarray]] = {}
        done: dict[tuple, dict[str, np.ndarray]] = {}  # a read's effects serve every scope that holds it
        for name in positions:
            for index, cell in cells:
                ablation = cell.ablation(contexts[name])
                acting = [i for i in cell.reads if ablation.exists_at(self.reads[i].site)]
                parts = []
                for i in acting:
                    key = (name, cell.intervention, cell.families, cell.with_aliases, i)
                    if key not in done:
                        done[key] = self._effect(ablation, i)
                    parts.append(done[key])
                if parts:
                    effects[index, name] = {m: np.sum([part[m] for part in parts], axis=0) for m in METRICS}
        return effects

    def _effect(self, ablation: Ablation, index: int) -> dict[str, np.ndarray]:
        """[metric] -> (sequences,) first-order effect of the ablation at one read."""
        read = self.reads[index]
        new = replace(ablation, reads=frozenset([index]))(read)
        moved = new.routing_weights - read.routing_weights
        found = {}
        for metric in METRICS:
            change = (moved * self.along[index][metric]).sum(-1)
            for i, (source, old) in enumerate(zip(new.sources, read.sources, strict=True)):
                if source is not old:
                    gradient = self.gradients[metric][index]
                    change = change + new.routing_weights[..., i] * ((source - old) * gradient).sum(-1)
            found[metric] = change.sum(-1, dtype=torch.float64).cpu().numpy()
        return found


def _along(read: Read, gradient: Tensor) -> Tensor:
    """How much the metric changes with the weight of each source: (B, T, n)."""
    return torch.stack([(source * gradient).sum(-1, dtype=torch.float32) for source in read.sources], -1)
