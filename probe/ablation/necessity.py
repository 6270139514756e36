"""What a model loses without a family, or with other content or weights of it; and the control of such a loss.

Each says where it misleads. What a family does alone is asked in `probe.ablation.sufficiency`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnres import FAMILIES, Read, ReadSite
from probe.ablation.base import MIN_REMAINING, Ablation, everywhere, source_mask
from probe.vocabulary import ALL


class MaskRenormalise(Ablation):
    """Set the families' weights to zero and scale the rest back to sum to one.

    The read moves by `alpha / (1 - alpha) * (h - mean source of the families)`: the dose grows with the mass `alpha`.
    Not possible at a position where less than `MIN_REMAINING` would be left.

    It misleads where another source holds the same content: with cumulative sources every source contains the ones
    before it, so that masking `embedding` re-weights the embedding's content and never removes it. In an additive model
    what is masked is a route: the running stream, which is no source, holds the content still. Two families that
    stand in for each other both look idle.
    """

    kind = "mask_renormalise"

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights.masked_fill(self.members(read), 0.0)
        remaining = weights.sum(-1)
        weights = weights / remaining.clamp_min(MIN_REMAINING).unsqueeze(-1)
        return read._replace(routing_weights=weights), remaining >= MIN_REMAINING


class Coalition(Ablation):
    """As `MaskRenormalise`, but where nothing would be left the read is zero (an additive one: the running stream), so
    that the value of every subset is defined.

    For games over the families (`probe.analysis.coalitions`), not for the grid. It misleads with aliased families: they
    are redundant by construction.
    """

    kind = "coalition"
    is_game = True

    def exists_at(self, site: ReadSite) -> bool:
        return any(self.chosen(site))

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights.masked_fill(self.members(read), 0.0)
        remaining = weights.sum(-1, keepdim=True)
        weights = torch.where(remaining >= MIN_REMAINING, weights / remaining.clamp_min(MIN_REMAINING), 0.0)
        return read._replace(routing_weights=weights), everywhere(read)


class Zero(Ablation):
    """Set the families' weights to zero; the rest stay as they are, so the read shrinks.

    It misleads where the sublayer minds the size of its input; the input norm undoes most of that.
    """

    kind = "zero"

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights.masked_fill(self.members(read), 0.0)
        return read._replace(routing_weights=weights), everywhere(read)


class _Replace(Ablation):
    """Replace the content of the families' sources by that of the reference; weights stay."""

    def exists_at(self, site: ReadSite) -> bool:
        return any(self.chosen(site))

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        others = self.reference(read).sources
        pairs = zip(self.chosen(read.site), read.sources, others, strict=True)
        sources = tuple(new if chosen else old for chosen, old, new in pairs)
        return read._replace(sources=sources), everywhere(read)


class Mean(_Replace):
    """Replace the families' sources by their mean over the sequences of the data, at each position.

    It misleads where positions differ in meaning from sequence to sequence: then the mean is of unlike things. No
    sequence ever has this content, so what the model does with it may say little of what it does otherwise.
    """

    kind = "mean"
    needs = "mean"


class Resample(_Replace):
    """Replace the families' sources by those of another example, at the same position (`Examples.partners`).

    It misleads where the two examples agree on what matters: what both hold counts as without effect.
    """

    kind = "resample"
    needs = "partner"


class Uniform(Ablation):
    """Spread the families' mass evenly over their sources; over all families, a read with equal weights.

    It misleads where routing is near to even already: then its dose is small, whatever the routing does.
    """

    kind = "uniform"
    labels = (ALL,)

    def exists_at(self, site: ReadSite) -> bool:
        return sum(self.chosen(site)) > 1

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        members = self.members(read)
        mean = (read.routing_weights * members).sum(-1, keepdim=True) / members.sum()
        return read._replace(routing_weights=torch.where(members, mean, read.routing_weights)), everywhere(read)


class Increment(Ablation):
    """Take the families' increments out of a cumulative read, so that their contribution is really gone.

    A snapshot is the sum of the increments before it: `v_n = d_0 + ... + d_n`, `d_0` the embedding, the last one what
    was written since the newest block. So `h = sum_j c_j d_j` with `c_j = sum_{n >= j} w_n`, and taking out
    `c_j (v_j - v_{j-1})` changes weights only. `family` names the increment by the source that it ends at; nothing
    is renormalised. An increment of zero (`current` where it is an alias) does not exist, and no alias hides one.

    It misleads where later increments are answers to the one that is taken out: they stay in the read.
    """

    kind = "increment"
    is_signed = True  # what is taken out of `v_n` may be more than its weight
    # Those of block_sum are increments already: `Zero` takes them out. An additive model's are in its stream, too.
    attnres_sources = ("cumulative",)

    def _members(self, site: ReadSite) -> tuple[bool, ...]:
        mask = source_mask(site, self.families)
        return (*mask[:-1], False) if site.current_is_alias else mask

    def exists_at(self, site: ReadSite) -> bool:
        num_increments = site.num_sources - site.current_is_alias
        return 0 < sum(self._members(site)) < num_increments

    def is_aliased(self, site: ReadSite) -> bool:
        return False

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        weights = read.routing_weights
        coefficients = weights.flip(-1).cumsum(-1).flip(-1)
        taken = coefficients * torch.tensor(self._members(read.site), device=weights.device)
        given = torch.nn.functional.pad(taken[..., 1:], (0, 1))
        return read._replace(routing_weights=weights - taken + given), everywhere(read)


class PatchWeights(Ablation):
    """Give the families the weights that they have in a second, corrupted run; the rest are scaled to fit.

    The corrupted run is that of another example (`Examples.partners`): content changes, structure does not. Over all
    families, the whole read's weights are the other run's.

    It misleads where weights hardly depend on the example: no effect then says that they carry no information about it,
    not that they do not matter.
    """

    kind = "patch_weights"
    needs = "partner"
    labels = (*FAMILIES, ALL)

    def exists_at(self, site: ReadSite) -> bool:
        return any(self.chosen(site)) and site.num_sources > 1

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        members, corrupted = self.members(read), self.reference(read).routing_weights
        rest = read.routing_weights.masked_fill(members, 0.0).sum(-1, keepdim=True)
        new_rest = corrupted.masked_fill(members, 0.0).sum(-1, keepdim=True)
        scaled = read.routing_weights * (new_rest / rest.clamp_min(MIN_REMAINING))
        possible = everywhere(read) if bool(members.all()) else rest.squeeze(-1) >= MIN_REMAINING
        return read._replace(routing_weights=torch.where(members, corrupted, scaled)), possible


class MatchedMass(Ablation):
    """Control: take as much mass as the families have from other sources, drawn at random, and renormalise.

    The others are emptied one after the other, in an order drawn for each sequence and read, until the amount is
    reached. Not possible where the others have less than the families.

    It misleads as a control where the other sources hold the families' content, too: with cumulative sources they do.
    """

    kind = "matched_mass"
    needs = "priorities"

    def ablated(self, read: Read) -> tuple[Read, Tensor]:
        assert self.context.priorities is not None
        members, weights = self.members(read), read.routing_weights
        drawn = self.context.view(self.context.priorities)[..., read.site.index, : weights.shape[-1]]
        order = drawn.masked_fill(members, torch.inf).argsort(-1)  # the families last: none of theirs is taken
        others = weights.masked_fill(members, 0.0)
        mass = (weights * members).sum(-1, keepdim=True)
        in_order = others.gather(-1, order)
        before = in_order.cumsum(-1) - in_order
        taken = (mass - before).clamp_min(0.0).minimum(in_order)
        left = weights - torch.zeros_like(weights).scatter(-1, order, taken)
        possible = (others.sum(-1) >= mass.squeeze(-1)) & (left.sum(-1) >= MIN_REMAINING)
        scaled = left / left.sum(-1, keepdim=True).clamp_min(MIN_REMAINING)
        return read._replace(routing_weights=scaled), possible
