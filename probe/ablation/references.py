"""What ablations need beside the read: another example's run, means over the data, random draws."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from attnres import AttnResForCausalLM, Read
from probe.ablation.interventions import Context
from probe.examples.examples import Examples


class References:
    """Contexts for the batches of `inputs`; nothing in them depends on how the data is split into batches.

    Args:
        needs: what the grid's kinds need: "partner", "mean", "priorities".
        batch_size: sequences per forward pass of the pass over the data that "mean" takes.
        seed: of partners and random draws.
    """

    def __init__(
        self, model: AttnResForCausalLM, inputs: Examples, needs: Collection[str | None], batch_size: int, seed: int
    ) -> None:
        self.model, self.inputs, self.sites = model, inputs, model.model.sites
        self.spent = 0  # forward passes, times sequences
        self._partners = inputs.partners(seed) if "partner" in needs else None
        self._means = self._mean_sources(batch_size) if "mean" in needs else None
        self._priorities: Tensor | None = None
        if "priorities" in needs:
            shape = (len(self.sites), max(site.num_sources for site in self.sites))
            draws = [np.random.default_rng((seed, i)).random(shape, np.float32) for i in range(len(inputs))]
            self._priorities = torch.from_numpy(np.stack(draws))

    def context(self, chosen: np.ndarray) -> Context:
        """For the sequences `chosen`; acts at all positions."""
        batch = self.inputs.take(chosen)
        count, seq = batch.input_ids.shape
        references: dict[str, dict[int, Read]] = {}
        if self._partners is not None:
            references["partner"] = self._record(self.inputs.take(self._partners[chosen]))
        if self._means is not None:
            no_weights = torch.empty(count, seq, 0, device=self.model.device)
            references["mean"] = {
                index: Read(
                    self.sites[index],
                    no_weights,
                    tuple(m[:seq].to(self.model.dtype).expand(count, -1, -1) for m in means),
                )
                for index, means in self._means.items()
            }
        priorities = self._priorities
        if priorities is not None:
            priorities = priorities[torch.from_numpy(chosen)].to(self.model.device)
            priorities = priorities[:, None].expand(-1, seq, -1, -1)
        return Context(references=references, priorities=priorities)

    def _record(self, batch: Examples) -> dict[int, Read]:
        reads: dict[int, Read] = {}

        def keep(read: Read) -> Read:
            return reads.setdefault(read.site.index, read)

        self.model.model(batch.input_ids, use_cache=False, intervention=keep)
        self.spent += len(batch)
        return reads

    def _mean_sources(self, batch_size: int) -> dict[int, list[Tensor]]:
        """By read, each source's mean over sequences at each position, (seq, hidden); padding is left out."""
        seq = self.inputs.input_ids.shape[1]
        counts = self.inputs.real.sum(0).clamp_min(1).unsqueeze(-1)
        means: dict[int, list[Tensor]] = {}
        for first in range(0, len(self.inputs), batch_size):
            batch = self.inputs.take(np.arange(len(self.inputs))[first : first + batch_size])
            left_out = ~batch.real.unsqueeze(-1)
            for index, read in self._record(batch).items():
                sums = [source.masked_fill(left_out, 0.0).float().sum(0) for source in read.sources]
                sums = [pad(value, (0, 0, 0, seq - len(value))) / counts for value in sums]
                means[index] = [a + b for a, b in zip(means[index], sums, strict=True)] if index in means else sums
        return means
