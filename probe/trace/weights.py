"""What a model shows of itself without any patch: attention weights and routing mass of the clean run, site by site."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.trace.attention import Asking
from probe.trace.sites import EDGE, SOURCE, Site
from probe.trace.stack import Run, Stack


def clean_weights(stack: Stack, runs: Run, sites: Sequence[Site], masks: Tensor, position: Tensor) -> Tensor:
    """(sites, positions, sequences) weights of the clean run, float64 on the CPU; NaN at sites that have none.

    Of an edge: the attention weight that its head gives, from the position that asks, to the positions of a mask,
    summed over them; the mean of the heads where all of a layer are one site. Of a source: its routing mass in its
    read, the mean over the positions of a mask, 0 where it has none.

    Args:
        runs: the clean run of each sequence, and maybe others after them.
        masks: (positions, sequences, seq) bool.
        position: (sequences,) where the answer is asked for.
    """
    found = torch.full((len(sites), *masks.shape[:2]), torch.nan, dtype=torch.float64, device=masks.device)
    here, at = masks.double(), {(site.kind, site.read) for site in sites if site.kind in (EDGE, SOURCE)}
    spread = here / here.sum(-1, keepdim=True).clamp(min=1)
    for kind, read in sorted(at):
        chosen = [i for i, site in enumerate(sites) if (site.kind, site.read) == (kind, read)]
        if kind == EDGE:
            rows = torch.arange(len(position), device=position.device)
            weights = Asking.of(stack, runs, read // 2, rows, position).weights().double()  # (B, heads, T)
            by_head = torch.einsum("bht,pbt->hpb", weights, here)
            for index in chosen:
                head = sites[index].head
                found[index] = by_head.mean(0) if head is None else by_head[head]
        else:
            masses = stack.masses(runs, read)[: len(position)].double()  # (B, T, sources)
            by_source = torch.einsum("btn,pbt->npb", masses, spread)
            for index in chosen:
                found[index] = by_source[sites[index].source]
    return found.cpu()
