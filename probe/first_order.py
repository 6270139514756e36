"""First-order effects: the ablated read exactly, everything downstream of it linearised.

For a read with output `h`, metric `m` and ablated output `h'`, the effect is approximated by `<dm/dh, h' - h>`
(attribution patching: Nanda 2023; Syed et al., arXiv:2310.10348). Gradients of all reads come from one forward and one
backward pass, so a whole grid costs a few forwards. An approximation, and marked as such (`FIRST_ORDER` in `kind`):
where a metric saturates or masks reroute much, it can be far off; its agreement with the exact sweep is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attnres import AttnResForCausalLM, Read
from probe.families import Cell
from probe.inputs import ProbeInputs
from probe.interventions import Ablation, Context
from probe.metrics import CleanRun

METRICS = ("nll", "logit_diff")
"""What a gradient can tell; KL has none at the clean run, accuracy none at all."""


def first_order_effects(
    model: AttnResForCausalLM,
    batch: ProbeInputs,
    clean: CleanRun,
    cells: Sequence[tuple[int, Cell]],
    contexts: Mapping[str, Context],
    positions: Sequence[str],
) -> dict[tuple[int, str], dict[str, np.ndarray]]:
    """[index, positions] -> [metric] -> (sequences,) summed effect, for `cells` with their indices in the grid."""
    reads, gradients = _gradients(model, batch, clean)
    along = {i: {m: _along(read, gradients[m][i]) for m in METRICS} for i, read in reads.items()}
    effects: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    done: dict[tuple, dict[str, Tensor]] = {}  # a read's effects serve every scope that holds it
    for name in positions:
        for index, cell in cells:
            kind = Ablation.known[cell.base_kind]
            ablation = kind(cell.families, frozenset(cell.reads), cell.with_aliases, contexts[name])
            total = {m: torch.zeros(len(batch), dtype=torch.float64) for m in METRICS}
            acting = [i for i in cell.reads if ablation.exists_at(reads[i].site)]
            for i in acting:
                key = (name, cell.base_kind, cell.family, cell.with_aliases, i)
                if key not in done:
                    done[key] = {m: _effect(ablation, reads[i], along[i][m], gradients[m][i]) for m in METRICS}
                total = {m: total[m] + done[key][m] for m in METRICS}
            if acting:
                effects[index, name] = {m: value.numpy() for m, value in total.items()}
    return effects


@torch.enable_grad()
def _gradients(
    model: AttnResForCausalLM, batch: ProbeInputs, clean: CleanRun
) -> tuple[dict[int, Read], dict[str, list[Tensor]]]:
    """Every read of the clean run, and [metric] -> per read, the gradient of the summed metric in its output."""
    reads: dict[int, Read] = {}
    probes: list[Tensor] = []

    def add_probe(read: Read) -> Read:
        """One source more, zero, with weight one: its gradient is that of the read's output."""
        zero = torch.zeros_like(read.sources[0], requires_grad=True)
        probes.append(zero)
        reads[read.site.index] = Read(read.site, read.routing_weights.detach(), tuple(s.detach() for s in read.sources))
        weights = torch.nn.functional.pad(read.routing_weights, (0, 1), value=1.0)
        return Read(read.site, weights, (*read.sources, zero))

    outputs = model.model(batch.input_ids, use_cache=False, intervention=add_probe)
    metrics = clean.metrics(model.lm_head(outputs.last_hidden_state[batch.queries]))
    gradients = {m: list(torch.autograd.grad(metrics[m].sum(), probes, retain_graph=m != METRICS[-1])) for m in METRICS}
    return reads, gradients


def _along(read: Read, gradient: Tensor) -> Tensor:
    """How much the metric changes with the weight of each source: (B, T, n)."""
    return torch.stack([(source * gradient).sum(-1, dtype=torch.float32) for source in read.sources], -1)


def _effect(ablation: Ablation, read: Read, along: Tensor, gradient: Tensor) -> Tensor:
    """(sequences,) first-order effect of the ablation at one read."""
    new = replace(ablation, reads=frozenset([read.site.index]))(read)
    change = ((new.routing_weights - read.routing_weights) * along).sum(-1)
    for i, (source, old) in enumerate(zip(new.sources, read.sources, strict=True)):
        if source is not old:
            change = change + new.routing_weights[..., i] * ((source - old) * gradient).sum(-1)
    return change.sum(-1, dtype=torch.float64).cpu()
